"""What was measured, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.linear.checkpoint import CheckpointRun
from benchmarks.linear.ours import ATTENTION, LINEARIZE, Ours
from benchmarks.linear.pair import Pair
from benchmarks.linear.paths import Found


def path_tables(pairs: Sequence[Pair]) -> str:
    """All that was measured of the paths."""
    parts = [
        _summary(pairs),
        *filter(None, [_marks(pairs)]),
        "Sampled path by stage:",
        sampled_stages(pairs),
        "Our path by stage:",
        our_stages(pairs),
        "What limits ours:",
        "\n".join(f"- {pair.name}: {_limits(pair.ours)}" for pair in pairs),
        "What both found (planted: a direction; its angle to a random vector is near 90°):",
        agreement(pairs),
    ]
    return "\n\n".join(parts)


def checkpoint_table(run: CheckpointRun) -> str:
    """What was measured of the command."""
    best = run.best
    found = "found" if best["block"] == run.planted else f"NOT found (block {best['block']} instead)"
    rows = [
        ["blocks", str(run.blocks)],
        ["widths", f"d_model {run.shape.d_model}, d_mlp {run.shape.d_mlp}"],
        ["on disk", f"{_bytes(run.folder_bytes)} in {run.files} files, bfloat16"],
        ["time", f"{_seconds(run.seconds)}, of which {_seconds(run.seconds / run.blocks)} per block, start-up included"],
        ["peak resident memory", _bytes(run.peak)],
        ["interpreter and libraries", _bytes(run.baseline)],
        ["peak beyond these", _bytes(run.peak - run.baseline)],
        [f"block {run.planted}, where the defect was planted", f"{found}, σ1 {best['sigma1']:.4g}, σ2 {best['sigma2']:.4g}"],
    ]
    return _table(["`sd-lens spectrum` on a checkpoint", ""], rows)


def sampled_stages(pairs: Sequence[Pair]) -> str:
    """Time of the sampled path by stage."""
    rows = [
        [name, *(_mark(_seconds(pair.sampled.seconds[name]), pair.sampled.extrapolated(name)) for pair in pairs)]
        for name in pairs[0].sampled.seconds
    ]
    return _table(["stage", *(pair.name for pair in pairs)], rows)


def our_stages(pairs: Sequence[Pair]) -> str:
    """Time of our path by stage, also as reads of the weights and products."""

    def cell(ours: Ours, name: str) -> str:
        text = f"{_seconds(ours.seconds[name])} = {ours.seconds[name] / ours.product:.1f} reads"
        if name not in ours.products:
            return text
        return f"{text}, {ours.products[name]} products ({100 * ours.in_products[name]:.0f} %)"

    rows = [[name, *(cell(pair.ours, name) for pair in pairs)] for name in pairs[0].ours.seconds]
    rows.append(["one read", *(_seconds(pair.ours.product) for pair in pairs)])
    return _table(["stage (in brackets: time inside products)", *(pair.name for pair in pairs)], rows)


def agreement(pairs: Sequence[Pair]) -> str:
    """The numbers of both paths side by side."""
    numbers: dict[str, Callable[[Found], str]] = {
        "σ1 of I + A": lambda found: f"{found.sigma1[0]:.5g}",
        "σ1 of I + F": lambda found: f"{found.sigma1[1]:.5g}",
        "σ1 of L": lambda found: f"{found.sigma1[2]:.5g}",
        "angle of its u1 to planted, I + F": lambda found: f"{found.angle_deg[1]:.3f}°",
        "angle of its u1 to planted, L": lambda found: f"{found.angle_deg[2]:.3f}°",
        "eigenvalue of R": lambda found: _complex(found.eigenvalue),
        "angle of its eigenvector to planted": lambda found: f"{found.eigenvector_angle_deg:.3f}°",
    }
    columns = {}
    for pair in pairs:
        columns[f"{pair.name} sampled" + _samples(pair)] = pair.sampled.found
        columns[f"{pair.name} ours"] = pair.ours.found
    rows = [[name, *("not run" if found is None else show(found) for found in columns.values())] for name, show in numbers.items()]
    return _table(["", *columns], rows)


def _summary(pairs: Sequence[Pair]) -> str:
    rows = []
    for pair in pairs:
        sampled, ours = pair.sampled, pair.ours
        marked = sampled.fewer or sampled.partly
        row = [
            pair.name,
            _mark(_seconds(sampled.total), marked),
            _seconds(ours.total),
            _mark(f"{sampled.total / ours.total:.0f}×", marked),
            _mark(_bytes(sampled.peak), marked),
            _bytes(ours.peak),
            _mark(f"1/{sampled.peak / max(ours.peak, 1):.0f}", marked),
            f"{sampled.fit_error:.2g}" + _samples(pair),
            f"{ours.fit_error:.1g}",
            f"{ours.reads:.1f}",
        ]
        rows.append(row)
    times, memory = ["sampled", "ours", "faster"], ["sampled peak", "our peak", "share"]
    return _table(["block of a", *times, *memory, "error of Ã, sampled", "ours", "weight reads"], rows)


def _marks(pairs: Sequence[Pair]) -> str:
    lines = []
    for pair in pairs:
        sampled = pair.sampled
        if sampled.fewer:
            few, more = sampled.run_with
            lines.append(f"≈ {pair.name}: {sampled.samples} samples extrapolated from {few} and {more} samples, which were run.")
        if sampled.partly:
            lines.append(f"≈ {pair.name}: decompositions extrapolated as the cube of the width from {sampled.decomposed}.")
    return "\n".join(lines)


def _limits(ours: Ours) -> str:
    in_products = sum(ours.in_products[name] * ours.seconds[name] for name in ours.products)
    pace = ", so memory sets the pace" if ours.product < 1.5 * ours.plain_read else ", which these products fall short of"
    return (
        f"{100 * in_products / ours.total:.0f} % of the time is inside {sum(ours.products.values())} products with vectors. One with the "
        f"block's map reads {_bytes(ours.weight_bytes)} at {ours.weight_bytes / ours.product / 1e9:.3g} GB/s; a plain sum over a weight "
        f"matrix runs at {ours.weight_bytes / ours.plain_read / 1e9:.3g} GB/s{pace}. Linearising takes "
        f"{ours.seconds[LINEARIZE] / ours.product:.1f} reads: a look for NaNs, two passes over the FFN's input weights, and the neurons' "
        f"integrals. I + A, which has no defect and whose largest singular value hardly stands out, takes {ours.products[ATTENTION]} of "
        f"the products, {ours.seconds[ATTENTION] / ours.product:.1f} reads. On a block in which nothing was planted no singular value "
        f"stands out and no eigenvector is near the direction: there our path takes {_seconds(ours.without_defect[0])} = "
        f"{ours.without_defect[0] / ours.product:.0f} reads, {ours.without_defect[1]} products (the sampled path: as long as with it)."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The columns padded so that it also reads as text."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


def _mark(text: str, extrapolated: bool) -> str:
    return f"≈ {text}" if extrapolated else text


def _samples(pair: Pair) -> str:
    return f" ({pair.sampled.run_with[-1]} samples)" if pair.sampled.fewer else ""


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _bytes(value: float) -> str:
    return f"{value / 1e9:.3g} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"


def _complex(value: complex) -> str:
    real = abs(value.imag) < 1e-5 * abs(value.real)
    return f"{value.real:.5g}" if real else f"{value.real:.5g} ± {abs(value.imag):.3g}i"
