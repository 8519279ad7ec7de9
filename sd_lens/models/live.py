"""`BlockWeights` read from a live TransformerLens model; the quirks of its architectures and generations are settled here.

What differs and is not what a name suggests:

- OLMo 2's only norms stand after the sublayers. TransformerLens 4 names them ``ln1_post``/``ln2_post``, 3.9 ``ln1``/``ln2``.
- Norms may have no gain (OLMo, NanoChat), add 1 to it though they are LayerNorms (Nemotron), or be none at all (an identity).
- Granite multiplies what a sublayer adds to the stream; on a bridge the block knows by how much.
- Parallel blocks may have one norm for both sublayers (Phi, GPT-J, Falcon-7B): then there is no ``ln2`` and the FFN reads ``ln1``'s output.
- `HookedTransformer` adds a gated FFN's ``b_in`` after the product of the branches, `TransformerBridge` before it.
- Gemma's norms multiply by ``1 + w`` on a bridge; `HookedTransformer` has the 1 in ``w`` already.
- The configuration's ``act_fn`` and ``d_mlp`` are wrong on several architectures and are not read.
- Blocks with one FFN and mixtures of experts may take turns in a model, so which of them a block has is read from the block.
- How a router turns its scores into weights is no parameter. It is found by asking the router, and a rule that is not known is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_lens.models.activations import Activation, identify
from sd_lens.models.weights import AttentionWeights, BlockWeights, FFNWeights, ModelWeights, MoEWeights, NormWeights

# Architectures without a norm before the sublayers whose norms after them TransformerLens 3.9 calls ln1 and ln2.
_POST_NORM_ONLY = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")
_MIXTURES = "a softmax router that keeps the top k, gated experts without biases, at most one shared expert"
_NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")
# Where Hugging Face's modules keep their activation function.
_ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "gelu_impl", "activation")


def _tensor(owner: Any, name: str) -> Tensor | None:
    """An attribute if it is there and is a tensor: optional weights are absent, None or raise, depending on the architecture."""
    try:
        value = getattr(owner, name)
    except (AttributeError, NotImplementedError):
        return None
    return value.detach() if isinstance(value, Tensor) else None


def _sublayers(block: Any) -> dict[str, Any]:
    """A block's attention and FFN, None where it has no such thing."""
    # Granite 4 calls its dense FFN a shared one, also in models without experts to share a block with.
    mlp = getattr(block, "mlp", None) or (None if getattr(block, "moe", None) else getattr(block, "shared_mlp", None))
    return {"attn": getattr(block, "attn", None), "mlp": mlp}


def _refuse_norms_inside(block: Any, where: str) -> None:
    """Raises `ValueError` where a norm stands between a sublayer's weights: BitNet has some before its output projections."""
    # OPT has no module for its FFN, so the bridge's is the whole block, with the block's own norms.
    around = {_bare(getattr(block, name, None)) for name in _NORMS}
    for part, sublayer in _sublayers(block).items():
        for name, module in _bare(sublayer).named_modules():
            leaf = name.removesuffix("._original_component").rpartition(".")[2]
            of_query_or_key = leaf.startswith(("q", "k")) and not leaf.startswith("kv")
            if "Norm" in type(module).__name__ and not of_query_or_key and _bare(module) not in around:
                raise ValueError(
                    f"model: {where} has a norm inside its {part}, {leaf}; allowed: norms around sublayers and of queries and keys"
                )


def _required(owner: Any, name: str, where: str) -> Tensor:
    tensor = _tensor(owner, name)
    if tensor is None:
        raise ValueError(f"model: {where} has no {name}; allowed: blocks with one attention and one FFN")
    return tensor


def _bare(module: Any) -> Any:
    """The Hugging Face module behind a bridge, or the module itself."""
    while isinstance(getattr(module, "original_component", None), nn.Module):
        module = module.original_component
    return module


def _has_experts(mlp: Any) -> bool:
    """Whether a block's FFN is a mixture of experts: all known ones keep them under this name, or stacked in one tensor."""
    bare = _bare(mlp)
    return hasattr(bare, "experts") or (isinstance(bare, nn.Module) and any(p.ndim == 3 for p in bare.parameters()))


def is_mixture_of_experts(model: Any) -> bool:
    """Whether any of the model's FFNs is a mixture of experts, which has no single ``W_in``."""
    return any(_has_experts(_sublayers(block)["mlp"]) for block in getattr(model, "blocks", ()))


def architecture(model: Any) -> str:
    """The Hugging Face class name of the model's architecture, or an empty string where none is recorded."""
    cfg = model.cfg
    return getattr(cfg, "architecture", None) or getattr(cfg, "original_architecture", None) or ""


def _norm(model: Any, block: Any, name: str) -> NormWeights | None:
    module = getattr(block, name, None)
    if module is None or isinstance(_bare(module), nn.Identity):
        return None
    cfg = model.cfg
    rms = getattr(module, "uses_rms_norm", getattr(cfg, "uses_rms_norm", False)) or str(cfg.normalization_type).startswith("RMS")
    # TransformerLens 4 knows this of every norm, 3.9 of the model, and there not of Nemotron's LayerNorm1P.
    offset = getattr(module, "uses_weight_offset", getattr(cfg, "rmsnorm_uses_offset", False))
    offset = offset or type(_bare(module)).__name__.endswith("Norm1P")
    gain = _tensor(module, "w")
    if gain is None:
        like = next(block.parameters())
        gain = torch.ones(cfg.d_model, dtype=like.dtype, device=like.device)
    elif offset:
        gain = gain + 1
    return NormWeights("rms" if rms else "layer", gain, _tensor(module, "b"), float(cfg.eps))


def _norms(model: Any, block: Any) -> dict[str, NormWeights | None]:
    """The norms before and after attention and FFN."""
    norms = {name: _norm(model, block, name) for name in _NORMS}
    # On a bridge the first norm's name in the checkpoint says where it stands.
    first_is_post = str(getattr(getattr(block, "ln1", None), "name", "")).startswith("post_")
    if norms["ln1_post"] is None and (first_is_post or architecture(model) in _POST_NORM_ONLY):
        norms = {"ln1": None, "ln1_post": norms["ln1"], "ln2": None, "ln2_post": norms["ln2"]}
    elif norms["ln2"] is None and model.cfg.parallel_attn_mlp:
        norms["ln2"] = norms["ln1"]
    return norms


def _output_scale(block: Any) -> float:
    return float(getattr(block, "residual_contribution_scale", 1.0))


def _activation(mlp: Any) -> Activation:
    for owner in (getattr(mlp, "original_component", None), mlp):
        for name in _ACTIVATION_NAMES:
            fn = getattr(owner, name, None)
            if callable(fn):
                return identify(cast("Callable[[Tensor], Tensor]", fn))
    raise ValueError(
        f"model: no activation function found on {type(mlp).__name__}; allowed: an FFN with one of {', '.join(_ACTIVATION_NAMES)}"
    )


def _attention(block: Any, norms: dict[str, NormWeights | None], where: str) -> AttentionWeights:
    attn = block.attn
    # HookedTransformer's W_V repeats grouped heads; the parameter behind it does not.
    grouped_weight, grouped_bias = _tensor(attn, "_W_V"), _tensor(attn, "_b_V")
    return AttentionWeights(
        W_V=grouped_weight if grouped_weight is not None else _required(attn, "W_V", where),
        W_O=_required(attn, "W_O", where),
        b_V=grouped_bias if grouped_weight is not None else _tensor(attn, "b_V"),
        b_O=_tensor(attn, "b_O"),
        norm=norms["ln1"],
        post_norm=norms["ln1_post"],
        output_scale=_output_scale(block),
    )


def _ffn(mlp: Any, *, bridged: bool, norm: NormWeights | None, where: str) -> FFNWeights:
    """A dense layer, its output neither normed nor scaled."""
    gate, b_in = _tensor(mlp, "W_gate"), _tensor(mlp, "b_in")
    b_gate = _tensor(mlp, "b_gate") if gate is not None else None
    if gate is not None and b_gate is None:
        b_gate = _tensor(getattr(mlp, "gate", None), "bias")
    after_product = gate is not None and not bridged
    return FFNWeights(
        W_in=_required(mlp, "W_in", where),
        W_out=_required(mlp, "W_out", where),
        W_gate=gate,
        b_in=None if after_product else b_in,
        b_gate=b_gate,
        b_out=_tensor(mlp, "b_out"),
        b_hidden=b_in if after_product else None,
        activation=_activation(mlp),
        norm=norm,
    )


class _Refused(Exception):
    """What a mixture of experts has that cannot be read."""


def _mixture(model: Any, mlp: Any, *, bridged: bool, norm: NormWeights | None, where: str) -> MoEWeights:
    """A mixture of experts, its output neither normed nor scaled."""
    try:
        layer = _bridged_mixture(mlp, norm, where) if bridged else _hooked_mixture(model, mlp, norm)
        _require_nothing_else(_bare(mlp), layer)
    except _Refused as found:
        raise ValueError(f"model: {where}'s mixture of experts has {found}; allowed: {_MIXTURES}") from None
    return layer


def _bridged_mixture(mlp: Any, norm: NormWeights | None, where: str) -> MoEWeights:
    bare = _bare(mlp)
    experts = _bare(getattr(bare, "experts", None))
    stacked_in, stacked_out = _tensor(experts, "gate_up_proj"), _tensor(experts, "down_proj")
    if stacked_in is None or stacked_out is None:
        raise _Refused("experts without gate_up_proj and down_proj")
    if getattr(experts, "is_transposed", False) or stacked_in.shape[2] != stacked_out.shape[1]:
        raise _Refused("transposed experts")
    router = _bare(getattr(bare, "gate", None) or getattr(bare, "router", None))
    W_router = _tensor(router, "weight")
    if W_router is None:
        raise _Refused("no router that is called gate or router and has a weight")
    b_router = _tensor(router, "bias")
    top_k, renormalized = _routing(router, W_router, b_router)
    activation, width = _activation(experts), stacked_out.shape[2]
    _require_plain_gating(experts, activation)
    shared, shared_gate = getattr(mlp, "shared_expert", None), _tensor(_bare(getattr(mlp, "shared_expert_gate", None)), "weight")
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
        shared=None if shared is None else _ffn(shared, bridged=True, norm=norm, where=f"{where}'s shared expert"),
        W_shared_gate=None if shared_gate is None else shared_gate.T,
    )


def _hooked_mixture(model: Any, mlp: Any, norm: NormWeights | None) -> MoEWeights:
    def weight(owner: Any, name: str) -> Tensor:
        linear = getattr(owner, name, None)
        tensor = _tensor(linear, "weight")
        if tensor is None or _tensor(linear, "bias") is not None:
            raise _Refused(f"a {name} that is no projection without bias")
        return tensor.T

    activation = _activation(mlp.experts[0])
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


def _require_nothing_else(bare: nn.Module, layer: MoEWeights) -> None:
    """Whatever parameter or buffer has not been read does something that is not known."""
    parts = [layer, *layer.experts, *([] if layer.shared is None else [layer.shared])]
    # A tensor has been read if a view begins where it begins.
    read = {value.data_ptr() for part in parts for value in vars(part).values() if isinstance(value, Tensor)}
    for name, tensor in (*bare.named_parameters(), *bare.named_buffers()):
        if tensor.data_ptr() not in read:
            raise _Refused(name.replace("_original_component.", ""))


class LiveWeights(ModelWeights):
    """The blocks of a live TransformerLens model; tensors are views of its parameters where the layout allows."""

    def __init__(self, model: Any):
        self._model = model

    @property
    def name(self) -> str:
        """What the model is called in results."""
        return str(getattr(self._model.cfg, "model_name", "model"))

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self._model.cfg.d_model

    def __len__(self) -> int:
        return self._model.cfg.n_layers

    def _read(self, block: int) -> BlockWeights:
        module: Any = self._model.blocks[block]
        norms = _norms(self._model, module)
        where = f"block {block}"
        sublayers = _sublayers(module)
        for name, sublayer in sublayers.items():
            if sublayer is None:
                raise ValueError(f"model: {where} has no {name}; allowed: blocks with one attention and one FFN")
        _refuse_norms_inside(module, where)
        mlp, bridged = sublayers["mlp"], hasattr(self._model, "original_model")
        if _has_experts(mlp):
            ffn = _mixture(self._model, mlp, bridged=bridged, norm=norms["ln2"], where=where)
        else:
            ffn = _ffn(mlp, bridged=bridged, norm=norms["ln2"], where=where)
        return BlockWeights(
            block=block,
            attention=_attention(module, norms, where),
            ffn=replace(ffn, post_norm=norms["ln2_post"], output_scale=_output_scale(module)),
            parallel=bool(self._model.cfg.parallel_attn_mlp),
        )
