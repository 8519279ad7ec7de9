"""What is said to be planted is there: shown with hooks and dense matrices, without the package's own analyses."""

import random

import numpy as np
import pytest
import torch
from dense import angle, block_matrix, ffn_matrix
from recording import record

from sd_lens.models.loading import load, weights_of
from sd_lens.models.planted import planted

VOCAB = 97
SIZES = {
    "n_blocks": 5,
    "explosion_block": 2,
    "decay_block": 3,
    "eigenvalue": -20.0,
    "d_model": 96,
    "n_heads": 6,
    "d_vocab": VOCAB,
    "context": 40,
    "seed": 3,
}


@pytest.fixture(scope="module", params=["llama", "llama grouped", "gpt2", "gpt_neox"])
def architecture(request):
    return request.param


@pytest.fixture(scope="module", params=["head", "embedding"])
def pathway(request):
    return request.param


@pytest.fixture(scope="module", params=[{}, SIZES], ids=["default", "other sizes"])
def plant(request, architecture, pathway):
    grouped = {"n_kv_heads": 2} if architecture == "llama grouped" else {}
    return planted(architecture.split()[0], pathway=pathway, **grouped, **request.param)


def _stream(plant, tokens):
    """The residual stream after the embedding and after every block, (block + 1, batch, pos, d_model)."""
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{b}.hook_resid_post" for b in range(plant.model.cfg.n_layers))]
    seen = record(plant.model, tokens, names)
    return torch.stack([seen[name] for name in names]).double()


def _assert_explodes(plant, tokens, where):
    """Exactly the tokens of the mask explode, as much and in the direction that was planted, and decay again."""
    stream = _stream(plant, tokens)
    norms = stream.norm(dim=-1)
    first, last = plant.explosion_block + 1, plant.decay_block
    torch.testing.assert_close(norms[0], torch.ones_like(norms[0]), rtol=0, atol=1e-2)
    assert norms[:first].max() < 3
    if not where.all():
        assert norms[: last + 1, ~where].max() < 3
        assert norms[last + 1 :, ~where].max() < 6
    if not where.any():
        return
    assert (norms[first : last + 1, where] / plant.norm - 1).abs().max() < 0.05
    for vector in stream[first][where]:
        assert angle(vector, plant.direction) < 0.5
        assert vector @ plant.direction.double() > 0
    assert (norms[last + 1 :, where] / norms[last, where]).max() < 0.2


def _distinct_tokens(plant):
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(VOCAB - 1, generator=generator)[:20] for _ in range(3)])


def test_what_explodes_where(plant):
    tokens = _distinct_tokens(plant)
    where = torch.zeros_like(tokens, dtype=torch.bool)
    if plant.pathway == "head":
        assert plant.trigger_token is None
        where[:, 0] = True
    else:
        for row, pos in ((0, 0), (1, 5), (1, 6), (2, 19)):
            tokens[row, pos] = plant.trigger_token
            where[row, pos] = True
    _assert_explodes(plant, tokens, where)


def test_which_ids_explode_alone(plant):
    ids = torch.arange(VOCAB).unsqueeze(1)
    _assert_explodes(
        plant, ids, torch.full_like(ids, 1, dtype=torch.bool) if plant.pathway == "head" else ids == plant.trigger_token
    )


def test_repeated_tokens(plant):
    # They see only themselves, so on the pathway through a head they explode like the first.
    tokens = torch.full((1, 12), 8)
    _assert_explodes(plant, tokens, torch.full_like(tokens, plant.pathway == "head", dtype=torch.bool))


def test_the_maps_are_what_they_are_said_to_be(plant):
    weights = weights_of(plant.model)
    u, s, vh = torch.linalg.svd(ffn_matrix(weights[plant.explosion_block].ffn))
    assert abs(float(s[0]) / plant.sigma - 1) < 0.01
    assert s[1] < 0.2 * s[0]
    assert angle(u[:, 0], plant.direction) < 2
    assert angle(vh[0], plant.trigger) < 2

    update = block_matrix(weights[plant.decay_block]) - torch.eye(weights.d_model)
    values, vectors = torch.linalg.eig(update)
    nearest = (plant.direction.to(vectors) @ vectors).abs().argmax()
    assert abs(complex(values[nearest]) / plant.eigenvalue - 1) < 0.01
    assert angle(vectors[:, nearest].real, plant.direction) < 2


def test_the_truth_is_in_unit_vectors_and_the_model_is_usable(plant, architecture):
    for vector in (plant.direction, plant.trigger):
        assert abs(float(vector.norm()) - 1) < 1e-6
    assert abs(float(plant.direction @ plant.trigger)) < 1e-6
    assert load(plant.model) is plant.model
    attention = weights_of(plant.model)[0].attention
    assert attention.W_V.shape[0] == (2 if architecture == "llama grouped" else attention.n_heads)
    assert repr(plant).startswith(f"Planted({plant.pathway} pathway, explosion in block {plant.explosion_block}")


def _tensors(plant):
    return [tensor for _, tensor in sorted(plant.model.state_dict().items())]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_the_seed_decides_the_weights_and_nothing_else_does(name):
    first, same, other = planted(name, seed=1), planted(name, seed=1), planted(name, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(_tensors(first), _tensors(same), strict=True))
    for a, b in zip(weights_of(first.model), weights_of(other.model), strict=True):
        assert not torch.equal(a.ffn.W_out, b.ffn.W_out)
        assert not torch.equal(a.attention.W_V, b.attention.W_V)
    assert angle(first.direction, other.direction) > 10


@pytest.mark.usefixtures("as_users_run_it")  # the type checks draw random numbers themselves
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_the_callers_random_state_is_left_alone(name):
    torch.manual_seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    planted(name)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]  # noqa: NPY002


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("llama", {"explosion_block": 4}, "explosion_block, decay_block: got 4, 4; allowed: 0 <= explosion < decay < 6"),
        ("llama", {"decay_block": 6}, "explosion_block, decay_block: got 1, 6"),
        ("llama", {"explosion_block": -1}, "explosion_block, decay_block: got -1, 4"),
        ("gpt_neox", {"explosion_block": 0}, "explosion_block, decay_block: got 0, 4; allowed: 1 <= explosion"),
        ("llama", {"eigenvalue": 0.0}, "eigenvalue: got 0.0; allowed: negative numbers"),
        ("llama", {"d_model": 65}, "d_model, n_heads, n_kv_heads: got 65, 4, 4; allowed: each a multiple"),
        ("llama", {"n_kv_heads": 3}, "d_model, n_heads, n_kv_heads: got 64, 4, 3; allowed: each a multiple"),
        ("gpt2", {"n_kv_heads": 2}, "d_model, n_heads, n_kv_heads: got 64, 4, 2; .* grouped heads on 'llama' only"),
    ],
)
def test_what_cannot_be_planted_is_refused(name, options, named):
    with pytest.raises(ValueError, match=named):
        planted(name, **options)


def test_the_first_block_can_explode_where_the_head_is_in_it_or_none_is_needed():
    for name, pathway in (("llama", "head"), ("gpt2", "head"), ("gpt_neox", "embedding")):
        plant = planted(name, pathway=pathway, explosion_block=0)
        tokens = _distinct_tokens(plant)
        where = torch.zeros_like(tokens, dtype=torch.bool)
        where[:, 0] = True
        if pathway == "embedding":
            tokens[:, 0] = plant.trigger_token
        _assert_explodes(plant, tokens, where)
