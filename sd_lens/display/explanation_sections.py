"""Sections that explain an explosion: what it is made of, what sets it off, which tokens, and what attention does."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup

from sd_lens.anatomy import NOTHING, Anatomy
from sd_lens.display import fragments
from sd_lens.display.figures import (
    attribution_bars,
    attribution_groups,
    massive_activations_figure,
    pathway_table_figure,
    repetition_curves,
    scan_pathways,
    scan_scatter,
    sink_heatmap,
    super_weight_bars,
)
from sd_lens.display.fragments import joined, paragraph, subheading, table
from sd_lens.display.labels import visible
from sd_lens.pathways import Pathways
from sd_lens.tracing.shares import Attribution

MAX_ROWS = 20
MAX_BARS = 10
_PLACES = {"initial": "alone at position 0", "no_attention": "alone, without attention", "second": "after a random other token"}


def figure(drawn: go.Figure, name: str) -> Markup:
    """A figure that scrolls on narrow screens: labels of points and rows would overlap if it shrank."""
    return fragments.figure(drawn, name, min_width=640)


def components(anatomy: Anatomy) -> Markup | None:
    """What writes the norm: components, and the neurons or experts of the explosion blocks."""
    if anatomy.norm is None:
        return _why_not(anatomy.missing["norm"], "The norm was not split")
    norm = anatomy.norm
    text = (
        f"The projection of the residual stream after block {norm.block} on the defect direction, split exactly over everything that "
        f"wrote it. Delimiters are the later tokens with a high norm. Left unexplained: at most {_residual(norm)} of it."
    )
    return joined([paragraph(text), *_split(norm, "norm")])


def trigger(anatomy: Anatomy) -> Markup | None:
    """What sets the explosion off."""
    if anatomy.trigger is None:
        return _why_not(anatomy.missing["trigger"], "What sets the explosion off was not split")
    found = anatomy.trigger
    text = (
        f"What the FFN of block {found.block} answers to: the coefficient of its normalised input on the leading right singular vector of "
        f"its linear map, split over what wrote it, the norm's scale being held. Left unexplained: at most {_residual(found)} of it."
    )
    return joined([paragraph(text), *_split(found, "trigger")])


def _why_not(reason: str, what: str) -> Markup | None:
    return None if reason == NOTHING else paragraph(f"{what}: {reason}.")


def _residual(attribution: Attribution) -> str:
    terms = attribution.values.abs().sum(1).clamp(min=1e-30)
    return f"{float((attribution.residual.abs() / terms).max()):.0e}"


def _split(attribution: Attribution, name: str) -> list[Markup]:
    pieces = [figure(attribution_bars(attribution, k=MAX_BARS), f"{name}-parts")]
    if len(attribution.rows) > 1:
        pieces.append(figure(attribution_groups(attribution, k=6), f"{name}-groups"))
    if attribution.inside:  # of the FFN that matters most
        parts = {block: abs(attribution.part("ffn", block)) for block in attribution.inside}
        block = max(parts, key=lambda number: parts[number])
        kind = "Neurons" if attribution.inside[block].kind == "neuron" else "Experts"
        pieces += [
            subheading(f"{kind} of block {block}"),
            figure(attribution_bars(attribution, inside=block, k=MAX_BARS), f"{name}-inside"),
        ]
    return pieces


def massive(anatomy: Anatomy) -> Markup:
    """Massive activations and super weights."""
    census, weights = anatomy.massive, anatomy.super_weights
    if not census.found:
        pieces = [paragraph(f"No massive activation ({census.criteria}) in {census.n_tokens} tokens.")]
    else:
        columns = {
            "dim": "dimension",
            "first_block": "first after block",
            "last_block": "last after block",
            "count": "activations",
            "value": "largest",
        }
        pieces = [
            paragraph(f"Entries of the residual stream with {census.criteria}: {census.n_found}."),
            figure(massive_activations_figure(census), "massive"),
            table(census.dimensions().head(MAX_ROWS), columns),
        ]
    pieces.append(subheading("Super weights"))
    if weights is None:
        return joined([*pieces, paragraph(f"They were not looked for: {anatomy.missing['super_weights']}.")])
    if not weights.rows:
        return joined([*pieces, paragraph("No single weight makes the large norm.")])
    columns = {"tl": "TransformerLens", "hf": "Hugging Face", "weight": "weight", "activation": "neuron's activation"}
    columns |= {"output": "output", "share": "its share", "token": "token"}
    frame = weights.to_dataframe().head(MAX_ROWS)
    frame["token"] = frame.token.map(visible)
    frame["hf"] = frame.hf.fillna("–")
    text = "Single entries of an FFN's output matrix whose neuron and whose dimension both spike, and which make most of that dimension."
    return joined(
        [
            *pieces,
            paragraph(text),
            figure(super_weight_bars(weights), "super-weights"),
            table(frame, columns, formats={"share": ".0%"}),
        ]
    )


def scans(pathways: Pathways, *, each: bool = False) -> Markup:
    """What every token id does by itself.

    Args:
        pathways: From `sd_lens.pathways.pathways`.
        each: Whether to draw every scan by itself, too.
    """
    rows = [
        {
            "place": _PLACES[scan.pathway],
            "ids": int(scan.trained.sum()),
            "exploding": len(scan.self_exploding()),
            "share": scan.share_exploding,
            "control": scan.control_share,
            "first": ", ".join(visible(token) for token in scan.self_exploding().token.head(5)) or "–",
        }
        for scan in pathways.scans
    ]
    columns = {
        "place": "each id",
        "ids": "ids scanned",
        "exploding": "explode",
        "share": "share",
        "control": "of random embeddings",
        "first": "largest norms",
    }
    first = pathways.scans[0]
    text = (
        f"Token ids by themselves, up to block {first.block}: an id explodes where its norm is {first.min_ratio:g} times that of ordinary "
        "tokens in the text. Ids that were never trained are left out."
    )
    pieces = [paragraph(text), table(pd.DataFrame(rows), columns, formats={"share": ".1%", "control": ".1%"})]
    if len(pathways.scans) > 1:
        pieces.append(figure(scan_pathways(pathways.scans), "scan-pathways"))
    if each or len(pathways.scans) == 1:
        pieces += [figure(scan_scatter(scan), f"scan-{scan.pathway}") for scan in pathways.scans]
    confirmation = pathways.confirmation
    if confirmation is not None:
        frame = confirmation.to_dataframe()
        frame["token"] = frame.token.map(visible)
        columns = {"group": "", "token": "token", "id": "token id", "scan_ratio": "ratio in the scan", "ratio": "ratio in the text"}
        columns |= {"explodes": "explodes in the text"}
        pieces += [
            subheading("In a text"),
            paragraph(
                f"The first of them, and ids of median norm, after “{visible(confirmation.prefix_text)}” in the model as it is."
            ),
            table(frame, columns, digits=3),
        ]
    return joined([*pieces, *(paragraph(f"{note}.") for note in dict.fromkeys(n for scan in pathways.scans for n in scan.notes))])


def text_tokens(pathways: Pathways) -> Markup | None:
    """Both pathways side by side, for the ids of the text that are ever high-norm."""
    high = pathways.tokens.high()
    if high.empty:
        return None
    frame = high.head(MAX_ROWS)
    frame = frame.assign(token=frame.token.map(visible))
    columns = {
        "token": "token",
        "n_initial": "at position 0",
        "high_initial": "high-norm there",
        "n_later": "later",
        "high_later": "high-norm there",
        "first_in_prompt_high": "first of its prompt",
        "repeat_high": "repeats",
        "initial_ratio": "ratio alone",
        "no_attention_ratio": "ratio without attention",
        "pathway": "pathway",
    }
    more = f" {len(high) - MAX_ROWS} more are not listed." if len(high) > MAX_ROWS else ""
    text = (
        "Tokens of the text that have a high norm somewhere: how often, and what each does by itself. “self”: also without attention; "
        f"“initial”: only at position 0; “context”: later, but not without attention.{more}"
    )
    sentences = [paragraph(sentence) for sentence in pathways.tokens.sentences(3)]
    return joined(
        [
            paragraph(text),
            *sentences,
            figure(pathway_table_figure(pathways.tokens), "two-pathways"),
            table(frame, columns, digits=3),
        ]
    )


def attention(pathways: Pathways) -> Markup:
    """Sinks, and what repeated tokens do."""
    sinks, pieces = pathways.sinks, []
    if sinks is None:
        pieces.append(paragraph(f"Attention was not measured: {pathways.missing['sinks']}."))
    else:
        columns = {
            "block": "block",
            "head": "head",
            "to_high": "to high-norm tokens",
            "to_other": "to others",
            "to_self": "to itself",
        }
        columns |= {"alpha": f"to position {sinks.key} (first {sinks.T})", "sink": "sink"}
        if not sinks.n_queries:
            columns = {name: heading for name, heading in columns.items() if not name.startswith("to_")}
        percent = dict.fromkeys(("to_high", "to_other", "to_self", "alpha"), ".0%")
        text = (
            f"What heads pay to high-norm tokens, and to position {sinks.key}; a head has a sink there where it pays more than "
            f"{sinks.epsilon:.0%}. Sink rate: {sinks.sink_rate:.1%}."
        )
        pieces += [
            paragraph(text),
            figure(sink_heatmap(sinks), "sinks"),
            table(sinks.top(8), columns, formats={name: spec for name, spec in percent.items() if name in columns}),
        ]
    repeated = pathways.repeated
    text = f"Norm after block {repeated.block} of each of a run of equal tokens, relative to the first token's."
    return joined([*pieces, subheading("Repeated tokens"), paragraph(text), figure(repetition_curves(repeated), "repeats")])
