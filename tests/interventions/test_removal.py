"""Removal removes: planted explosions and that of the shipped model, against random displacements of the same length."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from sd_lens.interventions.subspace import ExplosionSubspace
from sd_lens.models.loading import load, weights_of
from sd_lens.models.tokens import tokenize
from sd_lens.tracing.defects import find_defects
from sd_lens.tracing.norms import trace_norms
from sd_lens.tracing.prompts import BUILT_IN_PROMPTS
from sd_lens.tracing.sinks import sink_attention

SEEDS = (0, 1, 2)


def ratios(model, prompts, high, intervention=None, *, stop_at=None):
    """Largest norm of the tokens that are high without an intervention, to the median of those after the first, at every point."""
    with nullcontext() if intervention is None else intervention.attached():
        norms = trace_norms(model, prompts, stop_at=stop_at).norms
    first = torch.cat([torch.arange(len(prompt)) == 0 for prompt in prompts])
    others = ~first & ~high
    return norms[:, high].amax(1) / norms[:, others].median(1).values


def high_tokens(prompts, defects):
    """True at the tokens found, of all prompts one behind the other."""
    starts = torch.tensor([0, *map(len, prompts)]).cumsum(0)
    mask = torch.zeros(int(starts[-1]), dtype=torch.bool)
    mask[[int(starts[token.prompt]) + token.pos for token in defects.tokens]] = True
    return mask


def test_planted_explosions(planted_model):
    """Without the subspace the model is the one without the planted neuron, at every block."""
    truth = planted_model
    model, block = truth.model, truth.explosion_block
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randperm(90, generator=generator)[:12] for _ in range(4)]
    if truth.trigger_token is not None:
        prompts[0][0] = prompts[1][5] = prompts[2][3] = prompts[2][8] = truth.trigger_token
    trace = trace_norms(model, prompts)
    defects = find_defects(trace)
    high = high_tokens(prompts, defects)
    before = ratios(model, prompts, high)
    assert float(before[block + 1]) > 100
    subspace = ExplosionSubspace.at(model, defects=defects)
    assert subspace.block == block
    assert float(subspace.right[:, 0] @ truth.trigger) > 0.999
    assert abs(float(subspace.left[:, 0] @ truth.direction)) > 0.999
    W_out = weights_of(model)[block].ffn.W_out
    planted_row = W_out[0].clone()
    with torch.no_grad():
        W_out[0] = 0.0
        wanted = trace_norms(model, prompts).norms
        W_out[0] = planted_row
    for side in ("trigger", "direction", "both"):
        ablate = subspace.ablate(side=side)
        with ablate.attached():
            got = trace_norms(model, prompts).norms
        torch.testing.assert_close(got[: block + 2], wanted[: block + 2], rtol=1e-3, atol=1e-2)
        # What is left of a token that a head erases is so little that the norms behind make a lot of its rounding.
        torch.testing.assert_close(got, wanted, rtol=0.25, atol=0.1)
        assert float(ratios(model, prompts, high, ablate, stop_at=block + 1)[-1]) < 1.5
        for seed in SEEDS if side != "both" else ():
            control = ratios(model, prompts, high, ablate.control(seed), stop_at=block + 1)
            assert float(control[-1] / before[block + 1]) > 0.8
    assert torch.equal(trace_norms(model, prompts).norms, trace.norms)
    # At these tokens alone is enough.
    later = {token.id for token in defects.tokens if token.pos > 0}
    assert subspace.delimiters == tuple(later)
    for where, there in (("initial", high & ~later_mask(prompts)), ("delimiters", high & later_mask(prompts))):
        if where == "initial" or later:
            found = ratios(model, prompts, there, subspace.ablate(positions=where), stop_at=block + 1)
            assert float(found[-1]) < 1.5


def later_mask(prompts):
    return torch.cat([torch.arange(len(prompt)) > 0 for prompt in prompts])


@pytest.fixture(scope="module")
def shipped():
    model = load("tiny")
    prompts = tokenize(model, list(BUILT_IN_PROMPTS))
    defects = find_defects(trace_norms(model, prompts))
    return model, prompts, defects, high_tokens(prompts, defects)


def test_the_shipped_model(shipped):
    model, prompts, defects, high = shipped
    block = defects.main_block
    assert block == 2
    before = ratios(model, prompts, high)
    assert float(before.max()) == pytest.approx(13.25, abs=0.05)
    # The blocks before have written some of it already, so the trigger of one block is not all.
    one = ExplosionSubspace.at(model, defects=defects)
    assert one.block == block
    assert float(ratios(model, prompts, high, one.ablate())[block + 1 :].max()) == pytest.approx(3.1, abs=0.15)
    two = ExplosionSubspace.at(model, block, rank=2)
    for positions in ("all", "initial"):
        both = two.ablate(side="both", positions=positions)
        assert float(ratios(model, prompts, high, both)[block + 1 :].max()) < 1.5
        for seed in SEEDS:
            left = ratios(model, prompts, high, both.control(seed))[block + 1 :] / before[block + 1 :]
            assert float(left.min()) > 0.8
    # Two blocks' triggers leave no peak anywhere.
    pair = ExplosionSubspace.at(model, 1).ablate() + one.ablate()
    assert float(ratios(model, prompts, high, pair).max()) < 1.5
    for seed in SEEDS:
        assert float(ratios(model, prompts, high, pair.control(seed)).max() / before.max()) > 0.8


def test_what_becomes_of_the_shipped_models_sinks(shipped):
    """Attention to the first token falls with its norm, but not to nothing, and no more than where the token is displaced as far at
    random, which leaves the norm. Where the trigger alone is removed, it does not fall at all."""
    model, prompts, _, _ = shipped
    before = sink_attention(model, prompts)
    sinks = before.alpha > 0.3

    def after(intervention):
        with intervention.attached():
            found = sink_attention(model, prompts)
        return found.sink_rate, float(found.alpha[sinks].mean())

    assert int(sinks.sum()) == 8
    assert float(before.alpha[sinks].mean()) == pytest.approx(0.403, abs=0.005)
    assert before.sink_rate == pytest.approx(0.278, abs=0.005)
    both = ExplosionSubspace.at(model, 2, rank=2).ablate(side="both")
    assert after(both) == pytest.approx((0.181, 0.314), abs=0.005)
    controls = torch.tensor([after(both.control(seed)) for seed in range(8)])
    assert controls.mean(0).tolist() == pytest.approx([0.190, 0.323], abs=0.005)
    assert bool(((torch.tensor(after(both)) - controls.mean(0)).abs() < controls.std(0)).all())
    assert after(ExplosionSubspace.at(model, 2).ablate()) == pytest.approx((0.382, 0.467), abs=0.005)
