"""What a module of a TransformerLens model holds: its tensors, its activation function, the layer it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from sd_lens.models.activations import Activation, identify
from sd_lens.models.weights import FFNWeights, NormWeights

# Where Hugging Face's modules keep their activation function.
_ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "gelu_impl", "activation")


def tensor_of(owner: Any, name: str) -> Tensor | None:
    """An attribute if it is there and is a tensor: optional weights are absent, None or raise, depending on the architecture."""
    try:
        value = getattr(owner, name)
    except (AttributeError, NotImplementedError):
        return None
    return value.detach() if isinstance(value, Tensor) else None


def required_tensor(owner: Any, name: str, where: str) -> Tensor:
    """The same for a tensor without which there is no layer."""
    tensor = tensor_of(owner, name)
    if tensor is None:
        raise ValueError(f"model: {where} has no {name}; allowed: blocks with one attention and one FFN")
    return tensor


def bare(module: Any) -> Any:
    """The Hugging Face module behind a bridge, or the module itself."""
    while isinstance(getattr(module, "original_component", None), nn.Module):
        module = module.original_component
    return module


def activation_of(mlp: Any) -> Activation:
    """The activation function that a layer applies, found on its module."""
    for owner in (getattr(mlp, "original_component", None), mlp):
        for name in _ACTIVATION_NAMES:
            fn = getattr(owner, name, None)
            if callable(fn):
                return identify(cast("Callable[[Tensor], Tensor]", fn))
    raise ValueError(
        f"model: no activation function found on {type(mlp).__name__}; allowed: an FFN with one of {', '.join(_ACTIVATION_NAMES)}"
    )


def dense_ffn(mlp: Any, *, bridged: bool, norm: NormWeights | None, where: str) -> FFNWeights:
    """A dense layer, its output neither normed nor scaled."""
    gate, b_in = tensor_of(mlp, "W_gate"), tensor_of(mlp, "b_in")
    b_gate = tensor_of(mlp, "b_gate") if gate is not None else None
    if gate is not None and b_gate is None:
        b_gate = tensor_of(getattr(mlp, "gate", None), "bias")
    after_product = gate is not None and not bridged
    return FFNWeights(
        W_in=required_tensor(mlp, "W_in", where),
        W_out=required_tensor(mlp, "W_out", where),
        W_gate=gate,
        b_in=None if after_product else b_in,
        b_gate=b_gate,
        b_out=tensor_of(mlp, "b_out"),
        b_hidden=b_in if after_product else None,
        activation=activation_of(mlp),
        norm=norm,
    )
