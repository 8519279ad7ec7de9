"""How much memory some code takes at its peak."""

from __future__ import annotations

import threading

import psutil
import torch


class PeakMemory:
    """Largest memory while the body runs, in bytes: of a process, this one by default, or what torch has allocated on a CUDA device.

    Attributes:
        start: Memory when the body began.
        peak: Largest memory until it ended, of a process as seen by a look ``every`` so many seconds.
    """

    def __init__(self, device: str = "cpu", *, pid: int | None = None, every: float = 0.002):
        self._device, self._process, self._every = device, psutil.Process(pid), every
        self.start = self.peak = 0

    @property
    def beyond(self) -> int:
        """Peak beyond the start."""
        return self.peak - self.start

    def now(self) -> int:
        """Memory at this moment."""
        if self._device != "cpu":
            return torch.cuda.memory_allocated()
        try:
            return self._process.memory_info().rss
        except psutil.NoSuchProcess:  # another process may end while it is watched
            return 0

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = self.now()
        if self._device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            return self
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device != "cpu":
            self.peak = torch.cuda.max_memory_allocated()
            return
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._every):
            self.peak = max(self.peak, self.now())
