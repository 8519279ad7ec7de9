"""`BlockWeights` read from a live TransformerLens model; the quirks of its architectures and generations are settled here.

What differs and is not what a name suggests:

- OLMo 2's only norms stand after the sublayers. TransformerLens 4 names them ``ln1_post``/``ln2_post``, 3.9 ``ln1``/``ln2``.
- Parallel blocks may have one norm for both sublayers (Phi, GPT-J, Falcon-7B): then there is no ``ln2`` and the FFN reads ``ln1``'s output.
- `HookedTransformer` adds a gated FFN's ``b_in`` after the product of the branches, `TransformerBridge` before it.
- Gemma's norms multiply by ``1 + w`` on a bridge; `HookedTransformer` has the 1 in ``w`` already.
- The configuration's ``act_fn`` and ``d_mlp`` are wrong on several architectures and are not read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from sd_lens.models.activations import Activation, identify
from sd_lens.models.weights import AttentionWeights, BlockWeights, FFNWeights, ModelWeights, NormWeights

# Architectures without a norm before the sublayers whose norms after them TransformerLens 3.9 calls ln1 and ln2.
_POST_NORM_ONLY = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")
# Where Hugging Face's modules keep their activation function.
_ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "gelu_impl")


def _tensor(owner: Any, name: str) -> Tensor | None:
    """An attribute if it is there and is a tensor: optional weights are absent, None or raise, depending on the architecture."""
    try:
        value = getattr(owner, name)
    except (AttributeError, NotImplementedError):
        return None
    return value.detach() if isinstance(value, Tensor) else None


def _required(owner: Any, name: str, where: str) -> Tensor:
    tensor = _tensor(owner, name)
    if tensor is None:
        raise ValueError(f"model: {where} has no {name}; allowed: blocks with one dense attention and one dense FFN")
    return tensor


def is_mixture_of_experts(model: Any) -> bool:
    """Whether the model's FFNs are mixtures of experts, which have no single ``W_in``."""
    return bool(getattr(model.cfg, "num_experts", None))


def architecture(model: Any) -> str:
    """The Hugging Face class name of the model's architecture, or an empty string where none is recorded."""
    cfg = model.cfg
    return getattr(cfg, "architecture", None) or getattr(cfg, "original_architecture", None) or ""


def _norm(model: Any, block: Any, name: str) -> NormWeights | None:
    module = getattr(block, name, None)
    gain = _tensor(module, "w")
    if module is None or gain is None:
        return None
    cfg = model.cfg
    layer = not (getattr(cfg, "uses_rms_norm", False) or str(cfg.normalization_type).startswith("RMS"))
    if getattr(cfg, "rmsnorm_uses_offset", False):
        gain = gain + 1
    return NormWeights("layer" if layer else "rms", gain, _tensor(module, "b"), float(cfg.eps))


def _norms(model: Any, block: Any) -> dict[str, NormWeights | None]:
    """The norms before and after attention and FFN."""
    norms = {name: _norm(model, block, name) for name in ("ln1", "ln1_post", "ln2", "ln2_post")}
    if architecture(model) in _POST_NORM_ONLY and norms["ln1_post"] is None:
        norms = {"ln1": None, "ln1_post": norms["ln1"], "ln2": None, "ln2_post": norms["ln2"]}
    elif norms["ln2"] is None and model.cfg.parallel_attn_mlp:
        norms["ln2"] = norms["ln1"]
    return norms


def _activation(mlp: Any) -> Activation:
    for owner in (getattr(mlp, "original_component", None), mlp):
        for name in _ACTIVATION_NAMES:
            fn = getattr(owner, name, None)
            if callable(fn):
                return identify(cast("Callable[[Tensor], Tensor]", fn))
    raise ValueError(
        f"model: no activation function found on {type(mlp).__name__}; allowed: an FFN with one of {', '.join(_ACTIVATION_NAMES)}"
    )


def _attention(attn: Any, norms: dict[str, NormWeights | None], where: str) -> AttentionWeights:
    # HookedTransformer's W_V repeats grouped heads; the parameter behind it does not.
    grouped_weight, grouped_bias = _tensor(attn, "_W_V"), _tensor(attn, "_b_V")
    return AttentionWeights(
        W_V=grouped_weight if grouped_weight is not None else _required(attn, "W_V", where),
        W_O=_required(attn, "W_O", where),
        b_V=grouped_bias if grouped_weight is not None else _tensor(attn, "b_V"),
        b_O=_tensor(attn, "b_O"),
        norm=norms["ln1"],
        post_norm=norms["ln1_post"],
    )


def _ffn(model: Any, mlp: Any, norms: dict[str, NormWeights | None], where: str) -> FFNWeights:
    gate, b_in = _tensor(mlp, "W_gate"), _tensor(mlp, "b_in")
    b_gate = _tensor(mlp, "b_gate") if gate is not None else None
    if gate is not None and b_gate is None:
        b_gate = _tensor(getattr(mlp, "gate", None), "bias")
    after_product = gate is not None and not hasattr(model, "original_model")
    return FFNWeights(
        W_in=_required(mlp, "W_in", where),
        W_out=_required(mlp, "W_out", where),
        W_gate=gate,
        b_in=None if after_product else b_in,
        b_gate=b_gate,
        b_out=_tensor(mlp, "b_out"),
        b_hidden=b_in if after_product else None,
        activation=_activation(mlp),
        norm=norms["ln2"],
        post_norm=norms["ln2_post"],
    )


class LiveWeights(ModelWeights):
    """The blocks of a live TransformerLens model; tensors are views of its parameters where the layout allows."""

    def __init__(self, model: Any):
        self._model = model

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self._model.cfg.d_model

    def __len__(self) -> int:
        return self._model.cfg.n_layers

    def _read(self, block: int) -> BlockWeights:
        if is_mixture_of_experts(self._model):
            raise ValueError(f"model: block {block} is a mixture of experts; allowed: blocks with one dense FFN")
        module: nn.Module = self._model.blocks[block]
        norms = _norms(self._model, module)
        where = f"block {block}"
        for name in ("attn", "mlp"):
            if getattr(module, name, None) is None:
                raise ValueError(f"model: {where} has no {name}; allowed: blocks with one dense attention and one dense FFN")
        return BlockWeights(
            block=block,
            attention=_attention(module.attn, norms, where),
            ffn=_ffn(self._model, module.mlp, norms, where),
            parallel=bool(self._model.cfg.parallel_attn_mlp),
        )
