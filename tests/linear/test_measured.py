"""Measured Gaussians and router weights against sums over recorded activations."""

import numpy as np
import pytest
import torch
import zoo
from recording import record, same_state, state

from sd_lens.linear.inputs import GaussianInput, root
from sd_lens.linear.linearize import linearize
from sd_lens.linear.measured import measure_inputs, measure_router
from sd_lens.models.loading import load, weights_of

LENGTHS = (9, 4, 12, 1, 7)
BRIDGES = [name for name, family in zoo.FAMILIES.items() if family.generation == "bridge"]


def _prompts(model):
    tokens = zoo.tokens(model, batch=len(LENGTHS), pos=max(LENGTHS))
    return [row[:length] for row, length in zip(tokens, LENGTHS, strict=True)]


def _by_hand(model, prompts, block):
    """All inputs of a block's FFN, from the model's own hook in front of it, one prompt at a time."""
    point = f"blocks.{block}.mlp.hook_in"
    return torch.cat([record(model, prompt.unsqueeze(0), [point])[point].reshape(-1, model.cfg.d_model) for prompt in prompts])


@pytest.mark.parametrize("name", BRIDGES)
def test_the_moments_are_those_of_the_ffns_recorded_inputs(name):
    model = zoo.cached(name)
    prompts = _prompts(model)
    if name == "opt" and not _fires(model, "blocks.1.mlp.hook_in"):
        pytest.skip("this TransformerLens has no working hook point in front of OPT's FFN to compare with")
    x = _by_hand(model, prompts, 1).double()
    wanted = np.cov(x.numpy(), rowvar=False, bias=True)
    scale = float(np.abs(wanted).max())
    full = GaussianInput.measure(model, prompts, 1)
    assert full.n_tokens == len(x) == sum(LENGTHS)
    torch.testing.assert_close(full.mean.double(), x.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(full.cov.double().numpy(), wanted, atol=1e-5 * scale)
    diagonal = GaussianInput.measure(model, prompts, 1, covariance="diagonal")
    torch.testing.assert_close(diagonal.cov, full.cov.diagonal())
    assert (full.diagonal, diagonal.diagonal) == (False, True)


def _fires(model, point):
    try:
        return bool(record(model, zoo.tokens(model, batch=1, pos=2), [point]))
    except (KeyError, AssertionError):
        return False


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi"])
def test_batches_make_no_difference(name):
    model = zoo.cached(name)
    prompts = _prompts(model)
    for covariance in ("full", "diagonal"):
        one, other = (GaussianInput.measure(model, prompts, 2, covariance=covariance, batch_tokens=n) for n in (1, 10_000))
        assert one.n_tokens == other.n_tokens
        torch.testing.assert_close(one.mean, other.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.cov, other.cov, rtol=1e-4, atol=1e-5)


def test_a_large_common_offset_does_not_drown_the_variance():
    from sd_lens.linear.measured import _Moments

    x = torch.randn(600, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e7
    moments = _Moments(full=True)
    for rows in x.split(7):
        moments.add(rows)
    np.testing.assert_allclose(moments.result(0).cov.numpy(), np.cov(x.numpy(), rowvar=False, bias=True), rtol=1e-6)


def test_several_blocks_in_one_pass_and_the_model_as_it_was():
    model = zoo.build("llama")
    before = state(model)
    prompts = _prompts(model)
    found = measure_inputs(model, prompts, [2, 0, -1])
    assert sorted(found) == [0, 2]
    for block, measured in found.items():
        alone = GaussianInput.measure(model, prompts, block, covariance="diagonal")
        torch.testing.assert_close(measured.cov, alone.cov)
    assert sorted(measure_inputs(model, prompts)) == [0, 1, 2]
    assert same_state(before, state(model))


def test_later_blocks_are_not_run():
    model = zoo.build("llama")
    seen = []
    model.add_hook("blocks.2.hook_resid_pre", lambda value, hook: seen.append(0))
    GaussianInput.measure(model, _prompts(model), 0)
    assert not seen
    model.reset_hooks()


@pytest.mark.parametrize("name", [family.name for family in zoo.FAMILIES.values() if family.moe])
def test_router_weights_are_means_over_tokens(name):
    model = zoo.cached(name)
    prompts = _prompts(model)
    layer = weights_of(model)[1].ffn
    measured = measure_router(model, prompts)
    assert sorted(measured) == [0, 1, 2]
    points = [f"blocks.1.{point}" for point in ("hook_resid_pre", "hook_attn_out")]
    x = torch.cat([sum(record(model, prompt.unsqueeze(0), points).values()).squeeze(0) for prompt in prompts])
    logits = layer.norm(x) @ layer.W_router
    wanted = torch.zeros(zoo.EXPERTS)
    for row in logits.softmax(-1):
        kept, chosen = row.topk(zoo.EXPERTS_PER_TOKEN)
        wanted[chosen] += kept / (kept.sum() if layer.renormalized else 1.0)
    torch.testing.assert_close(measured[1], wanted / len(x), rtol=1e-4, atol=1e-5)
    assert linearize(weights_of(model)[1], router=measured[1]).ffn.router.tolist() == measured[1].tolist()


def test_dense_blocks_have_no_router():
    assert measure_router(zoo.cached("llama"), _prompts(zoo.cached("llama"))) == {}


def test_a_measured_gaussian_makes_the_fit_better_on_the_models_own_tokens():
    # The fit is the best one for Gaussians of the measured moments; on the tokens themselves it must beat the unit Gaussian's.
    model = load("tiny")
    text = ["The first item is taken from the list and returned.", "If no key is given, the value itself is compared."] * 3
    weights = weights_of(model)[1]
    inputs = GaussianInput.measure(model, text, 1)
    x = _tokens_of(model, text)
    wanted = weights.ffn.hidden(x) @ weights.ffn.W_out
    errors = []
    for kind in ("unit", inputs):
        ffn = linearize(weights, inputs=kind).ffn
        errors.append(float((ffn.affine(x / weights.ffn.norm.gain) - wanted).norm() / wanted.norm()))
    assert errors[1] < errors[0] - 0.05, errors


def _tokens_of(model, text):
    rows = [record(model, model.to_tokens(line), ["blocks.1.mlp.hook_in"])["blocks.1.mlp.hook_in"].squeeze(0) for line in text]
    return torch.cat(rows)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_both_estimators_agree_on_a_measured_covariance_of_fewer_tokens_than_its_width(name):
    # Its rank is below the width, and a LayerNorm's always is: the sampled fit is zero where no sample goes.
    model = zoo.cached(name)
    inputs = GaussianInput.measure(model, zoo.tokens(model, batch=2, pos=9), 1)
    weights = weights_of(model)[1]
    exact = linearize(weights, inputs=inputs).ffn
    sampled = linearize(weights, inputs=inputs, estimator="sampled", samples=40_000).ffn
    spread = root(inputs)
    gain = weights.ffn.norm.gain
    reached = (torch.eye(zoo.D_MODEL) @ spread.root) / gain  # inputs of the map that stay among the samples' directions
    wanted, got = exact.mv(reached), sampled.mv(reached)
    assert float((got - wanted).norm() / wanted.norm()) < 0.1
    assert float(sampled.to_dense().norm()) < 3 * float(exact.to_dense().norm())


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda model: GaussianInput.measure(model, "", 0), "prompt"),
        (lambda model: GaussianInput.measure(model, _prompts(model), 3), "block: got 3; allowed: 0 to 2"),
        (lambda model: measure_inputs(model, _prompts(model), []), "blocks: got none; allowed: at least one block"),
        (
            lambda model: measure_inputs(model, _prompts(model), covariance="banded"),
            "covariance: got 'banded'; allowed: 'diagonal', 'full'",
        ),
        (lambda model: GaussianInput.measure(model, _prompts(model), 0, batch_tokens=0), "batch_tokens: got 0"),
    ],
)
def test_bad_input_is_refused(call, reason):
    with pytest.raises(ValueError, match=f"^{reason}"):
        call(zoo.cached("llama"))
