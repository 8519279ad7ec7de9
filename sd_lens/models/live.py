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
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sd_lens.models.mixtures import has_experts, mixture
from sd_lens.models.modules import bare, dense_ffn, required_tensor, tensor_of
from sd_lens.models.weights import AttentionWeights, BlockWeights, ModelWeights, NormWeights

# Architectures without a norm before the sublayers whose norms after them TransformerLens 3.9 calls ln1 and ln2.
_POST_NORM_ONLY = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")
_NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")


def _sublayers(block: Any) -> dict[str, Any]:
    """A block's attention and FFN, None where it has no such thing."""
    # Granite 4 calls its dense FFN a shared one, also in models without experts to share a block with.
    mlp = getattr(block, "mlp", None) or (None if getattr(block, "moe", None) else getattr(block, "shared_mlp", None))
    return {"attn": getattr(block, "attn", None), "mlp": mlp}


def _refuse_norms_inside(block: Any, where: str, parts: tuple[str, ...] = ("attn", "mlp")) -> None:
    """Raises `ValueError` where a norm stands between a sublayer's weights: BitNet has some before its output projections."""
    # OPT has no module for its FFN, so the bridge's is the whole block, with the block's own norms.
    around = {bare(getattr(block, name, None)) for name in _NORMS}
    for part, sublayer in _sublayers(block).items():
        if part not in parts:
            continue
        for name, module in bare(sublayer).named_modules():
            leaf = name.removesuffix("._original_component").rpartition(".")[2]
            of_query_or_key = leaf.startswith(("q", "k")) and not leaf.startswith("kv")
            if "Norm" in type(module).__name__ and not of_query_or_key and bare(module) not in around:
                raise ValueError(
                    f"model: {where} has a norm inside its {part}, {leaf}; allowed: norms around sublayers and of queries and keys"
                )


def architecture(model: Any) -> str:
    """The Hugging Face class name of the model's architecture, or an empty string where none is recorded."""
    cfg = model.cfg
    return getattr(cfg, "architecture", None) or getattr(cfg, "original_architecture", None) or ""


def _norm(model: Any, block: Any, name: str) -> NormWeights | None:
    module = getattr(block, name, None)
    if module is None or isinstance(bare(module), nn.Identity):
        return None
    cfg = model.cfg
    rms = getattr(module, "uses_rms_norm", getattr(cfg, "uses_rms_norm", False)) or str(cfg.normalization_type).startswith("RMS")
    # TransformerLens 4 knows this of every norm, 3.9 of the model, and there not of Nemotron's LayerNorm1P.
    offset = getattr(module, "uses_weight_offset", getattr(cfg, "rmsnorm_uses_offset", False))
    offset = offset or type(bare(module)).__name__.endswith("Norm1P")
    gain = tensor_of(module, "w")
    if gain is None:
        like = next(block.parameters())
        gain = torch.ones(cfg.d_model, dtype=like.dtype, device=like.device)
    elif offset:
        gain = gain.to(torch.promote_types(gain.dtype, torch.float32)) + 1  # half precision would round the sum
    return NormWeights("rms" if rms else "layer", gain, tensor_of(module, "b"), float(cfg.eps))


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


def _attention(block: Any, norms: dict[str, NormWeights | None], where: str) -> AttentionWeights:
    attn = block.attn
    # HookedTransformer's W_V repeats grouped heads; the parameter behind it does not.
    grouped_weight, grouped_bias = tensor_of(attn, "_W_V"), tensor_of(attn, "_b_V")
    return AttentionWeights(
        W_V=grouped_weight if grouped_weight is not None else required_tensor(attn, "W_V", where),
        W_O=required_tensor(attn, "W_O", where),
        b_V=grouped_bias if grouped_weight is not None else tensor_of(attn, "b_V"),
        b_O=tensor_of(attn, "b_O"),
        norm=norms["ln1"],
        post_norm=norms["ln1_post"],
        output_scale=_output_scale(block),
    )


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

    def attention(self, block: int) -> AttentionWeights:
        """Reads one block's attention layer, whatever its FFN is like.

        Raises:
            ValueError: The block has no attention, or one that cannot be read.
        """
        module: Any = self._model.blocks[block]
        where = f"block {block}"
        if _sublayers(module)["attn"] is None:
            raise ValueError(f"model: {where} has no attn; allowed: blocks with one attention")
        _refuse_norms_inside(module, where, ("attn",))
        return _attention(module, _norms(self._model, module), where)

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
        if has_experts(mlp):
            ffn = mixture(self._model, mlp, bridged=bridged, norm=norms["ln2"], where=where)
        else:
            ffn = dense_ffn(mlp, bridged=bridged, norm=norms["ln2"], where=where)
        return BlockWeights(
            block=block,
            attention=_attention(module, norms, where),
            ffn=replace(ffn, post_norm=norms["ln2_post"], output_scale=_output_scale(module)),
            parallel=bool(self._model.cfg.parallel_attn_mlp),
        )
