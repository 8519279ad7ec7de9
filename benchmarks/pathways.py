"""What scanning a vocabulary costs: against full forwards of the same ids, and in memory.

    python -m benchmarks.pathways [--models tiny,random] [--rounds 5] [--threads 1] [--write]

Variants, each on all ids in the same batches of single tokens, in another order every round; the fastest round of each counts:

- ``full forward``: the model called on the batches, logits and all, as a loop without sd_lens would;
- ``blocks only``: the same, ended before the logits;
- ``scan, ids only``: the blocks up to the explosion block, norms and coefficients read (what `scan_vocabulary` does with the ids);
- ``scan_vocabulary``: the whole call, with the prompts that the block and the ordinary norm are taken from and the FFN's linearisation,
  but without random embeddings, which cost as much per vector as an id does.

The ideal is what the blocks not run would have cost: ``n_blocks / (explosion block + 1)`` over the blocks only, and over the full forward
that times what the logits add to it.

Peak memory is sampled in a process of its own per variant and size of vocabulary, beyond what it held once the model was loaded and had
run one batch.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.machine import machine
from benchmarks.memory import PeakMemory
from benchmarks.models import random_llama
from sd_lens.linear.trigger import trigger_direction
from sd_lens.models.batches import equally_long
from sd_lens.models.files import write_text
from sd_lens.models.loading import inference, load, weights_of
from sd_lens.models.running import run_batches
from sd_lens.tracing.alone import Alone, Target
from sd_lens.tracing.pathways import scan_vocabulary

RESULTS = Path(__file__).parent / "results" / "pathways.md"
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Case:
    """A model and the block that its scan stops after.

    Attributes:
        build: Makes the model.
        block: The block.
    """

    build: Callable[[], Any]
    block: int


CASES = {
    "tiny": Case(lambda: load("tiny"), 2),
    "random": Case(lambda: random_llama(d_model=256, n_blocks=16, d_vocab=32_000), 1),
}
VOCABULARIES = (64_000, 256_000)


def _ids(model: Any) -> torch.Tensor:
    return torch.arange(model.cfg.d_vocab).unsqueeze(1)


def full_forward(model: Any, block: int) -> None:
    """Every id through the whole model."""
    with inference(model):
        for tokens in _ids(model).split(BATCH_TOKENS):
            model(tokens)


def blocks_only(model: Any, block: int) -> None:
    """Every id through all blocks."""
    run_batches(model, equally_long(_ids(model), batch_tokens=BATCH_TOKENS), [], lambda batch: lambda *seen: None, progress=False)


def ids_only(model: Any, block: int) -> None:
    """Every id up to the block, read as a scan does."""
    alone = Alone(model, batch_tokens=BATCH_TOKENS, progress=False)
    alone.norms_and_coefficients(_ids(model), block, _target(model, block))


_targets: dict[tuple[int, int], Target] = {}


def _target(model: Any, block: int) -> Target:
    """Found once, before anything is timed."""
    key = (id(model), block)
    if key not in _targets:
        weights = weights_of(model)[block]
        _targets[key] = Target(weights, trigger_direction(weights))
    return _targets[key]


def whole_scan(model: Any, block: int) -> None:
    """The call, without random embeddings."""
    scan_vocabulary(model, block=block, control=0, batch_tokens=BATCH_TOKENS, progress=False)


VARIANTS: dict[str, Callable[[Any, int], None]] = {
    "full forward": full_forward,
    "blocks only": blocks_only,
    "scan, ids only": ids_only,
    "scan_vocabulary": whole_scan,
}


def _times(model: Any, block: int, rounds: int) -> dict[str, float]:
    for run in VARIANTS.values():  # what the first run of a process pays for is nobody's cost
        run(model, block)
    best = dict.fromkeys(VARIANTS, float("inf"))
    names = list(VARIANTS)
    for turn in tqdm(range(rounds), desc="rounds", leave=False):
        # Who goes first pays for memory that the others find ready, so everybody does once.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            VARIANTS[name](model, block)
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def time_table(names: Sequence[str], rounds: int) -> str:
    """Times and ratios of some models, as Markdown."""
    lines = [
        "| model | ids | full forward | blocks only | scan, ids only | `scan_vocabulary` | blocks only ÷ ids only | ideal | "
        "full forward ÷ ids only | ideal | full forward ÷ `scan_vocabulary` |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in names:
        case = CASES[name]
        model = case.build()
        times = _times(model, case.block, rounds)
        full, blocks, ids, scan = times.values()
        ideal = model.cfg.n_layers / (case.block + 1)
        cells = [
            f"{model.cfg.model_name}; stops after block {case.block} of 0 to {model.cfg.n_layers - 1}",
            str(model.cfg.d_vocab),
            *map(_seconds, times.values()),
            f"{blocks / ids:.2f}",
            f"{ideal:.2f}",
            f"{full / ids:.2f}",
            f"{ideal * full / blocks:.2f}",
            f"{full / scan:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_table(threads: int) -> str:
    """Peak memory of the scan of a small and a large vocabulary, and of the full forward of the small one, as Markdown."""
    lines = ["| | ids | time | peak memory beyond the model |", "|---|--:|--:|--:|"]
    for variant, sizes in (("scan_vocabulary", VOCABULARIES), ("full forward", VOCABULARIES[:1])):
        for size in sizes:
            command = [sys.executable, "-m", "benchmarks.pathways", "--memory-of", variant, "--vocabulary", str(size)]
            done = subprocess.run([*command, "--threads", str(threads)], stdout=subprocess.PIPE, text=True, check=True)
            seconds, peak = map(float, done.stdout.strip().splitlines()[-1].split())
            lines.append(f"| {variant} | {size} | {_seconds(seconds)} | {peak / 1e6:.0f} MB |")
    return "\n".join(lines)


def _report_memory(variant: str, vocabulary: int) -> None:
    model = random_llama(d_model=64, n_blocks=4, d_vocab=vocabulary)
    with inference(model):
        model.run_with_hooks(_ids(model)[:BATCH_TOKENS], return_type=None, stop_at_layer=2)
    _target(model, 1)
    start = time.perf_counter()
    with PeakMemory() as memory:
        VARIANTS[variant](model, 1)
    print(time.perf_counter() - start, memory.beyond)


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def main() -> None:
    """Measures, prints, and saves where asked to."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.pathways", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="tiny,random", help=f"any of {', '.join(CASES)}, with commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help=f"save the tables as {RESULTS.name}")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        _report_memory(options.memory_of, options.vocabulary)
        return
    names = options.models.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown or options.rounds < 1:
        parser.error(f"--models, --rounds: got {options.models}, {options.rounds}; allowed: {', '.join(CASES)}; at least 1")
    parts = []

    def say(part: str) -> None:
        print(("\n" if parts else "") + part, flush=True)
        parts.append(part)

    say("# Vocabulary scans")
    say(f"By `python -m benchmarks.pathways`, {date.today()}; see there for what is measured.")
    say(f"{machine(options.threads, 'cpu')}.")
    say("## Time")
    say(time_table(names, options.rounds))
    say("## Memory")
    say(f"A random Llama of 4 blocks and width 64, batches of {BATCH_TOKENS} single tokens, stops after block 1.")
    say(memory_table(options.threads))
    if options.write:
        RESULTS.parent.mkdir(exist_ok=True)
        write_text("\n\n".join(parts) + "\n", RESULTS)


if __name__ == "__main__":
    main()
