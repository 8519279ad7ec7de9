"""Collapse on the shipped model and on a random one of the same architecture, in float32 and bfloat16: figure and tables.

    python -m benchmarks.propagation.collapse [--longest 8189] [--seed 0] [--threads 1] [--write]

The probes ``"repeat-last"`` (1…1 0 beside 1…1 0 0) and ``"count-ones"`` (1…1 beside one more), built from tokens; BOS in front. The shipped
model up to its context of 512 tokens; the random one, drawn as transformers initialises the shipped model's configuration (standard
deviation 0.02), with a context of 8192. Distances are of the last token's representation after the final norm: the length of the difference
relative to the length of the vector (``relative``), which a dtype's machine epsilon can be held against whatever the vector's length, and the
largest difference of a coordinate (``linf``).

``--write`` saves the tables as benchmarks/results/collapse.md and the figure as docs/figures/collapse.svg (which needs Chromium).
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from sd_lens.models.files import write_text
from sd_lens.models.loading import TINY, load
from sd_lens.propagation.collapse import collapse_curve, default_lengths
from sd_lens.propagation.critical import critical_length
from sd_lens.propagation.curve import CollapseCurve
from sd_lens.propagation.mitigations import mitigations
from sd_lens.propagation.probes import probe

RESULTS = Path(__file__).parent.parent / "results" / "collapse.md"
FIGURE = Path(__file__).parent.parent.parent / "docs" / "figures" / "collapse.svg"
PROBES = ("repeat-last", "count-ones")
DTYPES = ("float32", "bfloat16")
SHOWN = (1, 8, 64, 128, 256, 512, 1024, 2048, 4096)
FIT_FROM = 16


def untrained(*, seed: int = 0, context: int = 8192) -> Any:
    """The shipped model's architecture and tokenizer with random weights.

    Args:
        seed: Of the weights.
        context: Longest sequence.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(TINY)
    config.max_position_embeddings = context
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float().eval()
        bridge = build_bridge_from_module(
            model,
            architecture="LlamaForCausalLM",
            hf_config=config,
            tokenizer=AutoTokenizer.from_pretrained(TINY),
            model_name=f"random {seed}",
        )
    bridge.eval()
    return bridge


def curves_of(model: Any, longest: int) -> list[CollapseCurve]:
    """The curve of each probe, at the default lengths and the longest that fits."""
    found = []
    for name in PROBES:
        one = probe(model, name)
        last = min(longest, int(model.cfg.n_ctx) - one.longest([1]) + 1)
        lengths = sorted({last, *(length for length in (*default_lengths(model, one), *SHOWN) if length < last)})
        found.append(collapse_curve(model, one, lengths, metrics=("relative", "linf"), dtypes=DTYPES, progress=False))
    return found


def distance_table(curves: list[CollapseCurve]) -> str:
    """Relative distances at some lengths, as Markdown."""
    last = max(curve.lengths[-1] for curve in curves)
    shown = sorted({*SHOWN, last})
    lines = [
        f"| model | probe | dtype | {' | '.join(f'n = {length}' for length in shown)} |",
        "|---|---|---|" + "--:|" * len(shown),
    ]
    for curve in curves:
        for dtype in DTYPES:
            values = dict(zip(curve.lengths, curve.values[dtype, "final", "relative"].mean((0, 2)).tolist(), strict=True))
            cells = [f"{values[length]:.2g}" if length in values else "" for length in shown]
            lines.append(f"| {curve.model_name} | {curve.probe['name']} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def critical_table(curves: list[CollapseCurve]) -> str:
    """Critical lengths and exponents, as Markdown."""
    measures = [("relative", None), ("relative", "float32"), ("linf", None), ("linf", "float32")]
    names = [f"{metric}, {'its own run' if by is None else 'by the float32 run'}" for metric, by in measures]
    lines = [
        f"| model | probe | dtype | epsilon | {' | '.join(names)} | equal to the bit | longest n | exponent from n = {FIT_FROM} |",
        "|---|---|---|--:|" + "--:|" * (len(names) + 3),
    ]
    for curve in curves:
        for dtype in DTYPES:
            found = [critical_length(curve, dtype, metric=metric, measured=by) for metric, by in measures]
            lengths = [*(one.below_epsilon for one in found), found[0].equal]
            # In half precision hardly any length is above epsilon, and those near it are half rounding.
            fit = curve.decay(dtype, metric="relative", start=FIT_FROM) if dtype == "float32" else ""
            cells = [
                curve.model_name,
                curve.probe["name"],
                dtype,
                f"{found[0].epsilon:.2g}",
                *("none" if length is None else str(length) for length in lengths),
                str(curve.lengths[-1]),
                str(fit),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mitigation_table(model: Any) -> str:
    """Separators and precision on the shipped model, as Markdown: means of three lengths, which end a group of three, or one or two before."""
    groups = ((1, 2, 3), (22, 23, 24), (94, 95, 96), (253, 254, 255))
    lines = [
        f"| probe | separator | dtype | {' | '.join(f'n = {group[0]} to {group[-1]}' for group in groups)} |",
        "|---|---|---|" + "--:|" * len(groups),
    ]
    lengths = [length for group in groups for length in group]
    for name in PROBES:
        found = mitigations(model, name, lengths, every=(3, 1), dtypes=DTYPES, metric="relative", progress=False)
        for setting in found.settings:
            every = "none" if setting.separator_every is None else f"every {setting.separator_every}"
            for dtype in DTYPES:
                values = setting.curve.values[dtype, "final", "relative"].mean((0, 2)).view(len(groups), -1)
                rows = zip(values.mean(1).tolist(), values.amin(1).tolist(), values.amax(1).tolist(), strict=True)
                cells = [f"{mean:.2g} ({low:.2g} to {high:.2g})" for mean, low, high in rows]
                lines.append(f"| {name} | {every} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure_of(curves: list[CollapseCurve]) -> Any:
    """Relative distance over length: a panel per model, a colour per dtype, a dash per probe."""
    from plotly.subplots import make_subplots

    from sd_lens.display.style import BLUE, ORANGE, TEMPLATE

    names = list(dict.fromkeys(curve.model_name for curve in curves))
    figure = make_subplots(1, len(names), shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=names)
    for curve in curves:
        column = names.index(curve.model_name) + 1
        for dtype, colour in zip(DTYPES, (BLUE, ORANGE), strict=True):
            label = f"{curve.probe['name']}, {dtype}"
            figure.add_scatter(
                x=list(curve.lengths),
                y=curve.values[dtype, "final", "relative"].mean((0, 2)).tolist(),
                mode="lines",
                line={"color": colour, "dash": "solid" if curve.probe["name"] == PROBES[0] else "dot", "width": 2},
                name=label,
                legendgroup=label,
                showlegend=column == 1,
                row=1,
                col=column,
            )
        epsilon = torch.finfo(torch.bfloat16).eps
        ends = [curve.lengths[0], curve.lengths[-1]]
        figure.add_scatter(
            x=ends,
            y=[epsilon] * 2,
            mode="lines",
            line={"color": ORANGE, "dash": "dash", "width": 1},
            showlegend=False,
            row=1,
            col=column,
        )
    figure.update_xaxes(type="log", title_text="n, digits of the shorter input", dtick=1)
    figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    figure.update_layout(
        template=TEMPLATE,
        title={"text": "Last tokens of two inputs come together", "subtitle": {"text": "dashed: machine epsilon of bfloat16"}},
        yaxis_title_text="distance, relative to the vector's length",
        legend={"y": 1.1},
        margin={"t": 130},
        height=460,
    )
    return figure


def svg_of(figure: Any) -> str:
    """The figure drawn by Chromium."""
    from notebooks.publishing.pictures import PLOTLY, draw_outputs

    bundle = {PLOTLY: json.loads(figure.to_json()), "text/plain": ""}
    draw_outputs([{"data": bundle}])
    return bundle["image/svg+xml"]


def main() -> None:
    """Measures, prints, and saves where asked to."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.propagation.collapse", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--longest", type=int, default=8189)
    parser.add_argument("--seed", type=int, default=0, help="of the random model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help=f"save {RESULTS.name} and {FIGURE.name}")
    options = parser.parse_args()
    if not (FIT_FROM < options.longest <= 8189 and options.threads >= 1):
        parser.error(f"allowed: --longest {FIT_FROM + 1} to 8189, --threads at least 1")
    torch.set_num_threads(options.threads)
    tiny = load("tiny")
    curves = [curve for model in (tiny, untrained(seed=options.seed)) for curve in curves_of(model, options.longest)]
    parts = [
        "# Collapse",
        f"By `python -m benchmarks.propagation.collapse`, {date.today()}; see there for what is measured.",
        f"{machine(options.threads, 'cpu')}.",
        "## Relative distance",
        distance_table(curves),
        "## Critical lengths",
        critical_table(curves),
        "## What helps (tiny, relative distance)",
        mitigation_table(tiny),
    ]
    print("\n\n".join(parts))
    if options.write:
        write_text("\n\n".join(parts) + "\n", RESULTS)
        FIGURE.parent.mkdir(exist_ok=True)
        write_text(svg_of(figure_of(curves)), FIGURE)


if __name__ == "__main__":
    main()
