"""``python -m benchmarks.linear``: measures, prints and saves."""

from __future__ import annotations

import argparse
import time
from datetime import date
from pathlib import Path

import torch

from benchmarks import linear
from benchmarks.linear.blocks import SHAPES
from benchmarks.linear.checkpoint import run_checkpoint
from benchmarks.linear.pair import measure
from benchmarks.linear.table import checkpoint_table, path_tables
from benchmarks.machine import machine
from sd_lens.models.files import write_text

RESULTS = Path(__file__).parents[1] / "results" / "linear.md"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.linear", description=linear.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="160M,1B,8B", help=f"any of {', '.join(SHAPES)}, with commas")
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the processor, and CUDA where there is any")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="extrapolate the sampled path wherever possible")
    parser.add_argument("--checkpoint", action="store_true", help="measure the command on a checkpoint instead")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of that checkpoint")
    parser.add_argument("--write", action="store_true", help="measure both and save them")
    options = parser.parse_args()
    options.shapes = options.shapes.split(",")
    unknown = [name for name in options.shapes if name not in SHAPES]
    if unknown:
        parser.error(f"--shapes: got {', '.join(unknown)}; allowed: {', '.join(SHAPES)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda; allowed: cpu, as torch sees no CUDA device")
    if min(options.blocks, options.samples, options.threads) < 1:
        parser.error("--blocks, --samples, --threads: allowed: at least 1")
    return options


def main() -> None:
    """Measures and prints the tables."""
    options = _options()
    torch.set_num_threads(options.threads)
    devices = [options.device] if options.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    begun = time.perf_counter()
    parts = []

    def say(part: str) -> None:
        print(("\n" if parts else "") + part, flush=True)
        parts.append(part)

    say("# Linear maps and spectra of blocks")
    say(f"By `python -m benchmarks.linear`, {date.today()}; see there for what is measured.")
    if options.write or not options.checkpoint:
        for device in devices:
            say(f"## Blocks on {'the processor' if device == 'cpu' else 'CUDA'}")
            say(f"{machine(options.threads, device)}.")
            how = {"samples": options.samples, "device": device, "threads": options.threads, "quick": options.quick}
            say(path_tables([measure(name, **how) for name in options.shapes]))
    if options.write or options.checkpoint:
        say("## A checkpoint of 8B shapes")
        say(f"{machine(options.threads, 'cpu')}.")
        say(checkpoint_table(run_checkpoint(SHAPES["8B"], blocks=options.blocks, threads=options.threads)))
    say(f"All of this took {(time.perf_counter() - begun) / 60:.1f} minutes.")
    if options.write:
        RESULTS.parent.mkdir(exist_ok=True)
        write_text("\n\n".join(parts) + "\n", RESULTS)


if __name__ == "__main__":
    main()
