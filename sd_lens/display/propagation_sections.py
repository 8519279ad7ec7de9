"""Information propagation as sections of a page, and as a page of its own."""

from __future__ import annotations

import math

import pandas as pd
from markupsafe import Markup

from sd_lens.display.collapse_words import layer_name, length_text, metric_name
from sd_lens.display.figures import (
    collapse_lines,
    sensitivity_figure,
)
from sd_lens.display.fragments import figure, joined, paragraph, subheading, table
from sd_lens.display.labels import visible
from sd_lens.propagation.overview_result import Propagation
from sd_lens.propagation.probes import PROBES

TOP = 8
"""So many tokens are listed below sensitivities."""


def collapse_section(found: Propagation, *, every: bool = False) -> Markup:
    """Distances over the length, and critical lengths.

    Args:
        found: From `sd_lens.propagation.overview.propagation_overview`.
        every: Whether to draw every metric, and not the first alone.

    Returns:
        A fragment for a page.
    """
    curve = found.curve
    figures = [
        figure(collapse_lines(curve, metric), f"collapse-{metric.replace('_', '-')}", min_width=560)
        for metric in (curve.metrics if every else curve.metrics[:1])
    ]
    pieces = [paragraph(_what(found)), *figures]
    if found.critical_lengths:
        pieces += [subheading("Critical lengths"), paragraph(_CRITICAL_TEXT), critical_table(found)]
    pieces += [paragraph(f"{note[0].upper()}{note[1:]}.") for note in found.notes]
    return joined(pieces)


def sensitivity_section(found: Propagation) -> Markup:
    """What the last token feels of every token, or why that is not known.

    Args:
        found: From `sd_lens.propagation.overview.propagation_overview`.

    Returns:
        A fragment for a page.
    """
    felt = found.sensitivity
    if felt is None:
        return paragraph(f"Sensitivities were not measured: {found.missing['sensitivity']}.")
    frame = felt.to_dataframe().nlargest(TOP, "frobenius")
    frame["token"] = frame["token"].map(visible)
    columns = {
        "pos": "position",
        "token": "token",
        "frobenius": "Frobenius norm",
        "spectral": "spectral norm",
        "share": "share of the squares",
        "relative": "times the vector's length",
        "high_norm": "high norm",
        "sink": "sink",
    }
    if frame["spectral"].isna().all():
        del columns["spectral"]
    text = (
        f"Norm of the Jacobian of the {felt.of_name} at position {felt.position} with respect to the vector of every token that enters block "
        f"{felt.sources[0]}: how far a small change of a token moves what the next token is predicted from."
    )
    pieces = [
        paragraph(text),
        figure(sensitivity_figure(felt), "sensitivity", min_width=560),
        table(frame, columns, formats={"share": ".2%"}),
    ]
    if len(felt.texts) > TOP:
        pieces.append(paragraph(f"The {TOP} tokens felt most of {felt.position + 1}."))
    if found.bound is None:
        pieces.append(paragraph(f"The over-squashing bound was not computed: {found.missing['bound']}."))
    elif found.correlation:
        numbers = {"theorem": "the theorem's constants", "token": "each token's own constants"}
        beside = " and ".join(f"{value:.2f} with {numbers[which]}" for which, value in found.correlation.items())
        pieces.append(paragraph(f"Rank correlation (Spearman) of the over-squashing bound with these sensitivities: {beside}."))
    pieces += [paragraph(f"{note[0].upper()}{note[1:]}.") for note in felt.notes]
    return joined(pieces)


def critical_table(found: Propagation) -> Markup:
    """Critical lengths and decay in every precision and layer.

    Args:
        found: With at least one critical length.
    """
    rows = []
    for critical in found.critical_lengths:
        decay = found.curve.decay(critical.measured, metric=critical.metric, layer=critical.layer)
        rows.append(
            {
                "dtype": critical.dtype,
                "measured": critical.measured,
                "layer": layer_name(critical.layer),
                "epsilon": critical.epsilon,
                "below": length_text(critical.below_epsilon, critical.longest),
                "equal": length_text(critical.equal, critical.longest),
                "exponent": _fitted(decay.exponent, decay.standard_error),
            }
        )
    columns = {
        "dtype": "precision",
        "measured": "distances of the run in",
        "layer": "layer",
        "epsilon": "machine epsilon ε",
        "below": "below ε from length",
        "equal": "equal to the bit at length",
        "exponent": "exponent of the decay",
    }
    return table(pd.DataFrame(rows), columns, digits=3)


def _what(found: Propagation) -> str:
    curve = found.curve
    made = PROBES[curve.probe["name"]].split(";")[0]
    second = "its last element stands once more" if curve.probe["contrast"] == "repeated" else "the digit to be copied is another"
    every = curve.probe["separator_every"]
    separated = f", a separator after every {every} elements" if every else ""
    run = "The model was really run in each precision" + (", what sequences share once." if curve.shared else ".")
    return (
        f"{metric_name(curve.metrics[0])} between the last tokens of two sequences: {made}{separated}, and the same where {second}. Where nothing is left "
        f"of it, the model cannot tell the sequences apart. {run}"
    )


_CRITICAL_TEXT = (
    "From which length on all pairs stay closer than the machine epsilon of the precision, and the first length at which they are equal to the "
    "last bit. In a coarse precision what is left may be rounding, so the distances of the finest run are held against its epsilon, too. The decay is a power law, fitted from the "
    "curve's peak on to lengths at which the distance is well above machine epsilon, at least three."
)


def _fitted(value: float, error: float) -> str:
    """An exponent that two points alone would give has no error, and is not shown."""
    if math.isnan(error):
        return "–"
    return f"{value:.2f}".replace("-", "−") + f"\u00a0±\u00a0{error:.2f}"
