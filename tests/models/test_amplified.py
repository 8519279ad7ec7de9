"""The strong outliers are where they are said to be, and the model still reads as the shipped one does."""

import random

import numpy as np
import pytest
import torch
from dense import angle
from recording import record

import sd_lens
from sd_lens.applications.perplexity import windows_of
from sd_lens.applications.texts import default_text
from sd_lens.models.amplified import amplified

BLOCKS = (2, 5)
LLAMA2_RATIO = 100  # its first token's norm over the others' median


@pytest.fixture(scope="module")
def tiny():
    return sd_lens.load("tiny")


@pytest.fixture(scope="module")
def strong():
    return amplified()


@pytest.fixture(scope="module")
def text(tiny):
    """Text that had no part in fitting the neurons, BOS in front of every window."""
    return windows_of(tiny, default_text()).ids[::3]


def _norms(model, text):
    names = [f"blocks.{block}.hook_resid_post" for block in range(model.cfg.n_layers)]
    seen = record(model, text, names)
    return torch.stack([seen[name] for name in names]).double().norm(dim=-1)


def _loss(model, text, hooks=()):
    with torch.no_grad():
        return float(model.run_with_hooks(text, return_type="loss", fwd_hooks=list(hooks)))


def _activations(plant, text, index):
    """The planted neuron's activation, by hand from the stream and the weights."""
    block = (plant.explosion_block, plant.decay_block)[index]
    before = f"blocks.{block}.hook_resid_mid"
    stream = record(plant.model, text, [before])[before]
    layer = plant.model.original_model.state_dict()

    def weight(name):
        (found,) = {
            tensor.data_ptr(): tensor
            for key, tensor in layer.items()
            if key.replace("._original_component", "") == f"model.layers.{block}.{name}.weight"
        }.values()
        return found

    normed = stream / (stream.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight("post_attention_layernorm")
    gate, up = (normed @ weight(f"mlp.{name}_proj")[plant.neurons[index]] for name in ("gate", "up"))
    return gate * torch.sigmoid(gate) * up


def test_bos_explodes_and_decays_and_the_others_are_as_they_were(tiny, strong, text):
    norms, before = _norms(strong.model, text), _norms(tiny, text)
    others, others_before = norms[:, :, 1:].flatten(1), before[:, :, 1:].flatten(1)
    ratios = norms[:, :, 0].mean(1) / others.median(1).values
    assert ratios[2:5].min() > 90
    assert ratios[2] > LLAMA2_RATIO
    torch.testing.assert_close(norms[2, :, 0], before[2, :, 0] + strong.norm, rtol=1e-4, atol=0)
    torch.testing.assert_close(norms[:2, :, 0], before[:2, :, 0], rtol=0, atol=0)
    torch.testing.assert_close(norms[5, :, 0], before[5, :, 0], rtol=0.01, atol=0)
    assert (others.median(1).values / others_before.median(1).values - 1).abs().max() < 2e-3
    assert (others / others_before - 1).abs().quantile(0.99) < 0.02


@pytest.mark.parametrize("index", [0, 1])
def test_the_neurons_answer_to_bos_alone(strong, text, index):
    activations = _activations(strong, text, index)
    torch.testing.assert_close(activations[:, 0], torch.full_like(activations[:, 0], strong.activation), rtol=1e-4, atol=0)
    others = activations[:, 1:].abs()
    assert others.mean() < 0.1
    assert others.flatten().quantile(0.99) < 1
    assert others.max() < 0.02 * strong.activation


def test_only_two_neurons_differ_from_the_shipped_model(tiny, strong, text):
    after = f"blocks.{strong.explosion_block}.hook_resid_post"
    own = record(tiny, text[:1], [after])[after][0, 0]
    assert angle(strong.direction, own) < 0.01
    assert float(strong.direction @ own) > 0
    for block, (old, new) in enumerate(zip(sd_lens.weights_of(tiny), sd_lens.weights_of(strong.model), strict=True)):
        rows = (new.ffn.W_gate != old.ffn.W_gate).any(0) | (new.ffn.W_in != old.ffn.W_in).any(0)  # stored as (d_model, d_mlp)
        columns = (new.ffn.W_out != old.ffn.W_out).any(1)
        changed = [strong.neurons[BLOCKS.index(block)]] if block in BLOCKS else []
        assert rows.nonzero().flatten().tolist() == changed
        assert columns.nonzero().flatten().tolist() == changed
        for neuron in changed:
            sign = 1 if block == strong.explosion_block else -1
            torch.testing.assert_close(new.ffn.W_out[neuron], sign * strong.norm / strong.activation * strong.direction)
    old, new = (model.original_model.state_dict() for model in (tiny, strong.model))
    assert old.keys() == new.keys()
    changed = {key.replace("._original_component", "").split(".mlp.")[0] for key in old if not torch.equal(old[key], new[key])}
    assert changed == {f"model.layers.{block}" for block in BLOCKS}  # and nothing there but the FFN


def test_the_loss_stays(tiny, strong, text):
    assert abs(_loss(strong.model, text) - _loss(tiny, text)) < 0.01


def test_what_the_package_finds(tiny, strong, text):
    prompts = list(text[:4].unbind())
    defects = sd_lens.find_defects(sd_lens.trace_norms(strong.model, prompts))
    assert (defects.explosion_blocks, defects.decay_blocks) == ((2,), (5,))
    assert [(token.pos, token.token) for token in defects.tokens] == [(0, "<s>")] * 4
    assert angle(defects.trace.direction.direction, strong.direction) < 1
    assert sd_lens.massive_activations(strong.model, prompts).found
    assert not sd_lens.massive_activations(tiny, prompts).found
    assert sd_lens.find_defects(sd_lens.trace_norms(tiny, prompts)).decay_blocks == ()


def _eight_bits(hidden, hook):
    step = hidden.abs().amax((1, 2), keepdim=True) / 127  # one range per window
    return (hidden / step).round() * step


def test_eight_bits_are_too_few_where_it_is_planted_and_nowhere_else(tiny, strong, text):
    def costs(model, blocks):
        full = _loss(model, text)
        return {block: _loss(model, text, [(f"blocks.{block}.mlp.hook_post", _eight_bits)]) - full for block in blocks}

    strongly, shipped = costs(strong.model, range(6)), costs(tiny, BLOCKS)
    assert strongly[2] > 0.04
    assert strongly[5] > 0.1
    assert max(strongly[block] for block in (0, 1, 3, 4)) < 0.02  # block 1 prepares the explosion already in the shipped model
    assert strongly[2] > 2 * shipped[2]
    assert strongly[5] > 20 * abs(shipped[5])


@pytest.mark.usefixtures("as_users_run_it")  # the type checks draw random numbers themselves
def test_other_blocks_and_sizes_and_the_callers_random_state(tiny, text):
    torch.manual_seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    plant = amplified(explosion_block=3, decay_block=4, norm=1500, activation=300)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]  # noqa: NPY002

    norms, before = _norms(plant.model, text[:2]), _norms(tiny, text[:2])
    torch.testing.assert_close(norms[3, :, 0], before[3, :, 0] + 1500, rtol=1e-4, atol=0)
    torch.testing.assert_close(norms[4, :, 0], before[4, :, 0], rtol=0.01, atol=0)
    for index in (0, 1):
        activations = _activations(plant, text[:2], index)
        torch.testing.assert_close(activations[:, 0], torch.full((2,), 300.0), rtol=1e-4, atol=0)
    assert abs(_loss(plant.model, text) - _loss(tiny, text)) < 0.01
    assert repr(plant) == "Amplified(explosion in block 3, decay in block 4, norm 1500, hidden activation 300)"
    assert plant.model.tokenizer("A text.")["input_ids"] == tiny.tokenizer("A text.")["input_ids"]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"decay_block": 2}, "explosion_block, decay_block: got 2, 2; allowed: 0 <= explosion < decay < 6"),
        ({"decay_block": 6}, "explosion_block, decay_block: got 2, 6"),
        ({"explosion_block": -1}, "explosion_block, decay_block: got -1, 5"),
        ({"norm": 0.0}, "norm: got 0.0; allowed: positive numbers"),
        ({"norm": float("nan")}, "norm: got nan; allowed: positive numbers"),
        ({"activation": -1.0}, r"activation: got -1.0; allowed: positive numbers"),
        ({"activation": float("inf")}, "activation: got inf; allowed: positive numbers"),
    ],
)
def test_what_cannot_be_made_is_refused(options, named):
    with pytest.raises(ValueError, match=named):
        amplified(**options)
