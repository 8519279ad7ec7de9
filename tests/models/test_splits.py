"""Parts of sublayers along a direction, against the sublayers themselves; the zoo is gone through in tests/tracing/test_attribution.py."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import blocks, mixtures, random_block, random_mixture

from sd_lens.models.splits import ExpertSplit, HeadSplit, NeuronSplit


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def each(layer, inputs, run):
    """What `run` answers to inputs with all but one of their last-but-n axis set to zero, less what it answers to zero."""
    return [
        run(torch.where(torch.arange(inputs.shape[1]).reshape(-1, *[1] * (inputs.ndim - 2)) == i, inputs, 0.0))
        for i in range(inputs.shape[1])
    ]


@given(block=blocks, seed=st.integers(0, 99))
def test_heads(block, seed):
    attention = block.attention
    z, direction = rand(4, *attention.W_O.shape[:2], seed=seed), rand(block.d_model, seed=seed + 1)
    parts, bias = HeadSplit(attention, direction)(z)
    close(parts.sum(-1) + bias, attention.output(z) @ direction)
    silent = attention.output(torch.zeros_like(z)) @ direction
    close(bias, silent)
    for head, answer in enumerate(each(attention, z, attention.output)):
        close(parts[:, head], answer @ direction - silent)


@given(block=blocks, seed=st.integers(0, 99))
def test_neurons(block, seed):
    ffn = block.ffn
    x, direction = rand(4, block.d_model, seed=seed), rand(block.d_model, seed=seed + 1)
    parts, bias = NeuronSplit(ffn, direction)(x)
    close(parts.sum(-1) + bias, ffn.output(ffn.hidden(x)) @ direction)
    silent = ffn.output(torch.zeros_like(ffn.hidden(x))) @ direction
    for neuron, answer in enumerate(each(ffn, ffn.hidden(x), ffn.output)):
        close(parts[:, neuron], answer @ direction - silent)


@given(asked=mixtures, seed=st.integers(0, 99))
def test_experts(asked, seed):
    moe = random_mixture(**asked)
    x, direction = rand(2, 3, 10, seed=seed), rand(10, seed=seed + 1)
    split = ExpertSplit(moe, direction)
    parts, bias = split(x)
    assert parts.shape == (2, 3, split.n_parts)
    close(parts.sum(-1) + bias, moe.output(x) @ direction)
    weights = moe.route(x)
    assert bool((parts[..., : len(moe.experts)][weights == 0] == 0).all())


def test_norms_behind_a_sublayer_are_held_at_the_tokens_own_scale():
    block = random_block(post_norm=True, kind="layer", output_scale=0.3)
    for layer, split, inputs in (
        (block.attention, HeadSplit, rand(5, 4, 3)),
        (block.ffn, NeuronSplit, rand(5, 10)),
    ):
        direction = rand(10, seed=3)
        parts, bias = split(layer, direction)(inputs)
        out = layer.output(inputs) if split is HeadSplit else layer.output(layer.hidden(inputs))
        close(parts.sum(-1) + bias, out @ direction)
        vectors = (
            torch.einsum("thd,hdm->thm", inputs, layer.W_O)
            if split is HeadSplit
            else layer.hidden(inputs).unsqueeze(-1) * layer.W_out
        )
        norm = layer.post_norm
        total = vectors.sum(1) + (layer.b_O if split is HeadSplit else layer.b_out)
        wanted = 0.3 * norm.center(vectors) / norm.scale(total).unsqueeze(1) * norm.gain @ direction
        close(parts, wanted)


def test_the_share_of_a_heads_values_that_is_asked_for():
    attention = random_block(post_norm=True).attention
    z, direction = rand(5, 4, 3), rand(10, seed=3)
    some, split = rand(5, 4, 3, seed=7), HeadSplit(attention, direction)
    all_parts, bias = split(z)
    some_parts, same = split(z, of=some)
    rest, _ = split(z, of=z - some)
    close(some_parts + rest, all_parts)
    close(bias, same)


def test_half_precision_weights_give_float32_parts():
    block = random_block(dtype=torch.bfloat16, post_norm=True)
    parts, bias = NeuronSplit(block.ffn, rand(10).float())(rand(5, 10).bfloat16())
    assert parts.dtype == bias.dtype == torch.float32
