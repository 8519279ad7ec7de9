"""What tracing costs: time over the bare forward, and memory that does not grow with the corpus.

    python -m benchmarks.tracing [--model tiny|random] [--tokens 200000] [--rounds 3] [--write]

Every variant runs the same batches of the same windows of text, in another order every round, and the fastest round of each counts.
Peak memory is sampled in a process of its own per variant, beyond what it held once the model was loaded and had run one batch.
Variants:

- ``forward``: the batches alone, no hooks, logits included, as a call of the model has them;
- ``trace``: `sd_lens.trace_norms`, norms only, all blocks;
- ``trace + direction``: the same with the defect direction (its default; a second pass over up to 32 prompts with high norms);
- ``attribute_norm``: the trace with its direction, and the stream after block 2 split over all components, means over groups of tokens;
- ``run_with_cache``: TransformerLens' cache of the residual hook points, norms taken afterwards, one batch at a time;
- ``run_with_cache, kept``: the same, streams kept to the end as a notebook would (memory only, at two corpus sizes).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.machine import machine
from benchmarks.memory import PeakMemory
from benchmarks.models import random_llama, text_windows
from sd_lens.models import hook_names
from sd_lens.models.batches import batches
from sd_lens.models.loading import inference, load
from sd_lens.tracing.attribution import attribute_norm
from sd_lens.tracing.norms import trace_norms

BATCH_TOKENS = 4096
RESULTS = Path(__file__).parent / "results" / "tracing.md"
LENGTHS = (512, 128, 256, 64, 384)
MODELS: dict[str, Callable[[], Any]] = {
    "tiny": lambda: load("tiny"),
    "random": lambda: random_llama(d_model=256, n_blocks=8),
}


def _windows(model: Any, n_tokens: int) -> list[torch.Tensor]:
    context = model.cfg.n_ctx
    return text_windows(model, n_tokens=n_tokens, lengths=tuple(min(length, context) for length in LENGTHS))


def forward(model: Any, windows: list[torch.Tensor]) -> None:
    """The bare forward over the same batches."""
    with inference(model):
        for batch in batches(windows, batch_tokens=BATCH_TOKENS):
            model(batch.tokens, return_type=None)


def trace(model: Any, windows: list[torch.Tensor]) -> None:
    """Norms of all blocks."""
    trace_norms(model, windows, batch_tokens=BATCH_TOKENS, direction_prompts=0, progress=False)


def trace_direction(model: Any, windows: list[torch.Tensor]) -> None:
    """Norms of all blocks and the defect direction."""
    trace_norms(model, windows, batch_tokens=BATCH_TOKENS, progress=False)


def attribution(model: Any, windows: list[torch.Tensor]) -> None:
    """Norms of all blocks, the defect direction, and what wrote the stream after block 2."""
    direction = torch.ones(model.cfg.d_model)
    attribute_norm(model, windows, block=2, direction=direction, batch_tokens=BATCH_TOKENS, progress=False)


def cached(model: Any, windows: list[torch.Tensor], *, keep: bool = False) -> None:
    """Residual streams by TransformerLens' own cache."""
    names = hook_names.residual_points(model.cfg.n_layers)
    kept = []
    with inference(model):
        for batch in batches(windows, batch_tokens=BATCH_TOKENS):
            _, cache = model.run_with_cache(batch.tokens, names_filter=lambda name: name in names, return_type=None)
            norms = torch.stack([cache[name].norm(dim=-1) for name in names])
            kept.append({name: cache[name] for name in names} if keep else norms)


def cached_kept(model: Any, windows: list[torch.Tensor]) -> None:
    """Residual streams of the whole corpus, kept."""
    cached(model, windows, keep=True)


VARIANTS: dict[str, Callable[[Any, list[torch.Tensor]], None]] = {
    "forward": forward,
    "trace": trace,
    "trace + direction": trace_direction,
    "attribute_norm": attribution,
    "run_with_cache": cached,
}
MEMORY_ONLY = {"run_with_cache, kept": cached_kept}


def _measure_memory(model_name: str, variant: str, n_tokens: int) -> float:
    """Peak memory of a variant beyond the loaded model's, MiB, in a process of its own."""
    options = {"--memory-of": variant, "--model": model_name, "--tokens": n_tokens, "--threads": torch.get_num_threads()}
    command = [sys.executable, "-m", "benchmarks.tracing", *(str(word) for option in options.items() for word in option)]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(out.strip().splitlines()[-1])


def _report_memory(model_name: str, variant: str, n_tokens: int) -> None:
    model = MODELS[model_name]()
    windows = _windows(model, n_tokens)
    forward(model, windows[:4])  # what the first forward of a process allocates is nobody's cost
    with PeakMemory() as memory:
        (VARIANTS | MEMORY_ONLY)[variant](model, windows)
    print(memory.beyond / 2**20)


def _times(model: Any, windows: list[torch.Tensor], rounds: int) -> dict[str, float]:
    forward(model, windows[:4])
    best = dict.fromkeys(VARIANTS, float("inf"))
    names = list(VARIANTS)
    for turn in tqdm(range(rounds), desc="rounds", leave=False):
        # Who goes first pays for memory that the others find ready, so everybody does once.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            run = VARIANTS[name]
            start = time.perf_counter()
            run(model, windows)
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", choices=list(MODELS), default="tiny")
    parser.add_argument("--write", action="store_true", help=f"save the table as {RESULTS.name}")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        _report_memory(options.model, options.memory_of, options.tokens)
        return
    model = MODELS[options.model]()
    windows = _windows(model, options.tokens)
    times = _times(model, windows, options.rounds)
    lines = [
        "# Tracing",
        "",
        f"By `python -m benchmarks.tracing`, {date.today()}; see there for what is measured.",
        "",
        f"{machine(options.threads, 'cpu')}. {model.cfg.model_name}: {options.tokens} tokens in {len(windows)} windows.",
        "",
        "| | time | ÷ forward | memory | ÷ forward | memory, 1/4 of the tokens |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    base_memory = 0.0
    for variant in VARIANTS | MEMORY_ONLY:
        memory = _measure_memory(options.model, variant, options.tokens)
        quarter = _measure_memory(options.model, variant, options.tokens // 4)
        base_memory = base_memory or max(memory, 1.0)
        timed = f"{times[variant]:.2f} s | {times[variant] / times['forward']:.2f}" if variant in times else " | "
        lines.append(f"| {variant} | {timed} | {memory:.0f} MiB | {memory / base_memory:.2f} | {quarter:.0f} MiB |")
    print("\n".join(lines))
    if options.write:
        RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
