"""Mixtures of experts, read from a model's module.

How a router turns its scores into weights is no parameter. It is found by asking the router, and a rule that is not known is refused.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_lens.models.activations import Activation
from sd_lens.models.modules import activation_of, bare, dense_ffn, tensor_of
from sd_lens.models.weights import FFNWeights, MoEWeights, NormWeights

_MIXTURES = "a softmax router that keeps the top k, gated experts without biases, at most one shared expert"


def has_experts(mlp: Any) -> bool:
    """Whether a block's FFN is a mixture of experts: all known ones keep them under this name, or stacked in one tensor."""
    module = bare(mlp)
    return hasattr(module, "experts") or (isinstance(module, nn.Module) and any(p.ndim == 3 for p in module.parameters()))


class _Refused(Exception):
    """What a mixture of experts has that cannot be read."""


def mixture(model: Any, mlp: Any, *, bridged: bool, norm: NormWeights | None, where: str) -> MoEWeights:
    """A mixture of experts, its output neither normed nor scaled."""
    try:
        layer = _from_bridge(mlp, norm, where) if bridged else _from_hooked(model, mlp, norm)
        _require_nothing_else(bare(mlp), layer)
    except _Refused as found:
        raise ValueError(f"model: {where}'s mixture of experts has {found}; allowed: {_MIXTURES}") from None
    return layer


def _from_bridge(mlp: Any, norm: NormWeights | None, where: str) -> MoEWeights:
    module = bare(mlp)
    experts = bare(getattr(module, "experts", None))
    stacked_in, stacked_out = tensor_of(experts, "gate_up_proj"), tensor_of(experts, "down_proj")
    if stacked_in is None or stacked_out is None:
        raise _Refused("experts without gate_up_proj and down_proj")
    if getattr(experts, "is_transposed", False) or stacked_in.shape[2] != stacked_out.shape[1]:
        raise _Refused("transposed experts")
    router = bare(getattr(module, "gate", None) or getattr(module, "router", None))
    W_router = tensor_of(router, "weight")
    if W_router is None:
        raise _Refused("no router that is called gate or router and has a weight")
    b_router = tensor_of(router, "bias")
    top_k, renormalized = _routing(router, W_router, b_router)
    activation, width = activation_of(experts), stacked_out.shape[2]
    _require_plain_gating(experts, activation)
    shared, shared_gate = getattr(mlp, "shared_expert", None), tensor_of(bare(getattr(mlp, "shared_expert_gate", None)), "weight")
    return MoEWeights(
        experts=tuple(
            _expert(W_in[width:].T, W_out.T, W_in[:width].T, activation, norm)
            for W_in, W_out in zip(stacked_in, stacked_out, strict=True)
        ),
        W_router=W_router.T,
        b_router=b_router,
        top_k=top_k,
        renormalized=renormalized,
        norm=norm,
        shared=None if shared is None else dense_ffn(shared, bridged=True, norm=norm, where=f"{where}'s shared expert"),
        W_shared_gate=None if shared_gate is None else shared_gate.T,
    )


def _from_hooked(model: Any, mlp: Any, norm: NormWeights | None) -> MoEWeights:
    def weight(owner: Any, name: str) -> Tensor:
        linear = getattr(owner, name, None)
        tensor = tensor_of(linear, "weight")
        if tensor is None or tensor_of(linear, "bias") is not None:
            raise _Refused(f"a {name} that is no projection without bias")
        return tensor.T

    activation = activation_of(mlp.experts[0])
    return MoEWeights(
        experts=tuple(
            _expert(weight(expert, "W_in"), weight(expert, "W_out"), weight(expert, "W_gate"), activation, norm)
            for expert in mlp.experts
        ),
        W_router=weight(mlp, "W_gate"),
        b_router=None,
        top_k=model.cfg.experts_per_token,
        renormalized=bool(model.cfg.norm_topk_prob),
        norm=norm,
    )


def _expert(W_in: Tensor, W_out: Tensor, W_gate: Tensor, activation: Activation, norm: NormWeights | None) -> FFNWeights:
    return FFNWeights(W_in, W_out, W_gate, None, None, None, activation, norm)


def _routing(router: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[int, bool]:
    """How many experts a router keeps and whether it renormalises their weights, found by asking it about random inputs.

    It is asked with random weights instead of its own: with scores of about unit size, among which no expert has all the weight
    whatever the rule, and of the same precision for every model, even one whose tensors have no numbers yet.
    """
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(16, weight.shape[1], generator=generator)
    own = {"weight": torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5}
    if bias is not None:
        own["bias"] = torch.randn(bias.shape, generator=generator)
    with torch.no_grad():
        probabilities = F.linear(probe, own["weight"], own.get("bias")).softmax(-1)
        try:
            answers = torch.func.functional_call(router, own, (probe,))
        except Exception:  # it is somebody else's code, and may need more than its input
            raise _Refused("a router that does not answer to its input alone") from None
    answers = [answer for answer in (answers if isinstance(answers, tuple) else (answers,)) if isinstance(answer, Tensor)]
    chosen = next((answer for answer in answers if answer.ndim == 2 and not answer.is_floating_point()), None)
    if chosen is None:
        raise _Refused("a router that does not say which experts it chooses")
    kept, experts = probabilities.topk(chosen.shape[1], dim=-1)
    rules = {False: kept, True: kept / kept.sum(-1, keepdim=True)}
    for answer in answers:
        if answer.is_floating_point() and answer.shape == chosen.shape:
            got = torch.zeros_like(probabilities).scatter(-1, chosen.long(), answer.float())
            for renormalized, weights in rules.items():
                if torch.allclose(got, torch.zeros_like(got).scatter(-1, experts, weights), rtol=1e-4, atol=0.0):
                    return chosen.shape[1], renormalized
    raise _Refused("a router whose weights are not the largest of a softmax over all experts")


def _require_plain_gating(experts: Any, activation: Activation) -> None:
    """Gate and linear branch may also be interleaved, clamped or shifted."""
    join = getattr(experts, "_apply_gate", None)
    if join is None:  # releases of transformers that have no such method stack plain gated experts only
        return
    gate = torch.linspace(-30, 30, 64)
    linear = gate.flip(0) + 1
    with torch.no_grad():
        got, wanted = join(torch.cat([gate, linear])[None])[0], activation(gate) * linear
    if got.shape != wanted.shape or not torch.allclose(got, wanted, rtol=1e-4, atol=1e-4):
        raise _Refused("experts whose branches are not joined as activation(gate) * linear")


def _require_nothing_else(module: nn.Module, layer: MoEWeights) -> None:
    """Whatever parameter or buffer has not been read does something that is not known."""
    parts = [layer, *layer.experts, *([] if layer.shared is None else [layer.shared])]
    # A tensor has been read if a view begins where it begins.
    read = {value.data_ptr() for part in parts for value in vars(part).values() if isinstance(value, Tensor)}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.data_ptr() not in read:
            raise _Refused(name.replace("_original_component.", ""))
