"""Answers of true FFNs, against what the running model writes when such a vector is put before its FFN."""

import math

import pytest
import torch
import zoo

from sd_lens.interventions.responses import ResponseCurve, probe_singular_vectors, response_curve
from sd_lens.interventions.subspace import ExplosionSubspace
from sd_lens.linear.linearize import linearize
from sd_lens.models.ffn_input import ffn_input
from sd_lens.models.loading import load, weights_of


def written(model, block, x):
    """What the running model's FFN writes where it is given normalised streams, one per row, at the first position."""
    at = ffn_input(model, weights_of(model)[block])
    seen = {}

    def give(activation, hook):
        values = x if at.gain is None else x * at.gain
        values = values if at.bias is None else values + at.bias
        return values.unsqueeze(1).to(activation)

    def keep(activation, hook):
        seen["out"] = activation[:, 0].clone()

    with torch.no_grad():
        tokens = torch.full((len(x), 1), 5)
        model.run_with_hooks(tokens, fwd_hooks=[(at.name, give), (f"blocks.{block}.hook_mlp_out", keep)])
    return seen["out"]


def added(model, block, x):
    with_nothing = written(model, block, torch.zeros_like(x[:1]))
    return (written(model, block, x) - with_nothing).norm(dim=-1)


@pytest.mark.parametrize(
    "family",
    [f for f in ("llama_bias", "gpt2", "falcon", "mixtral", "opt", "granite", "hooked_llama", "hooked_gpt2") if f in zoo.FAMILIES],
)
def test_answers_are_what_the_running_model_writes(family):
    model = zoo.cached(family)
    subspace = ExplosionSubspace.at(model, 1, rank=2)
    curve = subspace.response_curve([0.5, 2.0, 5.0], vector=1)
    probes = torch.tensor([[0.5], [2.0], [5.0]]) * subspace.right[:, 1]
    torch.testing.assert_close(curve.answers, added(model, 1, probes), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(curve.opposite, added(model, 1, -probes), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(curve.predicted, torch.tensor([0.5, 2.0, 5.0]) * subspace.sigma[1])
    dense = linearize(weights_of(model)[1]).ffn.to_dense().double()
    probe = subspace.probe_singular_vectors(4)
    _, s, right = torch.linalg.svd(dense)
    torch.testing.assert_close(probe.sigma.double(), s[:4], rtol=1e-4, atol=1e-6)
    full = right[:4].float() * model.cfg.d_model**0.5
    both = torch.stack([added(model, 1, full), added(model, 1, -full)])
    torch.testing.assert_close(probe.answers, both.amax(0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(probe.opposite, both.amin(0), rtol=1e-3, atol=1e-4)


def test_the_planted_neuron(planted_model):
    truth = planted_model
    subspace = ExplosionSubspace.at(truth.model, truth.explosion_block)
    curve = subspace.response_curve()
    assert len(curve.scales) == 40
    assert float(curve.scales[-1]) == pytest.approx(truth.model.cfg.d_model**0.5)
    gated = weights_of(truth.model)[truth.explosion_block].ffn.gated
    # A planted neuron computes act(4c) * 4c, or act(4c - 5): the square, or a straight line that starts at 5/4.
    if gated:
        assert curve.exponent == pytest.approx(2, abs=0.02)
    else:
        c = curve.scales.double()
        line = (4 * c - 5).clamp(min=0)
        share = curve.answers.double() / line
        assert float((share[-20:] / share[-1] - 1).abs().max()) < 0.01
    if truth.trigger_token is None:
        assert float(curve.answers[-1]) == pytest.approx(truth.norm, rel=0.01)
    assert curve.asymmetry > 1000
    assert "more than 1000 times the opposite" in repr(curve)
    probe = subspace.probe_singular_vectors(6)
    assert probe.spike > 100
    assert float(probe.answers[0]) == pytest.approx(float(curve.answers[-1]), rel=1e-3)
    assert probe.random_max < probe.answers[0]


def test_the_shipped_model():
    subspace = ExplosionSubspace.at(load("tiny"), 2, rank=2)
    curve, probe = subspace.response_curve(), subspace.probe_singular_vectors()
    assert float(curve.answers[-1]) == pytest.approx(619.6, rel=1e-3)
    assert float(curve.predicted[-1]) == pytest.approx(51.8, rel=1e-3)
    assert curve.exponent == pytest.approx(2.02, abs=0.01)
    assert curve.asymmetry == pytest.approx(218, rel=0.01)
    assert probe.spike == pytest.approx(16.7, rel=0.01)
    assert probe.random_mean == pytest.approx(3.13, rel=0.1)
    assert curve.sentence().startswith(
        "The FFN of block 2 answers 11.3 v0 with a norm of 620 where the linear map says 51.8, 218 times"
    )
    table = curve.to_dataframe()
    assert list(table) == ["scale", "answer", "opposite", "predicted"]
    assert list(probe.to_dataframe()["vector"]) == list(range(20))


@pytest.mark.parametrize("power", [1.0, 1.7, 2.0])
def test_the_exponent_of_a_known_power(power):
    scales = torch.linspace(0.1, 8.0, 30)
    answers = 3 * scales**power
    curve = ResponseCurve("made", 0, 0, scales, answers, answers / 4, scales, 64)
    assert curve.exponent == pytest.approx(power, abs=1e-5)
    assert curve.asymmetry == pytest.approx(4)
    single = ResponseCurve("made", 0, 0, scales[:1], answers[:1], answers[:1], scales[:1], 64)
    assert math.isnan(single.exponent)


def test_a_norm_behind_the_ffn_leaves_nothing_to_predict():
    curve = ExplosionSubspace.at(zoo.cached("gemma2"), 1).response_curve([1.0])
    assert math.isnan(float(curve.predicted))
    assert float(curve.answers) > 0
    assert "linear map" not in curve.sentence()


@pytest.mark.usefixtures("as_users_run_it")
def test_bad_input():
    subspace = ExplosionSubspace.at(zoo.cached("llama"), 1)
    for scales in ([], [0.0], [-1.0], [float("nan")], [[1.0]]):
        with pytest.raises(ValueError, match=r"^scales: got .* allowed: one or more finite lengths above 0"):
            response_curve(subspace, scales)
    for vector in (1, -1, True, "0"):
        with pytest.raises(ValueError, match=r"^vector: got .* allowed: 0 to 0"):
            response_curve(subspace, vector=vector)
    for n in (0, 33, 2.0):
        with pytest.raises(ValueError, match=r"^n: got .* allowed: 1 to 32"):
            probe_singular_vectors(subspace, n)
