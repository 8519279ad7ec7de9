"""What the tests of interventions share: subspaces of random models, what an FFN answers, and models of one weights on both kinds."""

from __future__ import annotations

import functools
from typing import Any

import torch
import zoo
from torch import Tensor

from sd_lens.interventions.subspace import ExplosionSubspace
from sd_lens.linear.trigger import normalised
from sd_lens.models.loading import weights_of
from sd_lens.models.weights import BlockWeights, MoEWeights

TWINS = ("llama", "gpt2", "gpt_neox_parallel", "mistral")
"""Families of the zoo that `twin` can make a HookedTransformer of: grouped heads, learned positions, parallel blocks, a sliding window."""


def random_subspace(
    model: Any, block: int = 1, rank: int = 2, seed: int = 0, delimiters: tuple[int, ...] = ()
) -> ExplosionSubspace:
    """A subspace that has nothing to do with the weights, but that a LayerNorm's input can have: of mean zero on the trigger side."""
    norm = weights_of(model)[block].ffn.norm
    width = int(model.cfg.d_model)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, width, rank, generator=generator, dtype=torch.float64)
    if norm is not None and norm.kind == "layer":
        drawn = drawn - drawn.mean(1, keepdim=True)
    right, left = torch.linalg.qr(drawn).Q.float()
    return ExplosionSubspace(model, block, right, left, torch.ones(rank), delimiters)


def entering(weights: BlockWeights, seen: dict[str, Tensor]) -> Tensor:
    """The stream that a block's FFN reads, of what hooks showed."""
    pre = seen[f"blocks.{weights.block}.hook_resid_pre"]
    return pre if weights.parallel else pre + seen[f"blocks.{weights.block}.hook_attn_out"]


def normalised_stream(weights: BlockWeights, seen: dict[str, Tensor]) -> Tensor:
    """What the FFN's linear map acts on."""
    return normalised(weights.ffn, entering(weights, seen))


def answer(weights: BlockWeights, x: Tensor) -> Tensor:
    """What a block's FFN adds to the stream, of the normalised stream."""
    ffn = weights.ffn
    if ffn.norm is not None:
        x = x * ffn.norm.gain.to(x)
        x = x if ffn.norm.bias is None else x + ffn.norm.bias.to(x)
    return ffn.output(x) if isinstance(ffn, MoEWeights) else ffn.output(ffn.hidden(x))


def without(vectors: Tensor, x: Tensor) -> Tensor:
    """Activations less their component in the span of orthonormal columns."""
    vectors = vectors.to(x)
    return x - x @ vectors @ vectors.T


@functools.cache
def twin(name: str) -> Any:
    """A HookedTransformer (3.9) with the very weights of the zoo's bridge family ``name``."""
    return hooked(zoo.hf_model(name), **{key: value for key, value in zoo._HOOKED[name][0].items() if key not in zoo._HOOKED_BASE})


def hooked(model: Any, **options: Any) -> Any:
    """A HookedTransformer with the weights of a Hugging Face model.

    Args:
        model: The Hugging Face model.
        **options: Keywords of its HookedTransformerConfig, beside the sizes, which are read off the model.
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained import weight_conversions

    config = model.config
    heads = config.num_attention_heads
    cfg = HookedTransformerConfig(
        d_model=config.hidden_size,
        n_heads=heads,
        d_head=getattr(config, "head_dim", None) or config.hidden_size // heads,
        n_layers=config.num_hidden_layers,
        n_ctx=config.max_position_embeddings,
        d_vocab=config.vocab_size,
        d_mlp=getattr(config, "n_inner", None) or config.intermediate_size,
        eps=getattr(config, "rms_norm_eps", None) or getattr(config, "layer_norm_eps", None) or config.layer_norm_epsilon,
        device="cpu",
        **options,
    )
    convert = {"gpt_neox": "neox"}.get(config.model_type, config.model_type)
    state = getattr(weight_conversions, f"convert_{convert}_weights")(model, cfg)
    made = HookedTransformer(cfg)
    made.load_and_process_state_dict(
        {key: value.detach() for key, value in state.items()},
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return made.eval()


MAKERS = {
    "ablate": lambda subspace, source, **where: subspace.ablate(**where),
    "mean ablate": lambda subspace, source, **where: subspace.ablate(mean=source, **where),
    "patch": lambda subspace, source, **where: subspace.patch(source, **where),
    "steer": lambda subspace, source, **where: subspace.steer(-1.5, **where),
    "target": lambda subspace, source, **where: subspace.steer(target=torch.tensor([2.0, -3.0]), **where),
    "control": lambda subspace, source, **where: subspace.ablate(**where).control(seed=1),
}
"""Every kind of intervention, of a subspace of rank 2 and the tokens of another run; ``where`` is its side and positions."""
