"""Arguments that several analyses share, checked before any work."""

from __future__ import annotations

from typing import Any


def require_block(block: Any, n_blocks: int, *, names: tuple[str, ...] = (), argument: str = "block") -> None:
    """Raises `ValueError` unless a block is one of the model's.

    Args:
        block: What was given.
        n_blocks: How many blocks the model has.
        names: Words that are allowed besides.
        argument: What it was given as.
    """
    if isinstance(block, str) and block in names:
        return
    if not isinstance(block, int) or isinstance(block, bool) or not 0 <= block < n_blocks:
        raise ValueError(f"{argument}: got {block!r}; allowed: {', '.join([f'0 to {n_blocks - 1}', *map(repr, names)])}")


def require_blocks(blocks: Any, n_blocks: int, *, otherwise: str, argument: str = "blocks") -> list[int]:
    """The blocks given, each checked.

    Args:
        blocks: What was given.
        n_blocks: How many blocks the model has.
        otherwise: What else is allowed, for the message.
        argument: What it was given as.

    Raises:
        ValueError: It is no sequence of the model's blocks.
    """
    try:
        chosen = list(blocks)
    except TypeError:
        raise ValueError(f"{argument}: got {blocks!r}; allowed: some of 0 to {n_blocks - 1}, {otherwise}") from None
    for block in chosen:
        require_block(block, n_blocks, names=(), argument=argument)
    return chosen


MOST_SEED = 2**62
"""Largest seed: what is derived from it must fit into 64 bits."""


def require_whole(argument: str, value: Any, least: int, most: int | None = None) -> None:
    """Raises `ValueError` unless an argument is a whole number in a range.

    Args:
        argument: What it is called.
        value: What was given.
        least: The smallest allowed.
        most: The largest allowed; None for no limit.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        allowed = f"a whole number from {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{argument}: got {value!r}; allowed: {allowed}")


def require_seed(seed: Any) -> None:
    """Raises `ValueError` unless a seed is one."""
    require_whole("seed", seed, 0, MOST_SEED)
