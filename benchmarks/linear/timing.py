"""Seconds that stages and calls take, on a processor or a CUDA device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

_TRYING = 1.0


class Stages:
    """Seconds of named stages, of each in all of its runs. A progress bar moves by one with every run."""

    def __init__(self, device: str, bar: tqdm | None = None):
        self.seconds: dict[str, float] = defaultdict(float)
        self._wall = self._processor = 0.0
        self._device, self._bar = device, bar

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times the body."""
        if self._bar is not None:
            self._bar.set_postfix_str(name)
        processor = time.process_time()
        start = _now(self._device)
        yield
        wall = _now(self._device) - start
        self.seconds[name] += wall
        self._wall += wall
        self._processor += time.process_time() - processor
        if self._bar is not None:
            self._bar.update()

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    @property
    def cores(self) -> float:
        """How many cores the stages had on average: fewer than there are threads where others were using them."""
        return self._processor / self._wall


def timed(call: Callable[[], Tensor], device: str) -> tuple[Tensor, float]:
    """What a call gives, and its seconds."""
    start = _now(device)
    result = call()
    return result, _now(device) - start


def fastest(call: Callable[[], Tensor], device: str) -> float:
    """Seconds that a call takes at best, in about a second of trying."""
    best, until = timed(call, device)[1], time.perf_counter() + _TRYING
    while time.perf_counter() < until:
        best = min(best, timed(call, device)[1])
    return best


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()
