"""Random block weights of any shape, and hypothesis' way of drawing them."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st

from sd_lens.models.activations import KNOWN
from sd_lens.models.weights import AttentionWeights, BlockWeights, FFNWeights, MoEWeights, NormWeights


def random_block(
    *,
    d_model: int = 10,
    d_head: int = 3,
    kv_heads: int = 2,
    group: int = 2,
    d_mlp: int = 7,
    gated: bool = True,
    kind: str = "rms",
    biases: bool = True,
    parallel: bool = False,
    activation: str = "silu",
    post_norm: bool = False,
    output_scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> BlockWeights:
    """A block with a dense FFN whose every tensor is random, gains and biases too."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def bias(*shape: int) -> torch.Tensor | None:
        return draw(*shape) if biases else None

    def norm() -> NormWeights:
        return NormWeights(kind, 1 + 0.3 * draw(d_model), bias(d_model), 1e-5)

    heads = kv_heads * group
    attention = AttentionWeights(
        W_V=draw(kv_heads, d_model, d_head) / d_model**0.5,
        W_O=draw(heads, d_head, d_model) / (heads * d_head) ** 0.5,
        b_V=bias(kv_heads, d_head),
        b_O=bias(d_model),
        norm=norm(),
        post_norm=norm() if post_norm else None,
        output_scale=output_scale,
    )
    ffn = FFNWeights(
        W_in=draw(d_model, d_mlp) / d_model**0.5,
        W_out=draw(d_mlp, d_model) / d_mlp**0.5,
        W_gate=draw(d_model, d_mlp) / d_model**0.5 if gated else None,
        b_in=bias(d_mlp),
        b_gate=bias(d_mlp) if gated else None,
        b_out=bias(d_model),
        activation=KNOWN[activation],
        norm=norm(),
        post_norm=norm() if post_norm else None,
        b_hidden=bias(d_mlp) if gated else None,
        output_scale=output_scale,
    )
    return BlockWeights(block=seed, attention=attention, ffn=ffn, parallel=parallel)


def random_mixture(
    *,
    experts: int = 5,
    top_k: int = 2,
    renormalized: bool = False,
    shared: bool = False,
    shared_gate: bool = True,
    d_model: int = 10,
    biases: bool = True,
    kind: str = "rms",
    post_norm: bool = False,
    output_scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> MoEWeights:
    """A mixture whose every tensor is random; its experts, and the shared one, have d_mlp 7."""
    generator = torch.Generator().manual_seed(1000 + seed)
    layers = [
        random_block(d_model=d_model, biases=biases, kind=kind, post_norm=post_norm, dtype=dtype, seed=1000 * seed + index).ffn
        for index in range(experts + 1)
    ]
    norm, post = layers[0].norm, layers[0].post_norm
    layers = [replace(layer, norm=norm, post_norm=None) for layer in layers]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return MoEWeights(
        experts=tuple(layers[:experts]),
        W_router=draw(d_model, experts) / d_model**0.5,
        b_router=draw(experts) if biases else None,
        top_k=top_k,
        renormalized=renormalized,
        norm=norm,
        post_norm=post,
        shared=layers[-1] if shared else None,
        W_shared_gate=draw(d_model, 1) if shared and shared_gate else None,
        output_scale=output_scale,
    )


blocks = st.builds(
    random_block,
    d_model=st.integers(2, 12),
    d_head=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    d_mlp=st.integers(1, 9),
    gated=st.booleans(),
    kind=st.sampled_from(["rms", "layer"]),
    biases=st.booleans(),
    parallel=st.booleans(),
    activation=st.sampled_from(sorted(KNOWN)),
    output_scale=st.sampled_from([1.0, 0.3]),
    seed=st.integers(0, 10_000),
)
"""Pre-norm blocks of many shapes, float64."""

# Keywords only: the type checks draw random numbers when they look at a tuple, which a strategy must not.
mixtures = st.fixed_dictionaries(
    {
        "experts": st.integers(2, 5),
        "top_k": st.integers(1, 2),
        "renormalized": st.booleans(),
        "shared": st.booleans(),
        "shared_gate": st.booleans(),
        "biases": st.booleans(),
        "kind": st.sampled_from(["rms", "layer"]),
        "post_norm": st.booleans(),
        "output_scale": st.sampled_from([1.0, 0.3]),
        "seed": st.integers(0, 10_000),
    }
)
"""Keywords of `random_mixture`, for mixtures of experts of many kinds."""
