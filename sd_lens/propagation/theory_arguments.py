"""Arguments that the theory's functions share, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sd_lens.tracing.arguments import require_whole

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Precisions that can be run in."""


def whole_numbers(argument: str, values: Any, least: int, *, even: bool = False) -> tuple[int, ...]:
    """Whole numbers, each once and in ascending order.

    Args:
        argument: What they are called.
        values: What was given.
        least: The smallest allowed.
        even: Whether they must be even.

    Raises:
        ValueError: They are none, or no whole numbers from ``least`` on.
    """
    kind = "even" if even else "whole"
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ValueError(f"{argument}: got {values!r}; allowed: at least one {kind} number from {least}")
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < least or (even and value % 2):
            raise ValueError(f"{argument}: got {value!r}; allowed: {kind} numbers from {least}")
    return tuple(sorted(set(values)))


def chosen(argument: str, values: Any, allowed: Sequence[Any]) -> tuple[Any, ...]:
    """Some of what is allowed, each once, as given.

    Args:
        argument: What they are called.
        values: What was given.
        allowed: What may be given.

    Raises:
        ValueError: They are none, or others.
    """
    words = ", ".join(map(str, allowed))
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ValueError(f"{argument}: got {values!r}; allowed: at least one of {words}")
    for value in values:
        if value not in allowed:
            raise ValueError(f"{argument}: got {value!r}; allowed: {words}")
    return tuple(dict.fromkeys(values))


def require_heads(n_heads: Any, d_model: Any) -> None:
    """Raises `ValueError` unless a width splits into heads of even width, which rotations and sinusoids need."""
    require_whole("d_model", d_model, 2)
    require_whole("n_heads", n_heads, 1)
    if d_model % (2 * n_heads):
        raise ValueError(f"n_heads: got {n_heads} at d_model {d_model}; allowed: numbers that leave each head an even width")
