"""Maps by products against dense matrices, and against what models compute."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import zoo
from dense import attention_matrix, block_matrix, ffn_matrix
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import blocks, random_block
from recording import record, relative_error

from sd_lens.linear.maps import IdentityPlus, linearize
from sd_lens.models.loading import weights_of

DENSE = [family for family in zoo.FAMILIES.values() if not family.moe]
PRE_NORM = [family.name for family in DENSE if not family.post_norm]
POST_NORM = [family.name for family in DENSE if family.post_norm]


def _parts(linear):
    return {"A": linear.attention, "F": linear.ffn, "R": linear.update, "L": linear.block, "itself": linear}


def _matrices(block):
    whole = block_matrix(block)
    return {
        "A": attention_matrix(block.attention),
        "F": ffn_matrix(block.ffn),
        "R": whole - torch.eye(block.d_model, dtype=torch.float64),
        "L": whole,
        "itself": whole,
    }


def _vectors(d, *batch, seed=0, dtype=torch.float64):
    return torch.randn(*batch, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-14 + 1e-10 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", PRE_NORM)
def test_the_maps_of_every_architecture_are_the_dense_ones(name):
    for weights in weights_of(zoo.build(name, dtype=torch.float64)):
        matrices = _matrices(weights)
        for part, linear in _parts(linearize(weights)).items():
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


@settings(max_examples=15)
@given(block=blocks, seed=st.integers(0, 999), batch=st.lists(st.integers(1, 3), max_size=3))
def test_any_number_of_batch_axes(block, seed, batch):
    x = _vectors(block.d_model, *batch, seed=seed)
    for linear in _parts(linearize(block)).values():
        for product in (linear.mv, linear.rmv):
            one_by_one = torch.stack([product(row) for row in x.reshape(-1, block.d_model)]).reshape(x.shape)
            torch.testing.assert_close(product(x), one_by_one, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", PRE_NORM)
def test_attention_of_a_token_alone_is_the_map_up_to_scale_and_constant(name):
    model = zoo.cached(name)
    for weights in weights_of(model):
        points = [f"blocks.{weights.block}.{point}" for point in ("hook_resid_pre", "hook_attn_out")]
        resid, out = record(model, zoo.tokens(model, batch=4, pos=1), points).values()
        layer = weights.attention
        scale = resid.var(-1, correction=0, keepdim=True) if layer.norm.kind == "layer" else resid.pow(2).mean(-1, keepdim=True)
        constant = torch.zeros(weights.d_model) if layer.b_O is None else layer.b_O
        for head in range(layer.n_heads):
            shared = head // layer.group_size
            value = torch.zeros(layer.W_V.shape[-1]) if layer.b_V is None else layer.b_V[shared]
            value = value if layer.norm.bias is None else value + layer.norm.bias @ layer.W_V[shared]
            constant = constant + value @ layer.W_O[head]
        rebuilt = linearize(weights).attention.mv(resid) / (scale + layer.norm.eps).sqrt() + constant
        assert relative_error(rebuilt, out) < 1e-5


@pytest.mark.parametrize("name", POST_NORM)
def test_norms_after_the_sublayers_are_refused(name):
    with pytest.raises(ValueError, match=r"weights: the attention of block 1 has a norm after the sublayer.*; allowed: "):
        linearize(weights_of(zoo.cached(name))[1])


def test_a_norm_after_the_ffn_alone_is_refused():
    block = random_block(post_norm=True)
    block = replace(block, attention=replace(block.attention, post_norm=None))
    with pytest.raises(ValueError, match=r"weights: the ffn of block 0 has a norm after the sublayer"):
        linearize(block)


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
