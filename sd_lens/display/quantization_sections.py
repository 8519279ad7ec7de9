"""The quantisation study as a section of a page, and as a page of its own."""

from __future__ import annotations

from typing import Any

import pandas as pd
from markupsafe import Markup

from sd_lens.applications.quantization_result import DETECTED, FULL, QuantizationStudy
from sd_lens.applications.settings import compressor_settings, torchao_settings
from sd_lens.display.figures import quantization_bars, quantization_ranges
from sd_lens.display.fragments import code, figure, joined, paragraph, subheading, table
from sd_lens.display.pages import Section, page, reading
from sd_lens.display.quantization_words import named_sets, scheme_name, set_name


def quantization_section(study: QuantizationStudy) -> Markup:
    """Table and bars of perplexities, ranges of every projection, and the recommendation as settings to copy.

    Args:
        study: From `quantization_study`.

    Returns:
        A fragment for a page.
    """
    pieces = [paragraph(_what(study)), _table(study), figure(quantization_bars(study), "quantization-bars", min_width=640)]
    if study.ranges:
        pieces += [
            subheading("Ranges and errors"),
            paragraph(
                "One range for a whole tensor has 255 steps. Where a single token's input, or a single output's weights, reach far beyond what is "
                "typical, they set the step for all others, and ordinary tokens are left with hardly any: their SQNR, the power of what the "
                "projection answers to a token over that of the error, in decibels and averaged over tokens, is low there."
            ),
            figure(quantization_ranges(study), "quantization-ranges", min_width=680),
        ]
    if study.recommendation is not None:
        found = study.recommendation
        pieces += [subheading("What to spare"), paragraph(found.sentence()), _settings(found.torchao(), found.llm_compressor())]
    else:
        pieces += _detected(study)
    if study.notes:
        noted = "; ".join(study.notes)
        pieces.append(paragraph(f"{noted[0].upper()}{noted[1:]}."))
    return joined(pieces)


def render_quantization(study: QuantizationStudy) -> str:
    """The quantisation study as one HTML page.

    Args:
        study: From `quantization_study`.
    """
    facts = [
        ("blocks", str(study.n_blocks)),
        ("d_model", str(study.d_model)),
        ("tokens", f"{study.n_tokens:,}"),
        ("window", f"{study.window} tokens, {'BOS first' if study.bos else 'no BOS'}"),
        ("explosion blocks", ", ".join(map(str, study.explosion_blocks)) or "none"),
        ("decay blocks", ", ".join(map(str, study.decay_blocks)) or "none"),
        ("computed with", "torchao's int8 kernels" if study.backend == "torchao" else "rounded floating-point numbers"),
    ]
    built = [
        Section("quantization", "In eight bits", quantization_section(study)),
        Section("how-to-read", "How to read this", reading(quantized=True)),
    ]
    return page(study.model_name, study.sentences(), facts, built, found=bool(study.explosion_blocks))


def _what(study: QuantizationStudy) -> str:
    methods = {method for method, _ in study.schemes}
    granularities = {granularity for _, granularity in study.schemes}
    text = [
        f"Perplexity of {study.n_tokens:,} tokens of text, read in windows of {study.window} ({'with' if study.bos else 'without'} BOS in front, a step "
        f"of {study.stride}), with weights and inputs of the blocks' linear projections rounded to eight-bit integers, but for those spared."
    ]
    if "rtn" in methods:
        text.append("RTN rounds to the nearest.")
    if "smoothquant" in methods:
        text.append(
            f"SmoothQuant (α = {study.alpha:g}) first moves part of the outliers of what reads a norm into the weights; down-projections read none."
        )
    if "per_tensor" in granularities:
        text.append("Per tensor: one range for a matrix, and one for all that it reads in a window.")
    if "per_token" in granularities:
        text.append("Per token: a range for each output and each token.")
    if any(row.spared == DETECTED for row in study.rows):
        blocks = ", ".join(map(str, sorted({*study.explosion_blocks, *study.decay_blocks})))
        text.append(f"Of the explosion and decay blocks ({blocks}) the down-projections are spared.")
    return " ".join(text)


def _table(study: QuantizationStudy) -> Markup:
    """A row per method and granularity, a column per set; single blocks are in the figure."""
    sets = named_sets(study)
    wide = study.table()
    frame = pd.DataFrame(
        {"scheme": [scheme_name(*scheme) for scheme in study.schemes]} | {name: wide[name] for name in (FULL, *sets)}
    )
    spec = ",.2f" if float(frame[[FULL, *sets]].max().max()) < 1e6 else ",.4g"
    columns = {"scheme": "perplexity with", FULL: FULL} | {
        name: "nothing spared" if name == "none" else f"spared: {set_name(name)}" for name in sets
    }
    return table(frame, columns, formats=dict.fromkeys((FULL, *sets), spec))


def _detected(study: QuantizationStudy) -> list[Markup]:
    """Settings that spare the explosion and decay blocks, where no smallest set was searched for."""
    rows = [row for row in study.rows if row.spared == DETECTED]
    if not rows:
        return []
    row = rows[0]
    alpha = study.alpha if row.method == "smoothquant" else None
    granularity: Any = row.granularity
    text = (
        f"These settings spare the down-projections of the explosion and decay blocks: {', '.join(row.names)}. Whether all of them are needed, or "
        "others too, was not tried here; sd-lens quantize searches for the smallest set within a budget."
    )
    settings = (
        torchao_settings(row.names, study.excluded, granularity, alpha),
        compressor_settings(row.names, study.excluded, granularity, alpha),
    )
    return [subheading("What to spare"), paragraph(text), _settings(*settings)]


def _settings(torchao: str, llm_compressor: str) -> Markup:
    """Settings of the libraries that quantise for real, to copy."""
    return joined(
        [
            paragraph("With torchao, where model is the Hugging Face model:"),
            code(torchao),
            paragraph("With llm-compressor:"),
            code(llm_compressor),
        ]
    )
