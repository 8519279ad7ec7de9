"""What sharing beginnings saves: `last_tokens` with and without it, for many lengths of one probe.

    python -m benchmarks.propagation.prefixes [--longest 4096] [--lengths 64] [--threads 1] [--write]

A random Llama of the shipped model's size with a context of 8192; pairs of ``"repeat-last"`` of evenly spaced lengths; the representation of
the last token after the final norm. Variants:

- ``separate``: one pass of the model per sequence, ended before the unembedding;
- ``batched``: `last_tokens` with ``shared=False``: batches of similar lengths;
- ``shared``: `last_tokens` as `collapse_curve` runs it.

Each in a process of its own, whose largest memory beyond that before counts. All must give the same numbers.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.memory import PeakMemory
from benchmarks.models import random_llama
from sd_lens.models.files import write_text
from sd_lens.models.last_tokens import last_tokens
from sd_lens.propagation.probes import probe

RESULTS = Path(__file__).parent.parent / "results" / "prefixes.md"
SAME = 1e-5
POINT = "unembed.hook_in"
MIB = 2**20


class _Enough(Exception):
    pass


def separate(model: Any, sequences: list[Tensor]) -> Tensor:
    """One pass per sequence."""
    rows: list[Tensor] = []

    def read(stream: Tensor, hook: Any) -> None:
        rows.append(stream[0, -1].clone())
        raise _Enough

    with torch.no_grad():
        for sequence in sequences:
            try:
                model.run_with_hooks(sequence.unsqueeze(0), fwd_hooks=[(POINT, read)], return_type="logits")
            except _Enough:
                continue
    return torch.stack(rows)


def ours(model: Any, sequences: list[Tensor], *, shared: bool) -> Tensor:
    """By `last_tokens`."""
    rows = torch.empty(len(sequences), model.cfg.d_model)
    last_tokens(
        model,
        sequences,
        [POINT],
        lambda number, _, value: rows.__setitem__(number, value),
        shared=shared,
        batch_tokens=8192,
        progress=False,
    )
    return rows


VARIANTS: dict[str, Callable[[Any, list[Tensor]], Tensor]] = {
    "separate": separate,
    "batched": lambda model, sequences: ours(model, sequences, shared=False),
    "shared": lambda model, sequences: ours(model, sequences, shared=True),
}


def _measured(name: str, longest: int, lengths: int, threads: int, queue: Any) -> None:
    torch.set_num_threads(threads)
    model = random_llama(d_model=128, n_blocks=6, context=8192)
    one = probe(model, symbols={"zero": 24, "one": 25}, prepend_bos=False)
    wanted = [max(1, round(longest * (number + 1) / lengths) - 1) for number in range(lengths)]
    sequences = [sequence for length in wanted for sequence in one.pair(length)]
    VARIANTS[name](model, sequences[:4])
    gc.collect()
    with PeakMemory() as memory:
        start = time.perf_counter()
        rows = VARIANTS[name](model, sequences)
        seconds = time.perf_counter() - start
    queue.put((rows.numpy(), seconds, memory.beyond))


def measured(name: str, longest: int, lengths: int, threads: int) -> tuple[Tensor, float, int]:
    """Representations, seconds and bytes of one variant."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measured, args=(name, longest, lengths, threads, queue))
    process.start()
    rows, seconds, memory = queue.get()
    process.join()
    return torch.from_numpy(rows), seconds, memory


def table(longest: int, lengths: int, threads: int) -> str:
    """Times, memory and ratios, as Markdown."""
    lines = ["| variant | seconds | MiB beyond the model | seconds ÷ shared | largest difference |", "|---|--:|--:|--:|--:|"]
    found = {name: measured(name, longest, lengths, threads) for name in VARIANTS}
    truth = found["separate"][0]
    for name, (rows, seconds, memory) in found.items():
        worst = float((rows - truth).abs().max())
        if worst > SAME:
            raise AssertionError(f"{name} differs by {worst:.2g}")
        ratio = seconds / found["shared"][1]
        lines.append(f"| {name} | {seconds:.3g} | {memory / MIB:.0f} | {ratio:.1f} | {worst:.1e} |")
    _, seconds, memory = measured("shared", 8191, lengths, threads)
    lines.append(f"| shared, up to 8191 | {seconds:.3g} | {memory / MIB:.0f} | | |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints, and saves where asked to."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.propagation.prefixes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--longest", type=int, default=4096)
    parser.add_argument("--lengths", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help=f"save the table as {RESULTS.name}")
    options = parser.parse_args()
    if not (1 <= options.lengths <= options.longest <= 8191 and options.threads >= 1):
        parser.error("allowed: 1 <= --lengths <= --longest <= 8191, --threads at least 1")
    parts = [
        "# Many lengths of one probe",
        f"By `python -m benchmarks.propagation.prefixes`, {date.today()}; see there for what is measured.",
        f"{machine(options.threads, 'cpu')}. {options.lengths} lengths up to {options.longest}, {2 * options.lengths} sequences.",
        table(options.longest, options.lengths, options.threads),
    ]
    print("\n\n".join(parts))
    if options.write:
        write_text("\n\n".join(parts) + "\n", RESULTS)


if __name__ == "__main__":
    main()
