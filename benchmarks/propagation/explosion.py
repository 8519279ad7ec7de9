"""What a high-norm first token has to do with collapse and over-squashing: the shipped model, and the same with stronger outliers.

    python -m benchmarks.propagation.explosion [--controls 20] [--threads 1] [--write]

1. Collapse with and without the explosion subspace (block 2, rank 2), beside random displacements of the same tokens by the same lengths.
   Relative distance of the last tokens after the final norm, float32. Two edits: the trigger, taken out of what the FFN reads at BOS, and trigger
   and direction, taken out of all tokens. What lies outside the range of all controls is marked with ``*``.
2. Sensitivity of the last token of the six built-in texts to BOS and to the others, per unit and relative to their length, by block.
3. The same without the explosion subspace, beside five controls.
4. The bound against the truth: rank correlation over tokens, and how far above it lies.
5. Answers to probes.

``--write`` saves the tables as benchmarks/results/explosion.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine
from sd_lens.interventions.intervention import Intervention
from sd_lens.interventions.subspace import ExplosionSubspace
from sd_lens.models.amplified import amplified
from sd_lens.models.files import write_text
from sd_lens.models.loading import load
from sd_lens.propagation.answering import answer_probes
from sd_lens.propagation.collapse import collapse_curve
from sd_lens.propagation.probes import probe
from sd_lens.propagation.sensitivity import sensitivity
from sd_lens.propagation.sensitivity_result import Sensitivity
from sd_lens.propagation.squashing import squashing_bound
from sd_lens.propagation.squashing_result import Which
from sd_lens.tracing.prompts import default_prompts

RESULTS = Path(__file__).parent.parent / "results" / "explosion.md"
BLOCK, RANK = 2, 2
LENGTHS = (8, 16, 32, 64, 100)
PROBES = ("repeat-last", "bernoulli", "count-ones", "sum")
SENSITIVITY_CONTROLS = 5


def edits_of(model: Any) -> dict[str, Intervention]:
    """The two edits."""
    subspace = ExplosionSubspace.at(model, BLOCK, rank=RANK)
    return {
        "trigger, at BOS": subspace.ablate(side="trigger", positions="initial"),
        "trigger and direction, all tokens": subspace.ablate(side="both"),
    }


def _distances(model: Any, name: str, edit: Intervention | None) -> tuple[Tensor, float]:
    curve = collapse_curve(model, name, LENGTHS, metrics="relative", dtypes="float32", intervention=edit, progress=False)
    return curve.values["float32", "final", "relative"].mean((0, 2)), curve.decay(start=LENGTHS[0]).exponent


def _beside(value: float, controls: Iterable[float], digits: str = ".3g") -> str:
    low, high = min(kept := list(controls)), max(kept)
    mark = "" if low <= value <= high else "*"
    return f"{value:{digits}}{mark} ({low:{digits}} to {high:{digits}})"


def collapse_table(models: Sequence[Any], controls: int) -> str:
    """Distances and exponents with and without the subspace, as Markdown."""
    lines = [
        f"| model | probe | taken out | {' | '.join(f'n = {length}' for length in LENGTHS)} | exponent |",
        "|---|---|---|" + "--:|" * (len(LENGTHS) + 1),
    ]
    for model in models:
        for name in PROBES:
            values, exponent = _distances(model, name, None)
            cells = [f"{value:.3g}" for value in values.tolist()]
            lines.append(f"| {model.cfg.model_name} | {name} | nothing | {' | '.join(cells)} | {exponent:.2f} |")
            for title, edit in edits_of(model).items():
                values, exponent = _distances(model, name, edit)
                others = [_distances(model, name, edit.control(seed)) for seed in range(controls)]
                columns = torch.stack([other[0] for other in others]).T.tolist()
                cells = [_beside(value, column) for value, column in zip(values.tolist(), columns, strict=True)]
                slope = _beside(exponent, (other[1] for other in others), ".2f")
                lines.append(f"| {model.cfg.model_name} | {name} | {title} | {' | '.join(cells)} | {slope} |")
    return "\n".join(lines)


def _ratio(felt: Sensitivity, norms: Tensor, source: int) -> float:
    """BOS against the median of the other tokens but the last."""
    return float(norms[source, 0] / norms[source, 1 : felt.position].median())


def sensitivity_table(models: Sequence[Any]) -> str:
    """What the last token feels of BOS, block by block, as Markdown."""
    blocks = range(int(models[0].cfg.n_layers))
    lines = [f"| model | | {' | '.join(f'into block {block}' for block in blocks)} |", "|---|---|" + "--:|" * len(blocks)]
    for model in models:
        felt = [
            sensitivity(model, text, sources=tuple(blocks), norms=("frobenius",), progress=False) for text in default_prompts(model)
        ]
        rows = {
            "norm of BOS ÷ median": [
                [float(one.stream_norm[b, 0] / one.stream_norm[b, 1:].median()) for one in felt] for b in blocks
            ],
            "felt per unit, BOS ÷ median": [[_ratio(one, one.frobenius, b) for one in felt] for b in blocks],
            "felt per share of the length, BOS ÷ median": [[_ratio(one, one.relative, b) for one in felt] for b in blocks],
            "share of the last token itself": [[float(one.share[b, one.position]) for one in felt] for b in blocks],
        }
        for title, columns in rows.items():
            cells = [f"{sum(column) / len(column):.2g} ({min(column):.2g} to {max(column):.2g})" for column in columns]
            lines.append(f"| {model.cfg.model_name} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def without_table(models: Sequence[Any]) -> str:
    """Sensitivity to BOS' embedding with and without the subspace, as Markdown: means over the texts."""
    lines = ["| model | taken out | norm for BOS | root of the sum of squares over all tokens |", "|---|---|--:|--:|"]
    for model in models:

        def measured(edit: Intervention | None, model: Any = model) -> tuple[float, float]:
            felt = [
                sensitivity(model, text, norms=("frobenius",), intervention=edit, progress=False).frobenius[0]
                for text in default_prompts(model)
            ]
            return sum(float(one[0]) for one in felt) / len(felt), sum(float(one.norm()) for one in felt) / len(felt)

        first, whole = measured(None)
        lines.append(f"| {model.cfg.model_name} | nothing | {first:.2f} | {whole:.1f} |")
        for title, edit in edits_of(model).items():
            first, whole = measured(edit)
            others = [measured(edit.control(seed)) for seed in range(SENSITIVITY_CONTROLS)]
            cells = [_beside(first, (other[0] for other in others), ".2f"), _beside(whole, (other[1] for other in others), ".1f")]
            lines.append(f"| {model.cfg.model_name} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bound_table(model: Any) -> str:
    """Rank correlation of bounds and true norms, and orders of magnitude between them, as Markdown."""
    blocks = tuple(range(int(model.cfg.n_layers)))
    felt = [(text, sensitivity(model, text, sources=blocks, progress=False)) for text in default_prompts(model)]
    columns = [
        *(f"correlation, into block {block}" for block in blocks),
        *(f"orders above the truth, into block {block}" for block in (0, 3, 5)),
    ]
    lines = [f"| bound | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    ones: dict[str, Any] = {"beta1": 1.0, "beta2": 1.0, "beta3": 1.0, "sigma_psi": 1.0}
    bounds: tuple[tuple[str, Which, dict[str, Any]], ...] = (
        ("mean over heads", "theorem", {}),
        ("largest head", "theorem", {"heads": "max"}),
        ("constants of every token", "token", {"heads": "weighted"}),
        ("all constants 1", "theorem", ones),
    )
    for title, which, options in bounds:
        pairs = [(squashing_bound(model, text, progress=False, **options), one) for text, one in felt]
        correlations = torch.stack([bound.correlation(one, norm="spectral", which=which) for bound, one in pairs])
        cells = [f"{column.mean():.2f} ({column.amin():.2f} to {column.amax():.2f})" for column in correlations.T]
        slack = [bound.log10_slack(one, which=which) for bound, one in pairs]
        for block in (0, 3, 5):
            least, most = (f([float(f(row[block].tolist())) for row in slack]) for f in (min, max))
            cells.append(f"{least:.1f} to {most:.1f}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def answer_table(model: Any) -> str:
    """Answers to probes, as Markdown."""
    lines = ["| probe | contrast | question | right | mean absolute error |", "|---|---|---|--:|--:|"]
    for name, contrast in (("copy-first", "changed"), ("copy-last", "changed"), ("count-ones", "repeated"), ("sum", "repeated")):
        for template in (False, True):
            one = probe(model, name, contrast=contrast, template=template)  # pyright: ignore[reportArgumentType]
            found = answer_probes(model, one, [1, 2, 4, 8, 16, 32], progress=False)
            right = sum(row.correct for row in found.rows)
            error = sum(row.absolute_error for row in found.rows) / len(found.rows)
            lines.append(f"| {name} | {contrast} | {'yes' if template else 'no'} | {right} of {len(found.rows)} | {error:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints, and saves where asked to."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.propagation.explosion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--controls", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help=f"save the tables as {RESULTS.name}")
    options = parser.parse_args()
    if min(options.controls, options.threads) < 1:
        parser.error("allowed: --controls at least 1, --threads at least 1")
    torch.set_num_threads(options.threads)
    models = [load("tiny"), amplified().model]
    parts = [
        "# Information propagation and the explosion",
        f"By `python -m benchmarks.propagation.explosion`, {date.today()}; see there for what is measured.",
        f"{machine(options.threads, 'cpu')}. {options.controls} controls.",
    ]
    for title, make in (
        ("Answers (tiny)", lambda: answer_table(models[0])),
        ("Sensitivity to BOS", lambda: sensitivity_table(models)),
        ("The bound against the truth (tiny, spectral norms)", lambda: bound_table(models[0])),
        ("Sensitivity to BOS' embedding without the explosion subspace", lambda: without_table(models)),
        ("Collapse without the explosion subspace", lambda: collapse_table(models, options.controls)),
    ):
        parts += [f"## {title}", make()]
        print("\n\n".join(parts[-2:]), flush=True)
    if options.write:
        write_text("\n\n".join(parts) + "\n", RESULTS)


if __name__ == "__main__":
    main()
