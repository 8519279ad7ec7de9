"""Both paths on one shape, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from tqdm import tqdm

from benchmarks.linear.blocks import SHAPES
from benchmarks.linear.ours import Ours, run_ours
from benchmarks.linear.sampled import Sampled, run_sampled

T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """Both paths on the shape of this name."""

    name: str
    sampled: Sampled
    ours: Ours


def measure(name: str, *, samples: int, device: str, threads: int, quick: bool) -> Pair:
    """Runs both paths on the shape of this name, `run_sampled` with these samples and as quickly."""
    shape, label = SHAPES[name], f"{name} on {device}, sampled path"
    ours = in_a_process(run_ours, shape, threads=threads, device=device)
    sampled = in_a_process(run_sampled, shape, threads=threads, samples=samples, device=device, quick=quick, label=label)
    if device == "cpu" and threads == 1 and sampled.cores < 0.9:
        fair = sampled.total * sampled.cores / (ours.total * ours.cores)
        tqdm.write(
            f"{name}: the machine was busy (the sampled path had {sampled.cores:.2f} of a core, ours {ours.cores:.2f}). By "
            f"processor time ours is {fair:.0f} times as fast.",
            file=sys.stderr,
        )
    return Pair(name, sampled, ours)


def in_a_process(run: Callable[..., T], *arguments: object, threads: int, **options: object) -> T:
    """What a function gives in a fresh process."""
    # Not a multiprocessing.Pool, which waits for ever for a worker that was killed for its memory.
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, fresh, initializer=torch.set_num_threads, initargs=(threads,)) as executor:
        return executor.submit(run, *arguments, **options).result()
