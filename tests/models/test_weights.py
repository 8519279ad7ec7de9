"""The algebra of block weights, against formulas written with torch's own layers."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from layers import blocks, mixtures, random_block, random_mixture

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
    torch.testing.assert_close(attention.alone(x).flatten(0, 1), attention.output_scale * out)

    normed = _torch_norm(ffn.norm, x.flatten(0, 1))
    linear = F.linear(normed, ffn.W_in.T, ffn.b_in)
    if ffn.gated:
        hidden = ffn.activation(F.linear(normed, ffn.W_gate.T, ffn.b_gate)) * linear
        hidden = hidden if ffn.b_hidden is None else hidden + ffn.b_hidden
    else:
        hidden = ffn.activation(linear)
    torch.testing.assert_close(ffn(x).flatten(0, 1), ffn.output_scale * F.linear(hidden, ffn.W_out.T, ffn.b_out))


def test_a_norm_after_a_sublayer_is_applied_to_its_output_with_biases():
    block = random_block(post_norm=True)
    bare = random_block(post_norm=False)
    attention = replace(block.attention, post_norm=None)
    ffn = replace(block.ffn, post_norm=None)
    x = torch.randn(4, block.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(block.attention.alone(x), _torch_norm(block.attention.post_norm, attention.alone(x)))
    torch.testing.assert_close(block.ffn(x), _torch_norm(block.ffn.post_norm, ffn(x)))
    assert bare.attention.post_norm is None


def test_an_output_is_scaled_after_its_norm():
    plain, scaled = random_block(post_norm=True), random_block(post_norm=True, output_scale=0.3)
    x = torch.randn(4, plain.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(scaled.attention.alone(x), 0.3 * plain.attention.alone(x))
    torch.testing.assert_close(scaled.ffn(x), 0.3 * plain.ffn(x))


@given(options=mixtures, seed=st.integers(0, 999))
def test_a_mixture_is_the_sum_of_its_best_experts(options, seed):
    layer = random_mixture(**options)
    x = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    got = layer(x)
    for token, answer in zip(x.flatten(0, 1), got.flatten(0, 1), strict=True):
        normed = _torch_norm(layer.norm, token[None])[0]
        scores = (normed @ layer.W_router + (0 if layer.b_router is None else layer.b_router)).tolist()
        total = sum(math.exp(score) for score in scores)
        best = sorted(range(len(scores)), key=lambda e: -scores[e])[: layer.top_k]
        kept = sum(math.exp(scores[e]) for e in best) if layer.renormalized else total
        # An expert stands alone: it has the mixture's norm.
        out = sum(math.exp(scores[e]) / kept * layer.experts[e](token) for e in best)
        if layer.shared is not None:
            gate = 1.0 if layer.W_shared_gate is None else float(torch.sigmoid(normed @ layer.W_shared_gate[:, 0]))
            out = out + gate * layer.shared(token)
        out = out if layer.post_norm is None else _torch_norm(layer.post_norm, out[None])[0]
        torch.testing.assert_close(answer, layer.output_scale * out)


@pytest.mark.parametrize("renormalized", [False, True])
@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_a_router_keeps_its_best(renormalized, top_k):
    layer = random_mixture(top_k=top_k, renormalized=renormalized)
    x = torch.randn(7, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights, probabilities = layer.route(x), layer.logits(x).softmax(-1)
    chosen = weights > 0
    assert chosen.sum(-1).eq(top_k).all()
    assert probabilities.where(chosen, 2).amin(-1).ge(probabilities.where(~chosen, 0).amax(-1)).all()
    if renormalized:
        torch.testing.assert_close(weights.sum(-1), torch.ones(7, dtype=torch.float64))
    else:
        torch.testing.assert_close(weights, probabilities * chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mixture_of_half_precision_is_routed_in_float32(dtype):
    layer = random_mixture(dtype=dtype, experts=5, top_k=2, renormalized=True)
    x = torch.randn(50, 10, generator=torch.Generator().manual_seed(1)).to(dtype)
    best = layer.logits(x).float().topk(2, dim=-1).values
    wanted = torch.cat([best.softmax(-1), torch.zeros(50, 3)], dim=-1).to(dtype)
    assert torch.equal(layer.route(x).sort(dim=-1, descending=True).values, wanted)
    assert layer(x).dtype == dtype


def test_gradients_reach_every_part_of_a_mixture():
    layer = random_mixture(shared=True)
    x = torch.randn(1, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (jacobian,) = torch.autograd.functional.jacobian(layer, x)[0].unbind(1)
    step = 1e-6 * torch.eye(10, dtype=torch.float64)
    torch.testing.assert_close(jacobian, ((layer(x + step) - layer(x - step)) / 2e-6).T, rtol=1e-5, atol=1e-6)


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


MIXTURE = replace(FULL, ffn=random_mixture(experts=2, shared=True, post_norm=True))


def test_named_tensors_of_a_mixture_are_all_tensors_and_its_norm_once():
    inner = ("W_in", "W_out", "W_gate", "b_in", "b_gate", "b_out", "b_hidden")
    wanted = [name for name in NAMES if name.startswith("attention")]
    wanted += [f"ffn.{norm}.{part}" for norm in ("norm", "post_norm") for part in ("gain", "bias")]
    wanted += [f"ffn.{part}.{name}" for part in ("experts.0", "experts.1", "shared") for name in inner]
    wanted += ["ffn.W_router", "ffn.b_router", "ffn.W_shared_gate"]
    named = dict(MIXTURE.named_tensors())
    assert sorted(named) == sorted(wanted)
    assert named["ffn.experts.1.W_in"] is MIXTURE.ffn.experts[1].W_in
    assert MIXTURE.d_model == 10


def test_a_norm_that_only_one_expert_has_is_named():
    other = replace(MIXTURE.ffn.experts[1], norm=_norm("rms", 10))
    block = replace(MIXTURE, ffn=replace(MIXTURE.ffn, experts=(MIXTURE.ffn.experts[0], other)))
    assert {name for name, _ in block.named_tensors()} - {name for name, _ in MIXTURE.named_tensors()} == {
        "ffn.experts.1.norm.gain",
        "ffn.experts.1.norm.bias",
    }


def test_a_number_that_is_none_is_found_in_an_expert():
    bad = replace(MIXTURE.ffn.experts[1], W_out=MIXTURE.ffn.experts[1].W_out.log())
    block = replace(MIXTURE, ffn=replace(MIXTURE.ffn, experts=(MIXTURE.ffn.experts[0], bad)))
    MIXTURE.require_finite()
    with pytest.raises(ValueError, match=r"ffn\.experts\.1\.W_out of block 5 holds \d+ NaN"):
        block.require_finite()


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
    assert weights.name == "weights"
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
