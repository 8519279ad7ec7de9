"""What sensitivities cost: `sensitivity` against `torch.autograd.functional.jacobian`, time and memory.

    python -m benchmarks.propagation.jacobian [--tokens 32,128] [--rounds 3] [--threads 1] [--write]

A random Llama; the Jacobian of the last token's output with respect to every token's embedding, and of each token's part both norms.
Variants:

- ``jacobian``: `torch.autograd.functional.jacobian`, row by row, and the norms of what it gives;
- ``vectorised``: the same with ``vectorize=True``: all rows at once;
- ``sensitivity``: both norms, exact, high-norm tokens and sinks included;
- ``frobenius only``: Frobenius norms, exact;
- ``estimated``: Frobenius norms from 32 random probes.

Every variant runs in a process of its own: first a short prompt, then the fastest of some rounds, whose largest memory beyond that before
counts. All exact ones must give the same numbers.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.memory import PeakMemory
from benchmarks.models import random_llama, text_windows
from sd_lens.models.files import write_text
from sd_lens.propagation.sensitivity import sensitivity

RESULTS = Path(__file__).parent.parent / "results" / "jacobian.md"
SAME = 1e-4  # relative difference between exact norms
SIZE: dict[str, int] = {"d_model": 256, "n_blocks": 6, "d_vocab": 1024}
MIB = 2**20


def by_torch(model: Any, tokens: Tensor, of: str, *, vectorize: bool) -> tuple[Tensor, Tensor]:
    """Frobenius and spectral norms from the whole Jacobian."""
    seen: dict[str, Tensor] = {}

    def output(moved: Tensor) -> Tensor:
        hooks = [
            ("blocks.0.hook_resid_pre", lambda stream, hook: stream + moved),
            ("unembed.hook_in", lambda stream, hook: seen.update(final=stream)),
        ]
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits")
        return (logits if of == "logits" else seen["final"])[0, -1]

    zero = torch.zeros(1, tokens.shape[1], model.cfg.d_model)
    whole: Any = torch.autograd.functional.jacobian(output, zero, vectorize=vectorize)
    matrices = whole[:, 0].transpose(0, 1)
    return matrices.flatten(1).norm(dim=1), torch.stack([torch.linalg.matrix_norm(matrix, ord=2) for matrix in matrices])


def ours(model: Any, tokens: Tensor, of: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The same by `sensitivity`."""
    found = sensitivity(model, tokens, of=of, progress=False, **options)
    return found.frobenius[0], found.spectral[0]


VARIANTS: dict[str, Callable[[Any, Tensor, str], tuple[Tensor, Tensor]]] = {
    "jacobian": lambda model, tokens, of: by_torch(model, tokens, of, vectorize=False),
    "vectorised": lambda model, tokens, of: by_torch(model, tokens, of, vectorize=True),
    "sensitivity": ours,
    "frobenius only": lambda model, tokens, of: ours(model, tokens, of, norms=("frobenius",)),
    "estimated": lambda model, tokens, of: ours(model, tokens, of, method="hutchinson"),
}


def measure(variant: str, of: str, n_tokens: int, rounds: int, threads: int) -> tuple[float, int, list[float], list[float]]:
    """Seconds, bytes and norms of one variant, in a fresh process."""
    torch.set_num_threads(threads)
    model = random_llama(**SIZE)
    tokens = text_windows(model, n_tokens=n_tokens, lengths=(n_tokens,))[0].unsqueeze(0)
    run = VARIANTS[variant]
    run(model, tokens[:, :2], "final")
    best, peak, norms = float("inf"), 0, (torch.zeros(0), torch.zeros(0))
    for number in range(rounds):
        gc.collect()
        with PeakMemory() as memory:
            start = time.perf_counter()
            norms = run(model, tokens, of)
            best = min(best, time.perf_counter() - start)
        if number == 0:  # later rounds find memory that the first has not given back
            peak = memory.beyond
    return best, peak, norms[0].tolist(), norms[1].tolist()


def table(lengths: Sequence[int], rounds: int, threads: int) -> str:
    """Times, memory and their ratios to the first variant's, as Markdown."""
    lines = [
        "| output | tokens | variant | products | time | memory | time of `jacobian` ÷ this | memory of `jacobian` ÷ this | largest difference |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for of in ("final", "logits"):
        for length in lengths:
            lines += _rows(of, length, rounds, threads)
    return "\n".join(lines)


def _rows(of: str, length: int, rounds: int, threads: int) -> list[str]:
    lines, first = [], None
    width = {"final": SIZE["d_model"], "logits": SIZE["d_vocab"]}[of]
    for variant in VARIANTS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, memory, *norms = pool.apply(measure, (variant, of, length, rounds, threads))
        first = first or (seconds, memory, norms)
        worst = max(
            abs(a - b) / b
            for mine, theirs in zip(norms, first[2], strict=True)
            for a, b in zip(mine, theirs, strict=True)
            if a == a
        )
        if variant != "estimated" and worst > SAME:
            raise AssertionError(f"{variant} differs from jacobian by {worst:.2g}")
        products = {"jacobian": width, "vectorised": width, "estimated": 32}.get(variant, SIZE["d_model"])
        ratios = f"{first[0] / seconds:.2f} | {first[1] / memory:.2f}"
        cells = [of, str(length), variant, str(products), f"{seconds:.3g} s", f"{memory / MIB:.0f} MiB", ratios, f"{worst:.1g}"]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Measures, prints, and saves where asked to."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.propagation.jacobian", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="32,128", help="lengths, with commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help=f"save the table as {RESULTS.name}")
    options = parser.parse_args()
    lengths = [int(length) for length in options.tokens.split(",")]
    if min(lengths) < 2 or options.rounds < 1:
        parser.error(f"--tokens, --rounds: got {options.tokens}, {options.rounds}; allowed: at least 2; at least 1")
    parts = [
        "# Sensitivities",
        f"By `python -m benchmarks.propagation.jacobian`, {date.today()}; see there for what is measured.",
        f"{machine(options.threads, 'cpu')}. Random Llama, {SIZE['n_blocks']} blocks, d_model {SIZE['d_model']}, vocabulary {SIZE['d_vocab']}.",
        table(lengths, options.rounds, options.threads),
    ]
    print("\n\n".join(parts))
    if options.write:
        RESULTS.parent.mkdir(exist_ok=True)
        write_text("\n\n".join(parts) + "\n", RESULTS)


if __name__ == "__main__":
    main()
