"""The direction that sets an FFN off: planted ones are found, with the sign that the true FFN answers to."""

import pytest
import torch
import zoo
from layers import random_block, random_mixture

from sd_lens.linear.linearize import linearize
from sd_lens.linear.trigger import normalised, trigger_direction
from sd_lens.models.loading import weights_of


def test_the_planted_trigger(planted_model):
    weights = weights_of(planted_model.model)[planted_model.explosion_block]
    found = trigger_direction(weights)
    assert float(found.vector @ planted_model.trigger) > 0.999
    assert found.sigma == pytest.approx(planted_model.sigma, rel=0.01)
    assert found.gap > 10
    entering = 3 * planted_model.trigger.unsqueeze(0)
    assert float(found.coefficient(weights, entering)) == pytest.approx(planted_model.model.cfg.d_model**0.5, rel=1e-3)
    assert repr(found).startswith(f"Trigger(block {planted_model.explosion_block}: sigma ")


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_vector_and_its_sign(family):
    model = zoo.cached(family)
    weights = weights_of(model)[1]
    found = trigger_direction(weights)
    dense = linearize(weights).ffn.to_dense().double()
    s, v = torch.linalg.svd(dense)[1:]
    assert found.sigma == pytest.approx(float(s[0]), rel=1e-4)
    assert found.gap == pytest.approx(float(s[0] / s[1]), rel=1e-3)
    assert float((found.vector.double() @ v[0]).abs()) > 1 - 1e-4
    # The true layer on the whole normalised stream, norm of the layer included: it does not change what is normalised already.
    ffn, root = weights.ffn, model.cfg.d_model**0.5
    assert found.answer >= found.opposite_answer > 0
    if ffn.post_norm is None and ffn.norm is not None:
        for sign, wanted in ((1, found.answer), (-1, found.opposite_answer)):
            got = ffn(sign * 1000 * root * found.vector.unsqueeze(0)).norm()
            assert float(got) == pytest.approx(wanted, rel=1e-3)


def test_a_norm_behind_the_ffn_does_not_hide_how_much_it_answers():
    plain = random_block(post_norm=False, dtype=torch.float32)
    behind = random_block(post_norm=True, dtype=torch.float32)
    assert trigger_direction(behind).answer != pytest.approx(10**0.5, rel=1e-2)
    assert trigger_direction(plain).answer > trigger_direction(plain).opposite_answer


def test_mixtures_have_one_too():
    block = random_block(dtype=torch.float32)
    block = type(block)(block.block, block.attention, random_mixture(dtype=torch.float32), parallel=False)
    found = trigger_direction(block)
    v = torch.linalg.svd(linearize(block).ffn.to_dense().double()).Vh
    assert float((found.vector.double() @ v[0]).abs()) > 1 - 1e-4


def test_the_normalised_stream():
    ffn = random_block(kind="layer").ffn
    x = torch.randn(3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = normalised(ffn, 5 * x + 2)
    torch.testing.assert_close(got.mean(-1), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(got * ffn.norm.gain + ffn.norm.bias, ffn.norm(5 * x + 2))
    bare = type(ffn)(**{**vars(ffn), "norm": None})
    assert torch.equal(normalised(bare, x), x)
