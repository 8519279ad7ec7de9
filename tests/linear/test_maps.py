"""Maps by products against dense matrices, and against what models compute."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import zoo
from dense import attention_matrix, block_matrix, ffn_matrix
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import blocks, mixtures, random_block, random_mixture
from recording import record, relative_error

from sd_lens.linear.inputs import GaussianInput
from sd_lens.linear.linearize import PostScales, linearize
from sd_lens.linear.maps import DenseMap, IdentityPlus
from sd_lens.models.loading import weights_of
from sd_lens.models.weights import MoEWeights

SCALES = PostScales(0.7, 1.9)
UNIT = "FFN fitted to N(0, I) at the projections"
FAMILIES = list(zoo.FAMILIES)
MIXTURES = [family.name for family in zoo.FAMILIES.values() if family.moe]


def _parts(linear):
    return {"A": linear.attention, "F": linear.ffn, "R": linear.update, "L": linear.block, "itself": linear}


def _options(name):
    return {"post_scales": SCALES} if zoo.FAMILIES[name].post_norm else {}


def _matrices(block, scales=(1.0, 1.0)):
    whole = block_matrix(block, scales)
    return {
        "A": attention_matrix(block.attention, scales[0]),
        "F": ffn_matrix(block.ffn, scales[1]),
        "R": whole - torch.eye(block.d_model, dtype=torch.float64),
        "L": whole,
        "itself": whole,
    }


def _vectors(d, *batch, seed=0, dtype=torch.float64):
    return torch.randn(*batch, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-14 + 1e-10 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_maps_of_every_architecture_are_the_dense_ones(name):
    for weights in weights_of(zoo.build(name, dtype=torch.float64)):
        matrices = _matrices(weights, SCALES)
        for part, linear in _parts(linearize(weights, **_options(name))).items():
            _close(linear.to_dense(), matrices[part])
            x = _vectors(weights.d_model, 2, 3)
            _close(linear.mv(x), x @ matrices[part].T)
            _close(linear.rmv(x), x @ matrices[part])


@given(block=blocks, seed=st.integers(0, 999))
def test_products_are_those_of_a_matrix_and_its_transpose(block, seed):
    x, y = _vectors(block.d_model, 2, seed=seed)
    matrices = _matrices(block)
    for part, linear in _parts(linearize(block)).items():
        matrix = matrices[part]
        _close(linear.mv(x), matrix @ x)
        _close(linear.rmv(y), matrix.T @ y)
        scale = float(matrix.abs().sum() * x.abs().max() * y.abs().max())
        assert abs(float(linear.mv(x) @ y - x @ linear.rmv(y))) < 1e-13 * scale


@settings(max_examples=20)
@given(block=blocks, mixture=mixtures, after=st.booleans(), seed=st.integers(0, 999))
def test_so_are_those_of_mixtures_and_of_norms_after_the_sublayers(block, mixture, after, seed):
    ffn = random_mixture(d_model=block.d_model, **mixture)
    post = replace(ffn.norm, gain=ffn.norm.gain.flip(0)) if after else None
    block = replace(block, ffn=ffn, attention=replace(block.attention, post_norm=post))
    linear = linearize(block, post_scales=SCALES if after or ffn.post_norm is not None else None)
    x, y = _vectors(block.d_model, 2, seed=seed)
    for part, matrix in _matrices(block, SCALES).items():
        map_ = _parts(linear)[part]
        _close(map_.mv(x), matrix @ x)
        _close(map_.rmv(y), matrix.T @ y)
        scale = float(matrix.abs().sum() * x.abs().max() * y.abs().max())
        assert abs(float(map_.mv(x) @ y - x @ map_.rmv(y))) < 1e-13 * scale


@settings(max_examples=15)
@given(block=blocks, seed=st.integers(0, 999), batch=st.lists(st.integers(1, 3), max_size=3))
def test_any_number_of_batch_axes(block, seed, batch):
    x = _vectors(block.d_model, *batch, seed=seed)
    for linear in _parts(linearize(block)).values():
        for product in (linear.mv, linear.rmv):
            one_by_one = torch.stack([product(row) for row in x.reshape(-1, block.d_model)]).reshape(x.shape)
            torch.testing.assert_close(product(x), one_by_one, rtol=1e-11, atol=1e-12)


def _scale(norm, x):
    """What a norm divides by; 1 where there is none."""
    if norm is None:
        return torch.ones(*x.shape[:-1], 1, dtype=x.dtype)
    squares = x.var(-1, correction=0, keepdim=True) if norm.kind == "layer" else x.pow(2).mean(-1, keepdim=True)
    return (squares + norm.eps).sqrt()


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_of_a_token_alone_is_the_affine_map_at_the_norms_scales(name):
    model = zoo.build(name, dtype=torch.float64)
    # Models take the root mean square, and OLMo the mean, in float32.
    tolerance = 1e-6 if zoo.FAMILIES[name].norm == "rms" or name == "olmo" else 1e-12
    for weights in weights_of(model):
        points = [f"blocks.{weights.block}.{point}" for point in ("hook_resid_pre", "attn.hook_z", "hook_attn_out")]
        recorded = record(model, zoo.tokens(model, batch=4, pos=1), points)
        resid, z, out = (tensor.squeeze(1) for tensor in recorded.values())
        layer = weights.attention
        written = torch.einsum("nhe,hed->nd", z.reshape(-1, *layer.W_O.shape[:2]), layer.W_O)
        written = written if layer.b_O is None else written + layer.b_O
        for x, between, wanted in zip(resid, written, out, strict=True):
            scales = PostScales(float(_scale(layer.post_norm, between)), 1.0) if layer.post_norm else None
            attention = linearize(weights, post_scales=scales).attention
            assert relative_error(attention.affine(x / _scale(layer.norm, x)), wanted) < tolerance


@pytest.mark.parametrize("name", FAMILIES)
def test_the_ffns_best_linear_fit_is_approached_as_one_over_the_root_of_samples(name):
    weights = weights_of(zoo.build(name, dtype=torch.float64))[1]
    exact = linearize(weights, **_options(name)).ffn
    wanted, offset = exact.to_dense(), exact.offset
    errors, offsets = [], []
    for samples in (2_000, 8_000, 32_000):
        runs = [linearize(weights, estimator="sampled", samples=samples, seed=seed, **_options(name)).ffn for seed in range(2)]
        errors.append(np.mean([float((run.to_dense() - wanted).norm() / wanted.norm()) for run in runs]))
        offsets.append(np.mean([float((run.offset - offset).norm() / offset.norm()) for run in runs]))
    assert errors[2] < 0.1
    assert offsets[2] < 0.1
    assert all(1.5 < ratio < 2.7 for ratio in (errors[0] / errors[1], errors[1] / errors[2])), errors


@pytest.mark.parametrize("name", FAMILIES)
def test_the_affine_map_of_the_ffn_is_its_mean_and_its_slope(name):
    # With little noise a smooth layer is its own linear fit: the offset and the map are tested together, biases and all.
    weights = weights_of(zoo.build(name, dtype=torch.float64))[2]
    if isinstance(weights.ffn, MoEWeights):  # whose router is no smooth function
        return
    layer, d = weights.ffn, weights.d_model
    at = _vectors(d, seed=3)
    x = at if layer.norm is None else layer.norm.center(at) * layer.norm.gain + (0 if layer.norm.bias is None else layer.norm.bias)
    hidden = layer.hidden(x)
    bare = hidden @ layer.W_out + (0 if layer.b_out is None else layer.b_out)
    scales = PostScales(1.0, float(_scale(layer.post_norm, bare))) if layer.post_norm else None
    fitted = linearize(weights, inputs=GaussianInput(x, torch.full((d,), 1e-10, dtype=torch.float64)), post_scales=scales).ffn
    assert relative_error(fitted.affine(at), layer.output(hidden)) < 1e-4


@pytest.mark.parametrize("name", MIXTURES)
def test_the_experts_of_a_mixture_are_maps_of_their_own(name):
    weights = weights_of(zoo.build(name, dtype=torch.float64))[1]
    router = torch.tensor([0.5, 0.1, 0.0, 0.25])
    linear = linearize(weights, router=router)
    for expert, layer in zip(linear.ffn.experts, weights.ffn.experts, strict=True):
        _close(expert.to_dense(), ffn_matrix(layer))
    _close(linear.ffn.to_dense(), ffn_matrix(weights.ffn, router=router))
    gate = () if weights.ffn.W_shared_gate is None else ("gate of the shared expert at its mean, 0.5",)
    assert linear.notes == (UNIT, "router weights given over 4 experts", *gate)
    assert linearize(weights).notes == (UNIT, "router weights uniform over 4 experts", *gate)


def test_a_mixture_of_equal_experts_is_one_of_them():
    ffn = random_block(seed=2).ffn
    moe = MoEWeights((ffn, ffn, ffn), torch.randn(10, 3).double(), None, 2, True, ffn.norm)
    block = replace(random_block(seed=2), ffn=moe)
    _close(linearize(block).ffn.to_dense(), linearize(random_block(seed=2)).ffn.to_dense())
    _close(linearize(block).offset, linearize(random_block(seed=2)).offset)
    shared = replace(block, ffn=replace(moe, shared=ffn))
    _close(linearize(shared).ffn.to_dense(), 2 * linearize(block).ffn.to_dense())
    gate = torch.linspace(-1, 1, 10).double().unsqueeze(-1)
    gated = replace(block, ffn=replace(moe, shared=ffn, W_shared_gate=gate))
    inputs = GaussianInput(torch.full((10,), 0.3).double() * gate.squeeze(-1), torch.full((10,), 0.2).double())
    x = inputs.mean + torch.randn(400_000, 10, generator=torch.Generator().manual_seed(0)).double() * 0.2**0.5
    assert linearize(gated, inputs=inputs).ffn.shared_weight == pytest.approx(float(torch.sigmoid(x @ gate).mean()), rel=2e-3)


@pytest.mark.parametrize("router", [torch.ones(3), torch.tensor([0.5, 0.5, -0.1, 0.1]), torch.full((4,), float("nan"))], ids=str)
def test_router_weights_that_are_none_are_refused(router):
    with pytest.raises(ValueError, match=r"router: got \(\d,\) numbers; allowed: 4 finite ones"):
        linearize(weights_of(zoo.cached("mixtral"))[0], router=router)


@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_no_block_is_refused():
    with pytest.raises(
        ValueError, match=r"weights: got TransformerBridge; allowed: BlockWeights, such as weights_of\(model\)\[block\]"
    ):
        linearize(zoo.cached("llama"))


@pytest.mark.usefixtures("as_users_run_it")
def test_a_matrix_is_a_map():
    matrix = _vectors(5, 5)
    map_ = DenseMap(matrix)
    assert torch.equal(map_.to_dense(), matrix)
    _close(map_.rmv(matrix[0]), matrix.T @ matrix[0])
    assert DenseMap(matrix.bfloat16()).like.dtype == torch.float32
    with pytest.raises(ValueError, match=r"matrix: got shape \(2, 5\); allowed: a square matrix"):
        DenseMap(matrix[:2])


def test_options_that_a_block_has_no_use_for_are_refused():
    with pytest.raises(ValueError, match="router: got weights of experts for block 0, which is dense"):
        linearize(random_block(), router=torch.ones(2))
    with pytest.raises(ValueError, match=r"post_scales: got .*, but block 0 has no norm after a sublayer"):
        linearize(random_block(), post_scales=PostScales(1.0, 1.0))
    with pytest.raises(ValueError, match=r"post_scales: got \(0.0, 1.0\); allowed: two positive numbers"):
        linearize(random_block(post_norm=True), post_scales=PostScales(0.0, 1.0))


@pytest.mark.parametrize("name", [family.name for family in zoo.FAMILIES.values() if family.post_norm])
def test_norms_after_the_sublayers_are_taken_at_the_typical_scale_of_what_they_read(name):
    weights = weights_of(zoo.build(name, dtype=torch.float64))[1]
    linear = linearize(weights)
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(40_000, weights.d_model, generator=generator, dtype=torch.float64)
    attention, ffn = weights.attention, weights.ffn
    bare = replace(attention, norm=None, post_norm=None)
    through = x if attention.norm is None else x * attention.norm.gain
    wanted = bare.alone(through).square().mean().sqrt()
    assert linear.attention.post_scale == pytest.approx(float(wanted), rel=0.05)
    wanted = replace(ffn, norm=None, post_norm=None)(x).square().mean().sqrt()
    assert linear.ffn.post_scale == pytest.approx(float(wanted), rel=0.05)
    assert linear.notes[1].startswith(f"norms after the sublayers at scales {linear.attention.post_scale:.4g} and ")
    given = linearize(weights, post_scales=SCALES)
    assert given.notes == (
        UNIT,
        "norms after the sublayers at scales 0.7 and 1.9 (given)",
    )
    ratio = linear.attention.post_scale / SCALES.attention
    _close(given.attention.to_dense(), ratio * linear.attention.to_dense())


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox_parallel", "bloom", "qwen2"])
def test_the_papers_convention_has_no_biases_and_no_centring(name):
    weights = weights_of(zoo.build(name, dtype=torch.float64))[0]
    attention, ffn = weights.attention, weights.ffn
    bare_norm = {part: replace(layer.norm, kind="rms", bias=None) for part, layer in (("a", attention), ("f", ffn))}
    bare = replace(
        weights,
        attention=replace(attention, b_V=None, b_O=None, norm=bare_norm["a"]),
        ffn=replace(ffn, b_in=None, b_gate=None, b_out=None, b_hidden=None, norm=bare_norm["f"]),
    )
    linear = linearize(weights, paper=True)
    for part, matrix in _matrices(bare).items():
        _close(_parts(linear)[part].to_dense(), matrix)
    assert torch.allclose(linear.to_dense(), linearize(weights).to_dense()) == (name == "qwen2")  # which has a bias of values only
    assert linear.notes == (UNIT, "biases and mean subtraction left out, as in the paper")
    zero_mean = linear.ffn.fit.mean_hidden @ ffn.W_out  # an even activation part has a mean without any bias
    _close(linear.ffn.offset, zero_mean)
    assert not linear.attention.offset.any()


@given(block=blocks)
def test_the_offset_is_what_the_affine_map_makes_of_zero(block):
    linear = linearize(block)
    zero = torch.zeros(block.d_model, dtype=torch.float64)
    a, f = linear.attention.offset, linear.ffn.offset
    torch.testing.assert_close(linear.offset, a + f + (0 if block.parallel else ffn_matrix(block.ffn) @ a), rtol=1e-9, atol=1e-10)
    assert torch.equal(linear.affine(zero), linear.offset)
    values = block.attention.values(zero if block.attention.norm.bias is None else block.attention.norm.bias)
    torch.testing.assert_close(
        a, block.attention.output(values.repeat_interleave(block.attention.group_size, 0)), rtol=1e-9, atol=1e-10
    )


@pytest.mark.usefixtures("as_users_run_it")
def test_unknown_estimators_are_refused():
    with pytest.raises(ValueError, match="estimator: got 'lstsq'; allowed: 'closed_form', 'sampled'"):
        linearize(random_block(), estimator="lstsq")


@pytest.mark.usefixtures("as_users_run_it")
def test_unknown_inputs_are_refused():
    with pytest.raises(ValueError, match="inputs: got 'data'"):
        linearize(random_block(), inputs="data")


def test_the_gain_can_be_part_of_the_fit():
    # With a gain of one and no bias the two kinds of input are the same; else they are not.
    block = random_block(biases=False)
    plain = replace(block, ffn=replace(block.ffn, norm=replace(block.ffn.norm, gain=torch.ones(10).double())))
    assert torch.equal(linearize(plain).ffn.to_dense(), linearize(plain, inputs="gain").ffn.to_dense())
    assert not torch.allclose(linearize(block).ffn.to_dense(), linearize(block, inputs="gain").ffn.to_dense())
    assert torch.equal(linearize(block).attention.to_dense(), linearize(block, inputs="gain").attention.to_dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_maps_of_lower_precision_compute_in_float32(dtype):
    weights = random_block(dtype=dtype, seed=2)
    linear = linearize(weights)
    assert linear.like.dtype == torch.float32
    assert relative_error(linear.to_dense(), block_matrix(weights)) < 1e-5


@settings(max_examples=15)
@given(block=blocks, seed=st.integers(0, 999))
def test_scipy_sees_the_same_map(block, seed):
    d = block.d_model
    matrices = _matrices(block)
    rng = np.random.default_rng(seed)
    vector, columns = rng.standard_normal(d), rng.standard_normal((d, 3))
    for part, linear in _parts(linearize(block)).items():
        operator, matrix = linear.as_linear_operator(), matrices[part].numpy()
        assert operator.shape == linear.shape == (d, d)
        for product, wanted in (
            (operator @ vector, matrix @ vector),
            (operator.rmatvec(vector), matrix.T @ vector),
            (operator.T @ vector, matrix.T @ vector),
            (operator.matvec(columns[:, :1]), matrix @ columns[:, :1]),
            (operator @ columns, matrix @ columns),
            (operator.rmatmat(columns), matrix.T @ columns),
            (operator.T @ columns, matrix.T @ columns),
        ):
            assert product.shape == wanted.shape
            np.testing.assert_allclose(product, wanted, rtol=1e-9, atol=1e-9 * np.abs(matrix).max())


def test_parts_know_what_they_are():
    sequential, parallel = (linearize(random_block(parallel=flag, seed=7)) for flag in (False, True))
    assert (sequential.block_index, sequential.parallel, parallel.parallel) == (7, False, True)
    assert isinstance(sequential.block, IdentityPlus)
    cross = sequential.to_dense() - parallel.to_dense()  # same weights: what is left is F A
    _close(cross, ffn_matrix(random_block(seed=7).ffn) @ attention_matrix(random_block(seed=7).attention))
    assert repr(sequential.ffn) == "FFNMap(d_model=10, dtype=torch.float64, device=cpu)"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_map_needs_no_memory_beside_its_coefficients(name):
    # The FFN's matrices are the model's own: what a map adds is one number or two per neuron.
    model = zoo.cached(name)
    weights = weights_of(model)[0]
    linear = linearize(weights)
    assert linear.like.data_ptr() == weights.ffn.W_out.data_ptr()
    assert linear.ffn.fit.in_coefficient.shape == (zoo.D_FF,)
