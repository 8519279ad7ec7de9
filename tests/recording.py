"""What a model's hooks show, read without sd_lens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def record(model: Any, tokens: Tensor, names: Iterable[str], **run: Any) -> dict[str, Tensor]:
    """The values of hook points in one forward pass, by the names asked for."""
    kept: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(value, hook):
            kept[name] = value.detach().clone()

        return hook

    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(name, keep(name)) for name in names], **run)
    return kept


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Largest deviation, relative to the largest entry wanted."""
    assert got.shape == wanted.shape
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def state(model: Any) -> dict[str, Any]:
    """Everything about a model that an analysis must leave alone; compare it with `same_state`."""
    return {
        "hooks": {
            name: (len(point.fwd_hooks), len(point.bwd_hooks), len(point._forward_hooks)) for name, point in model.hook_dict.items()
        },
        "training": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "grad": {name: parameter.grad for name, parameter in model.named_parameters()},
        "weights": {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
    }


def same_state(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether two states are equal, weights to the bit."""
    others = [{key: value for key, value in side.items() if key != "weights"} for side in (before, after)]
    weights, again = before["weights"], after["weights"]
    return (
        others[0] == others[1]
        and weights.keys() == again.keys()
        and all(_bits(weights[name]) == _bits(again[name]) for name in weights)
    )


def _bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
