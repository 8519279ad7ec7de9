"""Sections on what the explosion subspace does: the consequences of removing it, and the FFN's answer to it."""

from __future__ import annotations

import pandas as pd
from markupsafe import Markup

from sd_lens.anatomy import NOTHING
from sd_lens.display.figures import consequence_panels, response_curve
from sd_lens.display.fragments import figure, joined, paragraph, subheading, table, texts
from sd_lens.display.labels import visible
from sd_lens.interventions.causality import Causality
from sd_lens.interventions.outcomes import Consequences, times

_COLUMNS = {
    "intervention": "",
    "side": "side",
    "where": "tokens",
    "n_tokens": "of them",
    "loss": "loss",
    "kl": "KL",
    "peak_norm": "peak norm",
    "peak_ratio": "its ratio",
    "n_high": "high-norm tokens",
    "sink_rate": "sink rate",
    "sink_attention": "to sinks",
}
_PLACES = {"none": "–", "initial": "initial", "delimiters": "delimiters", "everywhere": "all"}


def removal(causality: Causality) -> Markup | None:
    """What removing the subspace does, as a figure, a table and texts."""
    found = causality.consequences
    if found is None:
        return _why_not(causality.missing["consequences"], "The explosion subspace was not removed")
    text = (
        f"The subspace is spanned by the first {found.rank} singular vectors of block {found.block}'s FFN. On the trigger side the right ones are "
        "taken out of what the FFN reads, on the direction side the left ones out of the stream that the block leaves. A random control "
        "displaces each token by as much, in directions that have none of the subspace: what it does as well comes from displacing, not from "
        "the subspace. In the stream it adds to the norm what ablation takes away."
    )
    pieces = [
        paragraph(text),
        figure(consequence_panels(found), "consequences", min_width=860),
        _table(found),
    ]
    if found.continuations:
        pieces += [subheading("Generated text"), _side_by_side(found)]
    if found.notes:
        noted = "; ".join(found.notes)
        pieces.append(paragraph(f"{noted[0].upper()}{noted[1:]}."))
    return joined(pieces)


def _table(found: Consequences) -> Markup:
    """Rows where something was edited; of controls the mean, with the standard deviation of the ratio."""
    frame = found.to_dataframe()
    frame = frame.loc[(frame["n_tokens"] > 0) | (frame["intervention"] == "none")]
    columns = {name: heading for name, heading in _COLUMNS.items() if not frame[name].isna().all()}
    shown = frame.assign(
        intervention=frame["intervention"].replace(
            {"none": "untouched", "mean ablate": "mean\u00a0ablate", "random control": "control"}
        ),
        side=frame["side"].replace("none", "–"),
        where=frame["where"].map(_PLACES),
        peak_ratio=[_with_spread(*row) for row in zip(frame["peak_ratio"], frame["peak_ratio_std"], strict=True)],
    )
    formats = {"loss": ".3f", "kl": ".3f", "peak_norm": ".4g", "n_high": ".3g", "sink_rate": ".1%", "sink_attention": ".0%"}
    return table(shown, columns, formats={name: spec for name, spec in formats.items() if name in columns})


def _side_by_side(found: Consequences) -> Markup:
    """A column per place, line breaks and indents as they are."""
    shown = found.texts.fillna("–")
    return texts(list(shown.columns), [[_written(text) for text in row] for row in shown.itertuples(index=False)])


def _written(text: str) -> str:
    """A text whose line breaks are seen twice: as a sign and as a break."""
    return "".join(c if c == " " else "↵\n" if c == "\n" else visible(c) for c in text)


def _with_spread(value: float, spread: float) -> str:
    if pd.isna(value):
        return "–"
    if pd.isna(spread):
        return times(value)
    return f"{times(value)}\u00a0±\u00a0{f'{spread:.1g}' if value < 1000 else f'{spread:,.0f}'}"


def response(causality: Causality) -> Markup | None:
    """The true FFN's answer to the leading vector."""
    curve = causality.response
    if curve is None:
        return None  # for the same reason as the removal, which says it
    return joined([paragraph(curve.sentence()), figure(response_curve(curve), "response", min_width=640)])


def _why_not(reason: str, what: str) -> Markup | None:
    return None if reason == NOTHING else paragraph(f"{what}: {reason}.")
