"""How far apart two last tokens are: the distances that collapse is measured by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

NORMS: dict[str, str] = {
    "linf": "L∞ of the difference",
    "l2": "L2 of the difference",
    "l1": "L1 of the difference",
    "linf_heads": "L∞ of the difference, per head-sized chunk",
    "l2_heads": "L2 of the difference, per head-sized chunk",
    "l1_heads": "L1 of the difference, per head-sized chunk",
    "relative": "L2 of the difference, over the first one's L2",
    "cosine": "1 - cosine of the angle",
}
"""Distances of two representations."""

PREDICTIONS: dict[str, str] = {
    "kl": "KL divergence of the predicted distributions, in nats",
    "argmax": "share of pairs whose most likely next tokens differ",
}
"""Distances of what is predicted after them."""

METRICS: dict[str, str] = NORMS | PREDICTIONS
"""All distances, by name."""

ABSOLUTE = tuple(name for name in NORMS if name != "cosine")
"""Those that a machine epsilon can be held against: of the order of the difference, not of its square."""

_ORDERS = {"l1": 1, "l2": 2, "linf": float("inf")}


def require_metrics(metrics: Any) -> tuple[str, ...]:
    """The metrics, each once.

    Args:
        metrics: Names of `METRICS`, or one.

    Raises:
        ValueError: There is none, or one is unknown.
    """
    chosen = (metrics,) if isinstance(metrics, str) else tuple(dict.fromkeys(metrics))
    unknown = [name for name in chosen if name not in METRICS]
    if unknown or not chosen:
        raise ValueError(f"metrics: got {repr(unknown[0]) if unknown else 'none'}; allowed: {', '.join(map(repr, METRICS))}")
    return chosen


def distance(metric: str, d_head: int) -> Callable[[Tensor, Tensor], Float[Tensor, "part"]]:
    """A metric as a function of two vectors, computed in float64: of chunks it gives one number each, else one.

    Args:
        metric: One of `METRICS`; of `PREDICTIONS` the vectors are logits.
        d_head: Size of a chunk; the last one is smaller where the width is no multiple of it.
    """
    if metric in PREDICTIONS:
        return _kl if metric == "kl" else _argmax_differs
    if metric == "cosine":
        return _cosine
    if metric == "relative":
        return _relative
    order = _ORDERS[metric.removesuffix("_heads")]
    size = d_head if metric.endswith("_heads") else None

    def norm(first: Tensor, second: Tensor) -> Tensor:
        difference = first.double() - second.double()
        chunks: Sequence[Tensor] = [difference] if size is None else difference.split(size)
        return torch.stack([torch.linalg.vector_norm(chunk, order) for chunk in chunks])

    return norm


def _relative(first: Tensor, second: Tensor) -> Tensor:
    first, second = first.double(), second.double()
    return ((first - second).norm() / first.norm()).reshape(1)


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    # By the difference of unit vectors: 1 - cos loses all digits where the angle is small.
    first, second = first.double(), second.double()
    return ((first / first.norm() - second / second.norm()).square().sum() / 2).reshape(1)


def _kl(first: Tensor, second: Tensor) -> Tensor:
    one, other = (torch.log_softmax(logits.double(), -1) for logits in (first, second))
    return (one.exp() * (one - other)).sum().clamp(min=0).reshape(1)


def _argmax_differs(first: Tensor, second: Tensor) -> Tensor:
    return (first.argmax() != second.argmax()).double().reshape(1)
