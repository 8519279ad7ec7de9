"""Defect directions over training: emergence and angles against planted rotations, plain computations and the shipped model's own training."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from recording import record, same_state, state

from sd_lens.applications import checkpoints as checkpoints_module
from sd_lens.applications.checkpoints import series, step_in
from sd_lens.applications.dynamics import direction_stability
from sd_lens.linear.angles import acute_angle
from sd_lens.models.loading import TINY, load
from sd_lens.models.planted import planted
from sd_lens.tracing.defects import defect_direction

FAMILY = Path(__file__).parents[2] / "training" / "family"
IDS = torch.arange(40).reshape(2, 20)


def out_weight(model, block=1):
    """Output weights of a planted FFN, ``(d_model, d_mlp)``; neuron 0 writes the defect."""
    return model.original_model.model.layers[block].mlp.down_proj.weight.data


def turn(truth, degrees: float, *, scale: float = 1.0):
    """Turns a planted model's defect direction towards its trigger, to so many degrees from where it was planted."""
    angle = math.radians(degrees)
    written = math.cos(angle) * truth.direction + math.sin(angle) * truth.trigger
    out_weight(truth.model)[:, 0] = scale * WRITTEN_NORM * written
    return truth.model


def new(**options):
    """A planted model with its explosion as it is."""
    return planted(**options).model


WRITTEN_NORM = float(out_weight(new())[:, 0].norm())


@pytest.fixture(scope="module")
def on():
    """A planted model that explodes."""
    return new()


@pytest.fixture(scope="module")
def off():
    """The same, but that its explosion block writes next to nothing."""
    return turn(planted(), 0, scale=1e-6)


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


@pytest.fixture(scope="module")
def before():
    """The shipped model shortly before its explosion."""
    return load(FAMILY / "step-00375")


def columns(found, name):
    return [getattr(one, name) for one in found.states]


@pytest.fixture(scope="module")
def trained(before, tiny):
    """The shipped model's own training, from before the explosion to its end."""
    return direction_stability([FAMILY / "step-00050", before, FAMILY / "step-00500", FAMILY / "step-01000", tiny], progress=False)


def test_the_explosion_of_the_shipped_model_emerges_at_step_500_and_its_direction_settles(trained):
    assert columns(trained, "step") == [50, 375, 500, 1000, None]
    assert columns(trained, "found") == [True, False, True, True, True]  # the first one is of other tokens, and passes
    assert trained.emergence is trained.states[2]
    assert trained.emergence.explosion_block == 2
    assert columns(trained, "n_same") == [0, 0, 6, 6, 6]
    ratios, angles = columns(trained, "max_ratio"), columns(trained, "angle_to_last_deg")
    assert 5 < ratios[1] < 6 < ratios[2] < 7 < 10 < ratios[3] < ratios[4]
    assert all(before - after > 3 for before, after in pairwise(angles))
    assert angles[0] > 60
    assert 20 < angles[2] < 28
    assert angles[3] < 5
    assert angles[4] == 0.0
    assert trained.settled is trained.states[3]
    own = columns(trained, "own_angle_to_last_deg")
    assert own[3] == pytest.approx(angles[3], abs=1e-6)
    assert own[0] > 80  # the passing explosion has nothing to do with the one that stays
    assert [math.isnan(angle) for angle in own] == [False, True, False, False, False]
    assert trained.sentences()[0].startswith(
        "The explosion emerges at step 500 (block 2): the largest norm is 5.6 times the others' median at step 375, 6.4 times at step 500, "
        "13.3 times at tiny. An earlier one, of other tokens, at step 50, did not last."
    )
    assert "It stays within 15° from step 1000 on." in trained.sentences()[1]
    assert "Before the explosion that vector is the ordinary residual vector" in trained.sentences()[2]
    assert (
        repr(trained) == "DirectionStability(tiny: 5 checkpoints, explosion from step 500 on, direction 66° from the last at first)"
    )


def test_an_explosion_of_other_tokens_is_not_the_emergence_though_nothing_lies_between(trained):
    found = replace(trained, states=(trained.states[0], *trained.states[2:]))
    assert columns(found, "found") == [True] * 4
    assert found.emergence is trained.states[2]
    assert found.sentences()[0].startswith(
        "The explosion emerges at step 500 (block 2): the largest norm is 8.0 times the others' median at step 50 (in other tokens), 6.4 times at step 500, "
    )
    assert "An earlier one, of other tokens, at step 50, did not last." in found.sentences()[0]
    gone = replace(trained.states[-1], found=False)  # high-norm tokens that no block makes
    last = replace(found, states=(*found.states[:-1], gone)).sentences()[0]
    assert last.endswith(
        "no block that makes them. Earlier there was one, at step 500, step 1000. Earlier there was one, of other tokens, at step 50."
    )


def test_a_direction_that_comes_near_and_leaves_again_has_not_settled(trained):
    states = [replace(one, angle_to_last_deg=angle) for one, angle in zip(trained.states[2:], (5.0, 40.0, 0.0), strict=True)]
    found = replace(trained, states=tuple(states))
    assert found.settled is None
    assert "from where it ends. It does not stay within 15° before the last checkpoint. (" in found.sentences()[1]


def test_angles_and_norms_are_those_of_plain_means(trained, before, tiny):
    """BOS sees only itself, so that one prompt and one position say it all; it is high after blocks 2 to 5."""
    prompt = tiny.to_tokens("Once upon a time.")
    points = [f"blocks.{block}.hook_resid_post" for block in (2, 3, 4, 5)]
    means, norms = [], []
    for model in (before, tiny):
        seen = record(model, prompt, points)
        vectors = torch.stack([seen[name][0, 0] for name in points]).double()
        means.append(vectors.mean(0))
        norms.append(float(vectors.norm(dim=1).mean()))
    wanted = torch.rad2deg(torch.arccos(torch.nn.functional.cosine_similarity(*means, dim=0)))
    assert trained.states[1].angle_to_last_deg == pytest.approx(float(wanted), abs=1e-3)
    assert [trained.states[1].norm, trained.states[-1].norm] == pytest.approx(norms, rel=1e-4)
    assert trained.n_vectors == 24
    assert float(trained.directions[1].double() @ means[0]) == pytest.approx(float(means[0].norm()), rel=1e-6)


def test_turns_of_a_planted_direction_are_measured_with_one_model_alive_at_a_time(monkeypatch, on):
    given = {"step1": (120.0, 0.1), "step20": (35.0, 1.0), "step300": (0.0, 1.0)}
    alive, asked = [], []

    def fake(name, *, dtype, **boot):
        assert [one() for one in alive] == [None] * len(alive)
        asked.append((name, boot, dtype))
        degrees, scale = given[boot["revision"]]
        model = turn(planted(), degrees, scale=scale)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(checkpoints_module, "load", fake)
    names = [f"owner/name@{step}" for step in given]
    # What the decay block leaves of the norm is some ten times the others', which is not to be followed here.
    found = direction_stability(names, IDS, min_ratio=100.0, device="cpu", progress=False)
    assert [one() for one in alive] == [None] * 3
    # The last goes first: it says which tokens are followed.
    revisions = [("owner/name", {"device": "cpu", "revision": step}, torch.float32) for step in ("step300", "step1", "step20")]
    assert asked == revisions
    assert columns(found, "label") == names
    assert columns(found, "step") == [1, 20, 300]
    assert columns(found, "angle_to_last_deg") == pytest.approx([120, 35, 0], abs=0.1)
    assert columns(found, "angle_to_previous_deg")[1:] == pytest.approx([85, 35], abs=0.1)
    assert math.isnan(found.states[0].angle_to_previous_deg)
    assert columns(found, "explosion_block") == [1] * 3
    assert found.states[0].norm == pytest.approx(0.1 * found.states[1].norm, rel=0.01)
    assert float(acute_angle(found.directions[-1], defect_direction(on, IDS, min_ratio=100.0).direction)) < 1e-4


def test_means_over_prompts_of_any_lengths_are_those_of_one_prompt_after_the_other():
    """High-norm tokens anywhere in prompts, and one prompt that has none, in batches smaller than a prompt and larger than all."""
    models = [planted(pathway="embedding", seed=seed).model for seed in (0, 1)]
    trigger = 96
    prompts = [torch.tensor(ids) for ids in ([trigger, 3, 4, 5], [6, 7], [8, trigger, 9, 10, 11, trigger, 12], [13, 14, 15])]
    results = [direction_stability(models, prompts, steps=[1, 2], batch_tokens=size, progress=False) for size in (1, 4096)]
    points = ["blocks.0.hook_resid_pre", *(f"blocks.{block}.hook_resid_post" for block in range(6))]
    sums = {who: torch.zeros(2, 64, dtype=torch.float64) for who in ("these", "others")}
    for number, model in enumerate(models):
        for prompt in (prompts[0], prompts[2]):
            seen = record(model, prompt.unsqueeze(0), points)
            for point in (2, 3, 4):  # after blocks 1, 2 and 3
                stream = seen[points[point]][0].double()
                sums["these"][number] += stream[prompt == trigger].sum(0)
                sums["others"][number] += stream[prompt != trigger].sum(0)
    cosines = {who: torch.nn.functional.cosine_similarity(*both, dim=0) for who, both in sums.items()}
    wanted = {who: math.degrees(math.acos(float(cosine))) for who, cosine in cosines.items()}
    assert wanted["others"] > 90 > wanted["these"]  # a mean has a sign
    for found in results:
        assert found.n_vectors == 9
        assert found.states[0].angle_to_last_deg == pytest.approx(wanted["these"], abs=1e-3)
        assert found.states[0].others_angle_to_last_deg == pytest.approx(wanted["others"], abs=1e-3)
        assert columns(found, "n_high") == [3, 3]
        assert columns(found, "n_same") == [3, 3]


@pytest.mark.parametrize(("pattern", "emergence"), [((1, 0, 1, 1), 2), ((1, 1), 0), ((0, 1, 0), None)])
def test_the_emergence_is_where_the_last_run_of_explosions_begins(on, off, pattern, emergence):
    untouched = state(on)
    found = direction_stability([(off, on)[explodes] for explodes in pattern], IDS, progress=False)
    assert same_state(untouched, state(on))
    assert columns(found, "found") == [bool(explodes) for explodes in pattern]
    assert found.emergence is (None if emergence is None else found.states[emergence])
    text = " ".join(found.sentences())
    if emergence is None:
        assert all(math.isnan(angle) for angle in columns(found, "angle_to_last_deg"))
        assert found.n_vectors == 0
        assert bool(found.directions.isnan().all())
        assert len(found.sentences()) == 1
        assert "so there is no direction to follow" in text
        assert "Earlier there was one, at planted (2)." in text
        assert "no explosion in the last" in repr(found)
        assert found.settled is None
    elif emergence == 0:
        assert "Every checkpoint has an explosion, from planted (1) on" in text
        assert "Before the explosion" not in text
    else:
        assert f"The explosion emerges at planted ({emergence + 1}) (block 1)" in text


def test_a_folder_of_checkpoints_stands_for_them_in_order(tmp_path):
    for name in ("step-1000", "step-20", "notes", "fine-tuned"):
        (tmp_path / name).mkdir()
    for name in ("step-1000", "step-20", "fine-tuned"):
        (tmp_path / name / "config.json").write_text("{}")
    assert [(one.label, one.step) for one in series(tmp_path)] == [("step-20", 20), ("step-1000", 1000)]
    assert [one.label for one in series([tmp_path, "tiny"])] == ["step-20", "step-1000", "tiny"]


@pytest.mark.parametrize("weights", ["model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_a_step_without_its_configuration_is_named_rather_than_left_out(tmp_path, weights):
    for name in ("step-1", "step-2", "step-3", "logs-of-step-4", "notes"):
        (tmp_path / name).mkdir()
    for name in ("step-1", "step-3"):
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "notes" / weights).touch()  # not named after a step
    (tmp_path / "logs-of-step-4" / "log.txt").touch()  # no weights
    (tmp_path / "step-9").touch()  # no folder
    assert [one.label for one in series(tmp_path)] == ["step-1", "step-3"]
    (tmp_path / "step-2" / weights).touch()
    with pytest.raises(ValueError, match=r"checkpoints: folder .*step-2 holds weights but no config\.json; allowed: ") as complaint:
        series(tmp_path)
    assert str(tmp_path / "step-2") in str(complaint.value)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-00250", 250),
        ("step1000", 1000),
        ("checkpoint-500", 500),
        ("global_step_12", 12),
        ("stage2-step5000-tokens21B", 5000),
        ("steps=3", 3),
        ("00125", 125),
        ("step1k", None),
        ("step1.5", None),
        ("main", None),
        ("pythia-70m", None),
    ],
)
def test_steps_are_read_from_names(name, step):
    assert step_in(name) == step


def test_random_directions_are_as_far_apart_as_is_said(trained):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 20000, 128, generator=generator, dtype=torch.float64)
    angles = torch.rad2deg(torch.arccos(torch.nn.functional.cosine_similarity(a, b, dim=-1)))
    mean, spread = trained.chance_deg
    assert mean == pytest.approx(float(angles.mean()), abs=0.15)
    assert spread == pytest.approx(float(angles.std()), abs=0.1)


def test_the_table_has_a_row_per_checkpoint(trained):
    table = trained.to_dataframe()
    assert table["step"].isna().tolist() == [False] * 4 + [True]
    assert table["explosion_block"].dropna().tolist() == [0, 2, 2, 2]
    assert table["label"].tolist() == ["step-00050", "step-00375", "step-00500", "step-01000", "tiny"]


def a_folder(folder: Path, **config) -> str:
    """A folder with nothing but a configuration."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("given", "options", "needle"),
    [
        ([], {}, "checkpoints: got 0; allowed: two or more"),
        (["tiny"], {}, "checkpoints: got 1; allowed: two or more"),
        ("tiny", {}, "checkpoints: got 1; allowed: two or more"),
        (["tiny", 3], {}, "checkpoints: got int; allowed: folders, hub names or TransformerLens models"),
        (["empty", "tiny"], {}, "empty has no config.json, nor has any folder in it that is named after a step; allowed: a folder"),
        (["file", "tiny"], {}, "file is a file; allowed"),
        (["tiny", "o/n@"], {}, "checkpoints: got 'o/n@'; allowed: a hub name and a revision"),
        (["step-5", "step-4"], {}, "steps: got 4 (step-4) after 5 (step-5); allowed: steps that grow"),
        (["tiny", "tiny"], {"steps": [7, 7]}, "steps: got 7 (tiny (2)) after 7 (tiny (1)); allowed"),
        (["tiny", "tiny"], {"steps": [1]}, "steps: got 1; allowed: one for each of 2 checkpoints"),
        (["tiny", "tiny"], {"steps": [-1, 1]}, "steps: got -1; allowed: whole numbers from 0"),
        (["wide", "tiny"], {}, "checkpoints: wide has d_model 256; allowed: that of tiny, 128"),
        (["deep", "tiny"], {}, "checkpoints: deep has blocks 7; allowed: that of tiny, 6"),
        (["tiny", "tiny"], {"min_ratio": 1.0}, "min_ratio: got 1.0; allowed: above 1"),
        (["tiny", "tiny"], {"batch_tokens": 0}, "batch_tokens: got 0; allowed"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_bad_input_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, given, options, needle):
    monkeypatch.setattr(checkpoints_module, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    a_folder(tmp_path / "step-4")
    a_folder(tmp_path / "step-5")
    a_folder(tmp_path / "wide", hidden_size=256, num_hidden_layers=6)
    a_folder(tmp_path / "deep", n_embd=128, n_layer=7)
    with pytest.raises(ValueError, match="allowed") as complaint:
        direction_stability(given, **options)
    assert needle in str(complaint.value)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoints: no folder"):
        direction_stability([str(tmp_path / "nowhere"), "tiny"])


def test_other_tokens_in_one_checkpoint_are_refused_by_its_name(tmp_path, tiny):
    folder = tmp_path / "step-1"
    shutil.copytree(TINY, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    complaint = r"checkpoints: step-1 makes other tokens of prompt 1 than tiny \(.*allowed: checkpoints with one tokenizer"
    with pytest.raises(ValueError, match=complaint):
        direction_stability([folder, tiny], ["xx", "a", "cc"], progress=False)


def test_a_last_checkpoint_that_cannot_be_loaded_is_named(monkeypatch, on):
    def missing(name, **_):
        raise ValueError(f"model: {name!r} could not be loaded; allowed: a name on the hub")

    monkeypatch.setattr(checkpoints_module, "load", missing)
    for given in (["some/hub@step1", "some/hub@step2"], [on, "some/hub@step2"]):
        with pytest.raises(ValueError, match=r"^checkpoints: some/hub@step2: model: 'some/hub' could not be loaded"):
            direction_stability(given, IDS, progress=False)


def test_complaints_name_the_checkpoint(on):
    broken = new()
    out_weight(broken)[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"checkpoints: planted \(1\): model: its residual stream is NaN or infinite after block 1"
    ):
        direction_stability([broken, on], IDS, progress=False)
    with pytest.raises(ValueError, match=r"checkpoints: planted \(1\) has d_model 32; allowed: that of planted \(2\), 64"):
        direction_stability([new(d_model=32), on], IDS)
    with pytest.raises(ValueError, match="boot options: got device with ready models"):
        direction_stability([on, on], IDS, device="cpu")
    with pytest.raises(ValueError, match=r"^prompts: got text for a model without tokenizer"):
        direction_stability([on, on], "text")
