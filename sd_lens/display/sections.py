"""The sections of the report: each a function from the findings to a fragment, or to None where it does not apply.

A further section is a further function with ``@section``; they stand on the page in the order of this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
from markupsafe import Markup

from sd_lens.anatomy import NOTHING
from sd_lens.display import explanation_sections, intervention_sections
from sd_lens.display.figures import direction_angles, eigenvalues, norm_heatmap, norm_lines, singular_values, sublayer_bars
from sd_lens.display.fragments import figure, joined, paragraph, subheading, table
from sd_lens.display.labels import visible
from sd_lens.display.pages import Section, reading
from sd_lens.display.propagation_sections import collapse_section, sensitivity_section
from sd_lens.display.quantization_sections import quantization_section
from sd_lens.display.signature_sections import signature_section
from sd_lens.display.tokens import colored_tokens, peak_block
from sd_lens.findings import Findings
from sd_lens.linear.directions import BlockDirections
from sd_lens.linear.parts import PARTS
from sd_lens.tracing.defects import Defects
from sd_lens.tracing.trace import NormTrace

MAX_PROMPTS = 6
MAX_TOKENS = 50


_Build = Callable[[Findings], Markup | None]
_SECTIONS: list[tuple[str, str, _Build]] = []


def section(id: str, title: str) -> Callable[[_Build], _Build]:
    """Puts a function's fragment on the page, under a heading."""

    def register(build: _Build) -> _Build:
        _SECTIONS.append((id, title, build))
        return build

    return register


def sections(findings: Findings) -> list[Section]:
    """All sections that apply."""
    built = ((id, title, build(findings)) for id, title, build in _SECTIONS)
    return [Section(id, title, fragment) for id, title, fragment in built if fragment is not None]


@section("norms", "Norms")
def norms(findings: Findings) -> Markup:
    """Lines and heat map of the prompt with the highest ratio."""
    defects = findings.defects
    trace = defects.trace
    prompt = telling_prompt(trace)
    why = "It has the highest ratio of a norm to the other tokens' median." if trace.n_prompts > 1 else ""
    heatmap = norm_heatmap(trace, prompt, min_ratio=defects.min_ratio)
    layout: Any = heatmap.layout  # its attributes are made at run time
    n_named = len(layout.xaxis.tickvals)
    return joined(
        [
            paragraph(
                f"Norm of the residual stream of every token of prompt {prompt}, after the embedding and after every block. {why}"
            ),
            figure(norm_lines(trace, prompt, min_ratio=defects.min_ratio), "norm-lines"),
            figure(heatmap, "norm-heatmap", min_width=120 + 13 * n_named),
        ]
    )


def telling_prompt(trace: NormTrace) -> int:
    """The prompt with the highest ratio after any block."""
    highest = trace.ratios[1:].nan_to_num(nan=0.0, posinf=0.0).max(0).values
    return int(trace.prompt[int(highest.argmax())])


@section("tokens", "Tokens")
def tokens(findings: Findings) -> Markup:
    """Coloured tokens of the first prompts."""
    trace = findings.defects.trace
    shown = min(MAX_PROMPTS, trace.n_prompts)
    more = f" The first {shown} of {trace.n_prompts} prompts are shown." if trace.n_prompts > shown else ""
    text = (
        f"Orange tokens have a larger norm after block {peak_block(trace)} than the median of the others, blue ones a smaller one; the "
        f"colour is the logarithm (base 10) of their ratio, shown on hover. Spaces are shown as ·, line breaks as ↵.{more}"
    )
    pieces = [paragraph(text)]
    for prompt in range(shown):
        pieces += [subheading(f"Prompt {prompt}"), Markup(colored_tokens(trace, prompt).body)]
    return joined(pieces)


@section("sublayers", "Which sublayer")
def sublayers(findings: Findings) -> Markup | None:
    """Where the steps of explosion and decay blocks come from."""
    attribution, defects = findings.attribution, findings.defects
    if not attribution.shares:
        return None
    frame = attribution.to_dataframe()
    frame.insert(1, "kind", ["explosion" if block in defects.explosion_blocks else "decay" for block in frame.block])
    columns = {
        "block": "block",
        "kind": "kind",
        "before": "before",
        "attention": "attention adds",
        "ffn": "FFN adds",
        "after": "after",
        "ffn_share": "FFN's share of the step",
        "residual": "unexplained",
    }
    text = (
        "The projection of the high-norm tokens on the defect direction: what enters each block and what its sublayers add to it."
    )
    return joined(
        [paragraph(text), figure(sublayer_bars(attribution), "sublayers"), table(frame, columns, formats={"ffn_share": ".0%"})]
    )


@section("maps", "Linear maps")
def maps(findings: Findings) -> Markup:
    """Singular directions and eigenvalues of every block, or why there are none."""
    if findings.directions is None:
        return paragraph(f"The blocks' linear maps were not computed: {findings.no_directions_because}.")
    return linear_maps(findings.directions, findings.defects)


def linear_maps(directions: BlockDirections, defects: Defects | None = None) -> Markup:
    """The same from the table alone.

    Args:
        directions: From `block_directions`.
        defects: Their explosion and decay blocks are marked in the figures.
    """
    text = f"What each block does to a vector, from its weights alone. Angles are taken to {directions.reference_name}"
    alone = directions.reference_source not in ("given", "measured")
    text += ", because no direction was measured: that block's own angle is zero by definition." if alone else "."
    frame = directions.to_dataframe()
    frame["part"] = pd.Categorical(frame.part, PARTS).rename_categories({"ffn": "FFN"})
    frame["eigenvalue"] = [value if done else float("nan") for value, done in zip(frame.eigenvalue, frame.converged, strict=True)]
    frame.loc[~frame.converged, "eigenvector_angle_deg"] = float("nan")
    columns = {
        "block": "block",
        "part": "part",
        "sigma1": "σ₁",
        "sigma2": "σ₂",
        "gap": "σ₁/σ₂",
        "angle_deg": "angle of u₁ (°)",
        "eigenvalue": "eigenvalue",
        "eigenvector_angle_deg": "angle of its vector (°)",
        "residual": "residual",
    }
    if frame.balance.notna().any():
        columns["balance"] = "balance"
    pieces = [
        paragraph(text),
        figure(singular_values(directions, defects), "singular-values"),
        figure(direction_angles(directions, defects), "angles"),
        figure(eigenvalues(directions, defects), "eigenvalues"),
    ]
    if not frame.converged.all():
        pieces.append(
            paragraph("Where no eigenvalue is given, none was resolved: as a rule, because no eigenvector is near the direction.")
        )
    pieces.append(table(frame, columns, digits=3, formats={"angle_deg": ".1f", "eigenvector_angle_deg": ".1f"}))
    if directions.notes:
        pieces.append(paragraph(f"{'; '.join(directions.notes)}."))
    return joined(pieces)


@section("components", "Which components")
def components(findings: Findings) -> Markup | None:
    """The norm, split over what wrote it."""
    return explanation_sections.components(findings.anatomy)


@section("trigger", "What sets it off")
def trigger(findings: Findings) -> Markup | None:
    """The trigger, split over what wrote it."""
    return explanation_sections.trigger(findings.anatomy)


@section("massive", "Massive activations")
def massive(findings: Findings) -> Markup:
    """Massive activations and super weights."""
    return explanation_sections.massive(findings.anatomy)


@section("scans", "Tokens by themselves")
def scans(findings: Findings) -> Markup:
    """Scans of the vocabulary."""
    return explanation_sections.scans(findings.pathways)


@section("text-tokens", "Two pathways")
def text_tokens(findings: Findings) -> Markup | None:
    """What the text shows of its tokens, beside what they do by themselves."""
    return explanation_sections.text_tokens(findings.pathways)


@section("attention", "Attention sinks and repeats")
def attention(findings: Findings) -> Markup:
    """Attention to high-norm tokens, and repeated tokens."""
    return explanation_sections.attention(findings.pathways)


@section("removal", "Without the explosion subspace")
def removal(findings: Findings) -> Markup | None:
    """What removing the explosion subspace does."""
    return intervention_sections.removal(findings.causality)


@section("response", "What the FFN answers")
def response(findings: Findings) -> Markup | None:
    """The true FFN's answer to its leading right singular vector."""
    return intervention_sections.response(findings.causality)


@section("quantization", "What a quantiser must spare")
def quantization(findings: Findings) -> Markup | None:
    """Perplexities in eight bits, with the explosion and decay blocks' down-projections spared or not."""
    study = findings.uses.quantization
    if study is not None:
        return quantization_section(study)
    reason = findings.uses.missing["quantize"]
    return None if reason == NOTHING else paragraph(f"Quantisation was not studied: {reason}.")


@section("signature", "Signature")
def signature(findings: Findings) -> Markup | None:
    """The model's signature, for comparison with others."""
    return signature_section(findings.uses.signature) if findings.uses.signature.found else None


@section("collapse", "Representational collapse")
def collapse(findings: Findings) -> Markup | None:
    """How far apart two inputs stay at the last token, over the length."""
    if findings.propagation is None:
        return paragraph(f"Information propagation was not looked at: {findings.no_propagation_because}.")
    return collapse_section(findings.propagation)


@section("sensitivity", "What the last token feels")
def sensitivity(findings: Findings) -> Markup | None:
    """Which tokens the last one's output depends on."""
    return None if findings.propagation is None else sensitivity_section(findings.propagation)


@section("high-norm-tokens", "High-norm tokens")
def high_norm_tokens(findings: Findings) -> Markup | None:
    """The first of them, by prompt and position."""
    found = findings.defects.to_dataframe()
    if found.empty:
        return None
    found["token"] = found.token.map(visible)
    columns = {
        "prompt": "prompt",
        "pos": "position",
        "token": "token",
        "id": "token id",
        "peak_block": "stands out most after block",
        "norm": "norm there",
        "ratio": "ratio to the others' median",
    }
    pieces = [table(found.head(MAX_TOKENS), columns)]
    if len(found) > MAX_TOKENS:
        pieces.append(paragraph(f"{len(found) - MAX_TOKENS} more are not listed."))
    return joined(pieces)


@section("checks", "Checks")
def checks(findings: Findings) -> Markup:
    """What was verified on the model, and which analyses that allows."""
    checked = findings.check
    frame = checked.to_dataframe()
    frame["passed"] = ["nothing to compare" if row.passed is None else "passed" if row.passed else "failed" for row in checked.rows]
    frame["detail"] = frame.detail.replace("", "–")
    columns = {"check": "check", "passed": "outcome", "error": "largest deviation", "block": "in block", "detail": "detail"}
    if (frame.detail == "–").all():
        del columns["detail"]
    analyses = checked.analyses()
    analyses["because"] = analyses.because.replace("", "–")
    needs = {"analyses": "analyses", "applies": "apply"} | (
        {} if analyses.applies.all() else {"because": "what stands against them"}
    )
    text = "Measured on two short prompts of random tokens: the identities that the analyses rest on. Deviations are relative to the largest entry"
    return joined(
        [paragraph(f"{text}; {number_text(checked.tolerance)} passes."), table(frame, columns, digits=2), table(analyses, needs)]
    )


def number_text(value: float) -> str:
    """A tolerance in a sentence."""
    return f"up to {value:g}" if value > 0 else "none was measured, nothing"


@section("how-to-read", "How to read this")
def how_to_read(findings: Findings) -> Markup:
    """The words used, and where they come from."""
    edited = findings.causality.consequences is not None
    return reading(
        found=bool(findings.defects.tokens),
        maps=findings.directions is not None,
        explained=True,
        edited=edited,
        quantized=findings.uses.quantization is not None,
        propagated=findings.propagation is not None,
    )
