"""The algebra of block weights, against formulas written with torch's own layers."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from layers import blocks, random_block

from sd_lens.models.weights import ModelWeights, NormWeights, split_heads


def _norm(kind, d, *, bias=True, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gain, shift = torch.randn(2, d, generator=generator, dtype=torch.float64).to(dtype)
    return NormWeights(kind, gain, shift if bias else None, 1e-3)


def _torch_norm(norm, x):
    bias = torch.zeros_like(x[0]) if norm.bias is None else norm.bias.to(x.dtype)
    gain, width = norm.gain.to(x.dtype), norm.gain.shape
    if norm.kind == "layer":
        return F.layer_norm(x, width, gain, bias, norm.eps)
    return F.rms_norm(x, width, gain, norm.eps) + bias


@given(
    kind=st.sampled_from(["layer", "rms"]),
    d=st.integers(2, 20),
    bias=st.booleans(),
    seed=st.integers(0, 999),
    size=st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_norms_are_torchs(kind, d, bias, seed, size):
    norm = _norm(kind, d, bias=bias, seed=seed)
    x = size * torch.randn(3, d, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    torch.testing.assert_close(norm(x), _torch_norm(norm, x), rtol=1e-12, atol=1e-12)
    # The parts of which linear maps are made.
    assembled = norm.center(x) / norm.scale(x) * norm.gain + (0 if norm.bias is None else norm.bias)
    torch.testing.assert_close(assembled, _torch_norm(norm, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_compute_in_float32_and_answer_in_their_inputs_dtype(kind, dtype):
    norm = _norm(kind, 64, dtype=dtype)
    x = (30 * torch.randn(5, 64, generator=torch.Generator().manual_seed(1)) + 100).to(dtype)
    got = norm(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, _torch_norm(norm, x.float()).to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
    # Squares of float16 numbers above 255 overflow in float16.
    assert bool(torch.isfinite(norm(10 * x)).all())


@given(block=blocks, seed=st.integers(0, 999))
def test_layers_compute_what_their_formulas_say(block, seed):
    x = torch.randn(2, 3, block.d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    attention, ffn = block.attention, block.ffn
    normed = _torch_norm(attention.norm, x.flatten(0, 1))
    heads = attention.n_heads
    out = torch.zeros_like(normed) if attention.b_O is None else attention.b_O.expand_as(normed)
    for head in range(heads):
        shared = head // (heads // attention.W_V.shape[0])
        value = normed @ attention.W_V[shared] + (0 if attention.b_V is None else attention.b_V[shared])
        out = out + value @ attention.W_O[head]
    torch.testing.assert_close(attention.alone(x).flatten(0, 1), out)

    normed = _torch_norm(ffn.norm, x.flatten(0, 1))
    linear = F.linear(normed, ffn.W_in.T, ffn.b_in)
    if ffn.gated:
        hidden = ffn.activation(F.linear(normed, ffn.W_gate.T, ffn.b_gate)) * linear
        hidden = hidden if ffn.b_hidden is None else hidden + ffn.b_hidden
    else:
        hidden = ffn.activation(linear)
    torch.testing.assert_close(ffn(x).flatten(0, 1), F.linear(hidden, ffn.W_out.T, ffn.b_out))


def test_a_norm_after_a_sublayer_is_applied_to_its_output_with_biases():
    block = random_block(post_norm=True)
    bare = random_block(post_norm=False)
    attention = replace(block.attention, post_norm=None)
    ffn = replace(block.ffn, post_norm=None)
    x = torch.randn(4, block.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(block.attention.alone(x), _torch_norm(block.attention.post_norm, attention.alone(x)))
    torch.testing.assert_close(block.ffn(x), _torch_norm(block.ffn.post_norm, ffn(x)))
    assert bare.attention.post_norm is None


FULL = random_block(post_norm=True, seed=5)
NAMES = [
    *(f"attention.{name}" for name in ("W_V", "W_O", "b_V", "b_O")),
    *(f"ffn.{name}" for name in ("W_in", "W_out", "W_gate", "b_in", "b_gate", "b_out", "b_hidden")),
    *(f"{layer}.{norm}.{part}" for layer in ("attention", "ffn") for norm in ("norm", "post_norm") for part in ("gain", "bias")),
]


def _with(owner, path, value):
    """A copy of nested dataclasses with one field replaced."""
    name, _, rest = path.partition(".")
    return replace(owner, **{name: _with(getattr(owner, name), rest, value) if rest else value})


def _get(owner, path):
    for name in path.split("."):
        owner = getattr(owner, name)
    return owner


def test_named_tensors_are_all_tensors():
    named = dict(FULL.named_tensors())
    assert sorted(named) == sorted(NAMES)
    assert all(tensor is _get(FULL, name) for name, tensor in named.items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_a_number_that_is_none_is_found_in_any_tensor(name, bad):
    FULL.require_finite()
    tensor = _get(FULL, name).clone()
    tensor.view(-1)[:2] = bad
    with pytest.raises(ValueError, match=rf"{name} of block 5 holds 2 NaN or infinite entries; allowed: finite"):
        _with(FULL, name, tensor).require_finite()


def test_blocks_are_read_when_asked_for_and_not_kept():
    read = []

    class Counting(ModelWeights):
        d_model = 10

        def __len__(self):
            return 4

        def _read(self, block):
            read.append(block)
            return random_block(seed=block)

    weights = Counting()
    assert not read
    assert [weights[3].block, weights[-4].block, weights[3].block] == [3, 0, 3]
    assert read == [3, 0, 3]
    assert [block.block for block in weights] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="block: got 4; allowed: 0 to 3"):
        weights[4]


def test_split_heads_is_a_view_with_each_heads_columns():
    weight = torch.arange(24.0).reshape(2, 12)
    heads = split_heads(weight, 3)
    assert torch.equal(torch.cat(list(heads), dim=1), weight)
    assert heads.data_ptr() == weight.data_ptr()
