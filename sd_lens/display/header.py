"""What all machine-readable results begin with, and numbers as JSON has them."""

from __future__ import annotations

import math
from typing import Any

from sd_lens.models.version import version

Record = dict[str, Any]


def header(command: str, model: str, d_model: int | None, n_blocks: int | None) -> Record:
    """Schema, version and model.

    Args:
        command: The command whose result follows.
        model: The model's name.
        d_model: Its width, null where it is not known.
        n_blocks: How many blocks it has, the same.
    """
    return {"schema": f"sd_lens.{command}/1", "sd_lens": version(), "model": model, "d_model": d_model, "n_blocks": n_blocks}


def plain(value: float) -> float | None:
    """A number as JSON has it: no NaN, no infinity, no numpy."""
    value = float(value)
    return value if math.isfinite(value) else None
