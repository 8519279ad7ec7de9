"""One result on all kinds of model: the bridge of TransformerLens 4, that of 3.9, and HookedTransformer."""

from __future__ import annotations

import editing
import pytest
import torch
import zoo

from sd_lens.interventions.subspace import ExplosionSubspace
from sd_lens.models.loading import load

CASES = [(kind, side) for kind in editing.MAKERS for side in ("trigger", "direction", "both")]

needs_hooked = pytest.mark.skipif(zoo.HookedTransformer is None, reason="HookedTransformer is gone in TransformerLens 4")


def edited(model, subspace, kind, side):
    tokens, source = zoo.tokens(model, 2, 9), zoo.tokens(model, 2, 9, seed=1)
    intervention = editing.MAKERS[kind](subspace, source, side=side)
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=intervention.fwd_hooks())
        assert float((logits - model(tokens)).abs().max()) > 1e-3  # something was done
    return logits


@needs_hooked
@pytest.mark.parametrize("family", editing.TWINS)
def test_a_bridge_and_a_hooked_transformer_of_the_same_weights(family):
    pair = [zoo.cached(family), editing.twin(family)]
    found = [ExplosionSubspace.at(model, 1, rank=2) for model in pair]
    for name in ("right", "left", "sigma"):
        torch.testing.assert_close(getattr(found[0], name), getattr(found[1], name), rtol=1e-4, atol=1e-4)
    for kind, side in CASES:
        if side != "both" and kind not in ("ablate", "patch", "steer"):
            continue
        logits = [edited(model, editing.random_subspace(model), kind, side) for model in pair]
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


@needs_hooked
def test_the_shipped_model_as_a_hooked_transformer():
    bridge = load("tiny")
    options = {key: value for key, value in zoo._HOOKED["llama"][0].items() if key not in zoo._HOOKED_BASE}
    model = editing.hooked(bridge.original_model, **{**options, "n_key_value_heads": None, "rotary_dim": 32})
    tokens = bridge.to_tokens("Once upon a time there was a little girl.")
    for side in ("trigger", "direction", "both"):
        logits = []
        for one in (bridge, model):
            subspace = ExplosionSubspace.at(one, 2, rank=2)
            with torch.no_grad(), subspace.ablate(side=side, positions="initial").attached():
                logits.append(one(tokens))
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


# Mean magnitude of edited logits, the same wherever it is computed; first of those without an edit.
MAGNITUDES = {
    "llama": [
        *(0.813843, 0.80898, 0.812396, 0.808564, 0.806273, 0.811612, 0.806372, 0.803492, 0.825442, 0.81829),
        *(0.810971, 0.84268, 0.830836, 0.828303, 0.805998, 0.813128, 0.810677, 0.828963, 0.814062),
    ],
    "gpt2": [
        *(1.748149, 1.72473, 1.78275, 1.755251, 1.73573, 1.761874, 1.747985, 1.726679, 1.764087, 1.742912),
        *(1.688822, 1.904363, 1.84109, 1.656895, 1.816823, 1.85141, 1.766942, 1.743093, 1.747752),
    ],
    "gpt_neox_parallel": [
        *(0.815607, 0.815427, 0.819022, 0.818274, 0.815295, 0.809085, 0.806733, 0.818171, 0.808394, 0.809592),
        *(0.81956, 0.813455, 0.822633, 0.800862, 0.812544, 0.785997, 0.816037, 0.82007, 0.815123),
    ],
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox_parallel"])
def test_bridges_of_all_versions(family):
    model = zoo.cached(family)
    subspace = editing.random_subspace(model)
    with torch.no_grad():
        got = [model(zoo.tokens(model, 2, 9)), *(edited(model, subspace, kind, side) for kind, side in CASES)]
    assert [float(logits.double().abs().mean()) for logits in got] == pytest.approx(MAGNITUDES[family], rel=2e-5)
