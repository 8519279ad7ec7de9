"""What a sweep of patches costs: `patch_sweep` against TransformerLens' `generic_activation_patch` over the same cells.

    python -m benchmarks.patching [--models tiny,random] [--rounds 3] [--threads 1] [--write]

One pair of prompts, which differ in the first token; every block and every position; the component along one vector of the stream that a
block leaves, taken from the clean run. Variants, in another order every round; the fastest round of each counts:

- ``generic_activation_patch``: with a ``patch_setter`` that takes the component; the metric is a function of logits. Without gradients, its
  progress bar not shown, the clean run's cache included;
- ``patch_sweep``: the same cells, the same function of logits;
- ``patch_sweep, norms``: the same cells, judged by the largest norm, so that no logits are made;
- ``patch_sweep, 5 controls``: the same function of logits, and five random displacements of every cell: six times the runs.

Before anything is timed, the first two must give the same numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.machine import machine
from benchmarks.models import random_llama, text_windows
from sd_lens.interventions.patching import patch_sweep
from sd_lens.interventions.subspace import ExplosionSubspace
from sd_lens.models.files import write_text
from sd_lens.models.loading import load

RESULTS = Path(__file__).parent / "results" / "patching.md"
SAME = 1e-4  # relative difference between the first two variants


@dataclass(frozen=True)
class Case:
    """A model, a pair of prompts and a subspace.

    Attributes:
        model: The model.
        clean: The clean prompt.
        corrupted: The corrupted one.
        subspace: The subspace.
    """

    model: Any
    clean: Tensor
    corrupted: Tensor
    subspace: ExplosionSubspace


BUILDS: dict[str, tuple[Callable[[], Any], Sequence[int]]] = {
    "tiny": (lambda: load("tiny"), (12, 40)),
    "random": (lambda: random_llama(d_model=256, n_blocks=8, d_vocab=8192), (40,)),
}


def case_of(model: Any, length: int) -> Case:
    """A window of text that begins with BOS (id 1), and the same that begins with another token."""
    clean = text_windows(model, n_tokens=length, lengths=(length,))[0].unsqueeze(0)
    clean[0, 0] = 1
    corrupted = clean.clone()
    corrupted[0, 0] = 5
    return Case(model, clean, corrupted, ExplosionSubspace.at(model, 2))


def one_logit(logits: Tensor) -> Tensor:
    """A metric that costs next to nothing."""
    return logits[:, -1, 300].mean()


def theirs(case: Case) -> Tensor:
    """By `generic_activation_patch`."""
    from transformer_lens.patching import generic_activation_patch

    vectors = case.subspace.left

    def take(activation: Tensor, index: Sequence[int], source: Any) -> Tensor:
        pos = index[1]
        activation = activation.clone()
        activation[:, pos] += (source[:, pos] - activation[:, pos]) @ vectors @ vectors.T
        return activation

    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        _, cache = case.model.run_with_cache(case.clean, names_filter=lambda name: name.endswith("hook_resid_post"))
        return generic_activation_patch(
            case.model, case.corrupted, cache, one_logit, take, "resid_post", index_axis_names=["layer", "pos"]
        )


def ours(case: Case, metric: Any = one_logit, controls: int = 0) -> Tensor:
    """By `patch_sweep`."""
    options: dict[str, Any] = {"subspace": case.subspace, "side": "direction", "progress": False}
    return patch_sweep(case.model, case.clean, case.corrupted, metric=metric, controls=controls, **options).values


VARIANTS: dict[str, Callable[[Case], Tensor]] = {
    "generic_activation_patch": theirs,
    "patch_sweep": ours,
    "patch_sweep, norms": lambda case: ours(case, "peak_norm"),
    "patch_sweep, 5 controls": lambda case: ours(case, controls=5),
}


def _times(case: Case, rounds: int) -> dict[str, float]:
    wanted, got = theirs(case), ours(case)
    worst = float((got - wanted).abs().max() / wanted.abs().max())
    if worst > SAME:
        raise AssertionError(f"the two sweeps differ by {worst:.2g}")
    best = dict.fromkeys(VARIANTS, float("inf"))
    names = list(VARIANTS)
    for turn in tqdm(range(rounds), desc="rounds", leave=False):
        # Who goes first pays for memory that the others find ready, so everybody does once.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            VARIANTS[name](case)
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def time_table(names: Sequence[str], rounds: int) -> str:
    """Times and ratios, as Markdown."""
    lines = [
        "| model | tokens | cells | " + " | ".join(f"`{name}`" if "," not in name else name for name in VARIANTS) + " | "
        "`generic_activation_patch` ÷ `patch_sweep` | ÷ norms | ÷ 5 controls |",
        "|---|" + "--:|" * (len(VARIANTS) + 5),
    ]
    for name in names:
        build, lengths = BUILDS[name]
        model = build()
        for length in lengths:
            times = list(_times(case_of(model, length), rounds).values())
            cells = [
                model.cfg.model_name,
                str(length),
                str(length * model.cfg.n_layers),
                *map(_seconds, times),
                *(f"{times[0] / other:.2f}" for other in times[1:]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def main() -> None:
    """Measures, prints, and saves where asked to."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.patching", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="tiny,random", help=f"any of {', '.join(BUILDS)}, with commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help=f"save the table as {RESULTS.name}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = options.models.split(",")
    unknown = [name for name in names if name not in BUILDS]
    if unknown or options.rounds < 1:
        parser.error(f"--models, --rounds: got {options.models}, {options.rounds}; allowed: {', '.join(BUILDS)}; at least 1")
    parts = [
        "# Sweeps of patches",
        f"By `python -m benchmarks.patching`, {date.today()}; see there for what is measured.",
        f"{machine(options.threads, 'cpu')}.",
        time_table(names, options.rounds),
    ]
    print("\n\n".join(parts))
    if options.write:
        RESULTS.parent.mkdir(exist_ok=True)
        write_text("\n\n".join(parts) + "\n", RESULTS)


if __name__ == "__main__":
    main()
