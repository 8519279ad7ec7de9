"""What a benchmark ran on."""

from __future__ import annotations

import platform
from pathlib import Path

import psutil
import torch


def machine(threads: int, device: str) -> str:
    """The machine in one line, without its name."""
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count()
    parts = [
        _processor(),
        f"{cores} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB",
        *([] if device == "cpu" else [torch.cuda.get_device_name()]),
        f"{threads} thread" + ("s" if threads > 1 else ""),
        f"Python {platform.python_version()}, torch {torch.__version__}"
        + (" with MKL" if torch.backends.mkl.is_available() else ""),
        platform.system(),
    ]
    return "; ".join(parts)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
