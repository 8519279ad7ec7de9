"""Information propagation as a page of its own: what the report has of it, and what else was asked for."""

from __future__ import annotations

import pandas as pd
from markupsafe import Markup

from sd_lens.display.collapse_words import metric_name
from sd_lens.display.figures import answer_curves, mitigation_lines, propagation_panels, squashing_heatmap
from sd_lens.display.fragments import figure, joined, paragraph, table
from sd_lens.display.pages import Section, page, reading
from sd_lens.display.propagation_sections import collapse_section, sensitivity_section
from sd_lens.propagation.overview_result import Propagation
from sd_lens.wording import propagated

LISTED = 12
"""Answers at more lengths than this are drawn only."""
_DISTANCES = {"shortest": "at the shortest", "longest": "at the longest"}
_CRITICAL = {
    "below_epsilon": "below ε from",
    "equal": "equal to the bit at",
    "exponent": "exponent",
    "exponent_error": "its standard error",
}


def render_propagation(found: Propagation) -> str:
    """Information propagation as one HTML page; only what was looked at.

    Args:
        found: From `sd_lens.propagation.overview.propagation_overview`.
    """
    curve = found.curve
    facts = [
        ("blocks", str(found.n_blocks)),
        ("d_model", str(found.d_model)),
        ("probe", str(curve.probe["name"])),
        ("lengths", f"{len(curve.lengths)}, {curve.lengths[0]:,} to {curve.lengths[-1]:,}"),
        ("precisions", ", ".join(curve.dtypes)),
    ]
    built = [
        Section("collapse", "Representational collapse", collapse_section(found, every=True)),
        *_optional(found),
        Section("how-to-read", "How to read this", reading(propagated=True)),
    ]
    return page(found.model_name, propagated(found), facts, built)


def _optional(found: Propagation) -> list[Section]:
    """Mitigations, sensitivity, bound, the explosion subspace and answers: what was asked for, or why it is missing."""
    built = []
    for name, id, title, fragment in (
        ("mitigations", "mitigations", "What helps", _mitigations(found)),
        ("sensitivity", "sensitivity", "What the last token feels", sensitivity_section(found)),
        ("bound", "bound", "The over-squashing bound", _bound(found)),
        ("consequences", "explosion", "Without the explosion subspace", _consequences(found)),
        ("answers", "answers", "Answers", _answers(found)),
    ):
        if fragment is None and name in found.missing and name != "bound":  # whose reason stands below the sensitivities
            fragment = paragraph(f"This could not be measured: {found.missing[name]}.")
        if fragment is not None:
            built.append(Section(id, title, fragment))
    return built


def _mitigations(found: Propagation) -> Markup | None:
    helped = found.mitigations
    if helped is None:
        return None
    frame = helped.to_dataframe()
    frame["setting"] = [str(setting) for setting in helped.settings for _ in setting.curve.dtypes]
    columns = {"setting": "setting", "dtype": "precision", **_DISTANCES, "kept": "kept", **_CRITICAL}
    text = (
        f"The probe as it is, with separators between its elements, and in each precision. Distances are means of the {metric_name(helped.metric)} "
        f"at lengths {helped.lengths[0]:,} and {helped.lengths[-1]:,}; kept: what is left of the first at the last."
    )
    return joined(
        [
            paragraph(text),
            *(
                figure(mitigation_lines(helped, dtype), f"mitigations-{dtype}", min_width=560)
                for dtype in helped.settings[0].curve.dtypes
            ),
            table(_shown(frame), columns, digits=3),
        ]
    )


def _bound(found: Propagation) -> Markup | None:
    bound = found.bound
    if bound is None:
        return None
    text = (
        "How much of each input token can still reach the last one by the over-squashing theorem, walking back through the blocks from the last "
        "(below) to the first (above), with constants of norms, heads and FFNs measured on this text. It holds with the attention patterns "
        "kept as they are: that attention looks elsewhere when a token changes is not bounded. The bound's own limit is its first column."
    )
    columns = {
        "block": "block",
        "beta1": "β₁",
        "beta2": "β₂",
        "sigma_psi": "σψ",
        "ffn_gain": "σψ/β₂",
        "head_factor": "heads' factor",
    }
    return joined(
        [
            paragraph(text),
            figure(squashing_heatmap(bound), "bound", min_width=640),
            table(bound.constants_table(), columns, digits=3),
        ]
    )


def _consequences(found: Propagation) -> Markup | None:
    ablated = found.consequences
    if ablated is None:
        return None
    frame = ablated.to_dataframe()
    columns = {"run": "", "dtype": "precision", **_DISTANCES, **_CRITICAL}
    if ablated.sensitivities:
        columns |= {"high_norm_share": "high-norm tokens' share", "first_norm": "first token felt", "total_norm": "all tokens felt"}
    text = (
        f"The first {ablated.rank} singular vectors of block {ablated.block}'s FFN taken out of all tokens, beside random displacements of the same "
        "length. What the random control does as well comes from displacing, not from the subspace."
    )
    formats = {"high_norm_share": ".2%"} if ablated.sensitivities else {}
    return joined(
        [
            paragraph(text),
            figure(propagation_panels(ablated), "without-explosion", min_width=760),
            table(_shown(frame), columns, digits=3, formats=formats),
        ]
    )


def _answers(found: Propagation) -> Markup | None:
    answers = found.answers
    if answers is None:
        return None
    summary = answers.summary()
    columns = {
        "length": "length",
        "n": "asked",
        "n_answered": "answered",
        "accuracy": "right",
        "mean_absolute_error": "mean absolute error",
        "median_absolute_error": "median absolute error",
    }
    pieces = [
        paragraph("What the model answers to the probe, and how far that is from the right answer."),
        figure(answer_curves(answers), "answers", min_width=640),
    ]
    if len(summary) <= LISTED:
        pieces.append(table(summary, columns, digits=3, formats={"accuracy": ".0%"}))
    return joined(pieces)


def _shown(frame: pd.DataFrame) -> pd.DataFrame:
    """Missing lengths as NaN, which tables write as a dash."""
    return frame.astype({name: float for name in ("below_epsilon", "equal")})
