"""Building, saving and loading an explosion subspace, and every argument that cannot be used."""

from __future__ import annotations

import json
import math

import editing
import pytest
import torch
import zoo
from recording import relative_error
from safetensors.torch import load_file, save_file
from shared import planted
from tokenizer import with_tokenizer

from sd_lens.interventions.subspace import ExplosionSubspace
from sd_lens.linear.linearize import linearize
from sd_lens.linear.spectra import SingularTriplets, leading_singular
from sd_lens.models.loading import load, weights_of
from sd_lens.tracing.defects import find_defects
from sd_lens.tracing.norms import trace_norms

BLOCK = 1


@pytest.mark.parametrize("family", [name for name in ("llama", "gpt2", "mixtral", "gemma2", "hooked_gpt2") if name in zoo.FAMILIES])
def test_it_is_the_dense_maps_singular_vectors_with_the_sign_the_ffn_answers_to(family):
    model = zoo.cached(family)
    weights = weights_of(model)[BLOCK]
    linear_map = linearize(weights).ffn
    dense = linear_map.to_dense()
    U, S, Vh = torch.linalg.svd(dense.double())
    rank = 3
    made = {
        "at": ExplosionSubspace.at(model, BLOCK, rank=rank),
        "map": ExplosionSubspace.from_map(model, BLOCK, linear_map, rank=rank),
        "matrix": ExplosionSubspace.from_map(model, BLOCK, dense, rank=rank),
        "triplets": ExplosionSubspace.from_map(model, BLOCK, leading_singular(linear_map, k=5), rank=rank),
    }
    root = math.sqrt(model.cfg.d_model)
    for name, subspace in made.items():
        assert subspace.rank == rank, name
        torch.testing.assert_close(subspace.sigma.double(), S[:rank], rtol=1e-4, atol=1e-6)
        for i in range(rank):
            v, u = subspace.right[:, i].double(), subspace.left[:, i].double()
            sign = torch.sign(v @ Vh[i])
            torch.testing.assert_close(v, sign * Vh[i], rtol=0, atol=2e-3)
            torch.testing.assert_close(u, sign * U[:, i], rtol=0, atol=2e-3)
            assert float(u @ dense.double() @ v) > 0
            if weights.ffn.post_norm is None:  # a norm behind would hide how long an answer is
                scale = editing.answer(weights, root * torch.stack([v, -v]).float()).norm(dim=-1)
                assert float(scale[0]) >= float(scale[1]) * (1 - 1e-5)
        assert subspace.right.dtype == subspace.left.dtype == subspace.sigma.dtype == torch.float32


def test_options_reach_the_linear_map():
    model = zoo.cached("llama")
    subspace = ExplosionSubspace.at(model, BLOCK, estimator="sampled", seed=3)
    wanted = leading_singular(linearize(weights_of(model)[BLOCK], estimator="sampled", seed=3).ffn, k=1)
    assert abs(float(subspace.right[:, 0] @ wanted.v[:, 0].float())) > 0.999
    assert float(subspace.sigma[0]) == pytest.approx(float(wanted.s[0]), rel=1e-4)


def test_the_block_is_found_where_none_is_given():
    truth = planted(pathway="embedding")
    prompts = [torch.arange(10), torch.tensor([4, 96, 5, 6])]
    defects = find_defects(trace_norms(truth.model, prompts))
    subspace = ExplosionSubspace.at(truth.model, defects=defects, delimiters=[7, 3])
    assert (subspace.block, subspace.delimiters) == (truth.explosion_block, (3, 7, 96))
    assert subspace.with_delimiters([5, 5]).delimiters == (5,)
    assert ExplosionSubspace.at(load("tiny")).block == 2
    with pytest.raises(ValueError, match=r"block: got none, and no block explodes \(.*\); allowed: 0 to 2"):
        ExplosionSubspace.at(zoo.cached("llama"), defects=find_defects(trace_norms(zoo.cached("llama"), [torch.arange(3, 9)])))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saved_and_loaded_to_the_bit(family, tmp_path):
    model = zoo.cached(family)
    subspace = ExplosionSubspace.at(model, BLOCK, rank=2, delimiters=[9, 5])
    subspace.save(tmp_path / "subspace.safetensors")
    again = ExplosionSubspace.load(str(tmp_path / "subspace.safetensors"), model)
    assert (again.block, again.delimiters, again.model) == (BLOCK, (5, 9), model)
    for name in ("right", "left", "sigma"):
        assert torch.equal(getattr(again, name), getattr(subspace, name))
    assert repr(again) == repr(subspace)
    tokens = zoo.tokens(model, 2, 5)
    with torch.no_grad():
        logits = [model.run_with_hooks(tokens, fwd_hooks=one.ablate(side="both").fwd_hooks()) for one in (subspace, again)]
    assert torch.equal(*logits)


def test_files_that_cannot_be_read_are_named(tmp_path):
    model = zoo.cached("llama")
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    subspace = ExplosionSubspace.at(model, BLOCK, rank=2)
    subspace.save(good)
    bytes_ = good.read_bytes()
    damaged = [b"", b"not a file of tensors", bytes_[: len(bytes_) // 2], bytes_[:-8]]
    for content in damaged:
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"path: .*bad\.safetensors holds no subspace; allowed: a file written by"):
            ExplosionSubspace.load(bad, model)
    tensors = load_file(good)
    save_file(tensors, bad)  # tensors of the right names, and no labels
    with pytest.raises(ValueError, match="holds no subspace"):
        ExplosionSubspace.load(bad, model)
    key = "sd_lens.ExplosionSubspace"
    for labels in ("[]", "{}", "nonsense", json.dumps({"block": 1}), json.dumps({"block": "one", "delimiters": []})):
        save_file(tensors, bad, metadata={key: labels})
        with pytest.raises(ValueError, match="holds no subspace"):
            ExplosionSubspace.load(bad, model)
    whole = json.dumps({"block": BLOCK, "delimiters": [], "model_name": "model"})
    save_file({name: tensors[name] for name in ("right", "left")}, bad, metadata={key: whole})
    with pytest.raises(ValueError, match="holds no subspace"):
        ExplosionSubspace.load(bad, model)
    with pytest.raises(FileNotFoundError, match=r"path: no file .*; allowed: a file written by ExplosionSubspace\.save"):
        ExplosionSubspace.load(tmp_path / "nothing", model)
    for path in (tmp_path, tmp_path / "no folder" / "file"):
        with pytest.raises(ValueError, match=r"path: got .*; allowed: a file in an existing folder"):
            subspace.save(path)


def test_a_file_of_another_model_is_refused(tmp_path, as_users_run_it):
    ExplosionSubspace.at(zoo.cached("llama"), BLOCK).save(tmp_path / "narrow")
    truth = planted(n_blocks=6)
    with pytest.raises(ValueError, match=r"right: got shape \(32, 1\).*; allowed: 1 finite columns of 64, the model's width"):
        ExplosionSubspace.load(tmp_path / "narrow", truth.model)
    ExplosionSubspace.at(truth.model, 5).save(tmp_path / "deep")
    with pytest.raises(ValueError, match=r"block: got 5; allowed: 0 to 2"):
        ExplosionSubspace.load(tmp_path / "deep", planted(n_blocks=3, decay_block=2).model)


BAD_SUBSPACES = {
    "block: got 3; allowed: 0 to 2": lambda model: ExplosionSubspace.at(model, 3),
    "block: got -1; allowed: 0 to 2": lambda model: ExplosionSubspace.at(model, -1),
    "block: got 1.5; ": lambda model: ExplosionSubspace.at(model, 1.5),
    "rank: got 0; allowed: 1 to 32": lambda model: ExplosionSubspace.at(model, 1, rank=0),
    "rank: got 33; allowed: 1 to 32": lambda model: ExplosionSubspace.at(model, 1, rank=33),
    "rank: got 1.0; allowed: 1 to 32": lambda model: ExplosionSubspace.at(model, 1, rank=1.0),
    "rank: got True; allowed: 1 to 32": lambda model: ExplosionSubspace.at(model, 1, rank=True),
    "rank: got 3; allowed: 1 to 2": lambda model: ExplosionSubspace.from_map(
        model, 1, leading_singular(linearize(weights_of(model)[1]).ffn, k=2), rank=3
    ),
    "linear_map: got one of width 64; allowed: 32": lambda model: ExplosionSubspace.from_map(model, 1, torch.eye(64)),
    "linear_map: got one of width 16; allowed: 32": lambda model: ExplosionSubspace.from_map(
        model, 1, SingularTriplets(torch.eye(16)[:, :2], torch.ones(2), torch.eye(16)[:, :2])
    ),
    "linear_map: got str; allowed: ": lambda model: ExplosionSubspace.from_map(model, 1, "tiny"),
    "linear_map: got a tensor of shape (32, 16); allowed: ": lambda model: ExplosionSubspace.from_map(model, 1, torch.ones(32, 16)),
    "right: got shape (32, 1), or NaN; allowed: 1 finite columns of 32": lambda model: ExplosionSubspace(
        model, 1, torch.full((32, 1), float("nan")), torch.eye(32)[:, :1], torch.ones(1)
    ),
    "left: got shape (16, 1), or NaN; allowed: 1 finite columns of 32": lambda model: ExplosionSubspace(
        model, 1, torch.eye(32)[:, :1], torch.eye(16)[:, :1], torch.ones(1)
    ),
    "right: got shape (32, 1), or NaN; allowed: 2 finite columns of 32": lambda model: ExplosionSubspace(
        model, 1, torch.eye(32)[:, :1], torch.eye(32)[:, :1], torch.ones(2)
    ),
    "left: got columns that are not orthonormal": lambda model: ExplosionSubspace(
        model, 1, torch.eye(32)[:, :2], torch.ones(32, 2), torch.ones(2)
    ),
    "delimiters: got 101; allowed: 0 to 100": lambda model: ExplosionSubspace.at(model, 1, delimiters=[101]),
    "delimiters: got -1; allowed: 0 to 100": lambda model: ExplosionSubspace.at(model, 1, delimiters=[-1]),
}


@pytest.mark.parametrize("message", BAD_SUBSPACES)
def test_subspaces_that_cannot_be(message, as_users_run_it):
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the message is looked at below
        BAD_SUBSPACES[message](zoo.cached("llama"))
    assert str(error.value).startswith(message)
    assert "; allowed: " in str(error.value)


def test_models_that_cannot_be(as_users_run_it):
    with pytest.raises(ValueError, match="model: got str; allowed: a TransformerLens model"):
        ExplosionSubspace.at("tiny", 2)
    model = zoo.build("gpt2")
    subspace = editing.random_subspace(model)
    model.enable_compatibility_mode()
    for make in (lambda: ExplosionSubspace.at(model, 1), subspace.ablate):  # also where it became so afterwards
        with pytest.raises(ValueError, match="model: its weights are folded or centred"):
            make()
    model.cfg.attention_dir = "bidirectional"
    with pytest.raises(ValueError, match="model: got an encoder"):
        ExplosionSubspace.at(model, 1)


MASK = torch.ones(2, 5)
POSITIONS = {
    "positions: got 'first'; allowed: 'all', 'initial', 'delimiters', a (batch, pos) mask of truth values, or a list of positions": "first",
    "positions: got 'delimiters', of which this subspace knows none; allowed: a subspace with delimiters": "delimiters",
    "positions: got a tensor of torch.float32 and shape (2, 5); allowed: ": MASK,
    "positions: got a tensor of torch.int64 and shape (2, 5); allowed: ": MASK.long(),
    "positions: got a tensor of torch.bool and shape (5,); allowed: ": MASK[0].bool(),
    "positions: got a tensor of torch.bool and shape (0, 5); allowed: ": MASK[:0].bool(),
    "positions: got [-1]; allowed: ": [-1],
    "positions: got [1.0]; allowed: ": [1.0],
    "positions: got [True]; allowed: ": [True],
    "positions: got []; allowed: ": [],
    "positions: got 3; allowed: ": 3,
    "positions: got None; allowed: ": None,
}


def makers(subspace, tokens):
    """Each way to make an intervention, given keywords."""
    return {
        "ablate": lambda **where: subspace.ablate(**where),
        "mean ablate": lambda **where: subspace.ablate(mean=tokens, **where),
        "patch": lambda **where: subspace.patch(tokens, **where),
        "steer": lambda **where: subspace.steer(2.0, **where),
        "target": lambda **where: subspace.steer(target=1.0, **where),
    }


@pytest.fixture
def untouched(monkeypatch):
    """A subspace of a model that must not be run."""
    subspace = editing.random_subspace(zoo.cached("llama"), BLOCK)
    monkeypatch.setattr(type(subspace.model), "forward", lambda *args, **kwargs: pytest.fail("the model was run"))
    return subspace


@pytest.mark.parametrize("message", POSITIONS)
def test_positions_that_cannot_be(message, untouched, as_users_run_it):
    for make in makers(untouched, zoo.tokens(untouched.model)).values():
        with pytest.raises(ValueError) as error:  # noqa: PT011
            make(positions=POSITIONS[message])
        assert str(error.value).startswith(message)


@pytest.mark.parametrize("side", ["left", "", None, 1])
def test_sides_that_cannot_be(side, untouched, as_users_run_it):
    for make in makers(untouched, zoo.tokens(untouched.model)).values():
        with pytest.raises(ValueError, match=rf"side: got {side!r}; allowed: 'trigger', 'direction', 'both'"):
            make(side=side)
    with pytest.raises(ValueError, match=rf"side: got {side!r}; allowed: 'trigger', 'direction'$"):
        untouched.coefficients(zoo.tokens(untouched.model), side=side)


NAN = float("nan")
VALUES = {
    "scale, target: got neither; allowed: one of them": lambda s: s.steer(),
    "scale, target: got both; allowed: one of them": lambda s: s.steer(1.0, target=1.0),
    "scale: got nan; allowed: a finite number": lambda s: s.steer(NAN),
    "scale: got inf; allowed: a finite number": lambda s: s.steer(math.inf),
    "scale: got 'much'; allowed: a finite number": lambda s: s.steer("much"),
    "target: got nan; allowed: a finite number, or a tensor of 2": lambda s: s.steer(target=NAN),
    "target: got tensor([1., 2., 3.]); allowed: a finite number, or a tensor of 2": lambda s: s.steer(
        target=torch.arange(1.0, 4.0)
    ),
    "target: got 'much'; allowed: a finite number, or a tensor of 2": lambda s: s.steer(target="much"),
    "mean: got tensor([nan, 1.]); allowed: a finite number, or a tensor of 2": lambda s: s.ablate(mean=torch.tensor([NAN, 1.0])),
    "mean: got inf; allowed: a finite number, or a tensor of 2": lambda s: s.ablate(mean=math.inf),
    "mean: got a tensor of shape (2, 2, 2)": lambda s: s.ablate(mean=torch.zeros(2, 2, 2, dtype=torch.long)),
    "mean: got no prompt": lambda s: s.ablate(mean=[]),
    "mean: got text for a model without tokenizer": lambda s: s.ablate(mean="text"),
    "source: prompt 0 has token ids 3 to 101": lambda s: s.patch(torch.tensor([[3, 101]])),
    "source: got no prompt; ": lambda s: s.patch([]),
    "source: prompt 1 is empty": lambda s: s.patch([torch.tensor([3]), torch.tensor([], dtype=torch.long)]),
    "source: got NoneType": lambda s: s.patch(None),
    "source: the cache lacks blocks.1.": lambda s: s.patch({"blocks.0.hook_resid_pre": torch.zeros(1, 3, 32)}),
    "source: got shape (1, 3, 16) at blocks.1.hook_resid_post; allowed: ": lambda s: s.patch(
        {"blocks.1.hook_resid_post": torch.zeros(1, 3, 16)}, side="direction"
    ),
}


@pytest.mark.parametrize("message", VALUES)
def test_values_that_cannot_be(message, untouched, as_users_run_it):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        VALUES[message](untouched)
    assert str(error.value).startswith(message)
    assert "; allowed: " in str(error.value)


def test_a_cache_that_lacks_hook_points_is_told_which():
    """With a filter to paste, which is enough."""
    model = zoo.cached("gpt2")
    subspace, tokens = editing.random_subspace(model, BLOCK), zoo.tokens(model, 2, 5)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter="blocks.1.hook_resid_pre")
    for side, names in (("trigger", ("hook_resid_pre", "hook_attn_out")), ("direction", ("hook_resid_post",))):
        with pytest.raises(ValueError, match=r"source: the cache lacks .* kept by run_with_cache") as error:
            subspace.patch(cache, side=side)
        filtered = eval(str(error.value).split("names_filter=")[1].rstrip(")"))
        assert all(f"blocks.1.{name}" in filtered for name in names)
        with torch.no_grad():
            _, whole = model.run_with_cache(tokens, names_filter=filtered)
            patched = model.run_with_hooks(tokens, fwd_hooks=subspace.patch(whole, side=side).fwd_hooks())
            assert relative_error(patched, model(tokens)) < 1e-6


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="source: got an empty prompt; allowed: prompts of at least one character"):
        editing.random_subspace(with_tokenizer("llama"), BLOCK).patch(["abc", ""])


def test_whole_numbers_are_numbers(as_users_run_it):
    model = zoo.cached("llama")
    subspace, tokens = editing.random_subspace(model, BLOCK), zoo.tokens(model, 2, 5)
    pairs = [
        (subspace.steer(2), subspace.steer(2.0)),
        (subspace.steer(target=1), subspace.steer(target=1.0)),
        (subspace.ablate(mean=1), subspace.ablate(mean=1.0)),
        (subspace.steer(1), subspace.steer(1.0)),
    ]
    with torch.no_grad():
        for one, other in pairs:
            assert torch.equal(*(model.run_with_hooks(tokens, fwd_hooks=i.fwd_hooks()) for i in (one, other)))


def test_controls_are_random_directions_of_their_own():
    """Reproducible, different between seeds, without a trace in the global random state; none where there is no room."""
    subspace = editing.random_subspace(zoo.cached("llama"), BLOCK)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    ablate = subspace.ablate(side="both")
    along = {seed: [edit.site.along for edit in ablate.control(seed).edits] for seed in (0, 1, 2)}
    assert all(torch.equal(*pair) for pair in zip(along[1], [edit.site.along for edit in ablate.control(1).edits], strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    drawn = [vectors for pair in along.values() for vectors in pair]
    for number, one in enumerate(drawn):
        for other in drawn[number + 1 :]:
            assert float((one.T @ other).abs().max()) < 0.7  # of any two, also of two sides of neighbouring seeds
    for width, rank, allowed in ((zoo.D_MODEL, 17, 16), (zoo.D_MODEL, 16, None)):
        eye = torch.eye(width)[:, :rank]
        whole = ExplosionSubspace(subspace.model, BLOCK, eye, eye, torch.ones(rank)).ablate()
        if allowed is None:
            whole.control()
        else:
            with pytest.raises(
                ValueError, match=rf"control: a subspace of rank {rank} leaves no room .*; allowed: at most {allowed}"
            ):
                whole.control()
    assert torch.equal(torch.get_rng_state(), state)
