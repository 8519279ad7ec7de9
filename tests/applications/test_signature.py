"""Signatures: the planted direction found by either method, none where there is none, and files that cannot be edited unseen."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from shared import planted

from sd_lens.applications import signing
from sd_lens.applications.signature import Signature, with_sign
from sd_lens.applications.signing import signature, signature_of
from sd_lens.applications.weight_scan import FFNStretch, explosion_among, why_none
from sd_lens.linear.angles import acute_angle
from sd_lens.models.loading import weights_of
from sd_lens.tracing.defects import find_defects
from sd_lens.tracing.norms import trace_norms


@pytest.fixture
def made():
    direction = torch.tensor([0.6, 0.0, -0.8, 0.0])
    return Signature(
        direction=with_sign(direction),
        model_name="some/model “1”",
        d_model=4,
        n_blocks=3,
        method="activations",
        block=1,
        prompts="given",
        n_prompts=2,
        n_tokens=3,
        spread_deg=1.25,
        tokens=("<s>", "“.”"),
        positions="both",
        notes=("a note",),
        version="9.9",
    )


@pytest.mark.usefixtures("as_users_run_it")  # type checks cost more than the products of small matrices
def test_weights_alone_tell_the_planted_block_and_direction(planted_model):
    found = signature(planted_model.model, method="weights")
    assert found.block == planted_model.explosion_block
    assert float(acute_angle(found.direction, planted_model.direction)) < 2
    assert found.gap is not None
    assert found.gap > 40
    assert any(f"block {planted_model.decay_block}'s FFN stands out too" in note and "takes away" in note for note in found.notes)


def test_activations_tell_the_planted_direction():
    truth = planted()
    tokens = torch.arange(60).reshape(3, 20)
    found = signature(truth.model, prompts=tokens)
    assert (found.block, found.n_tokens, found.n_prompts, found.prompts) == (truth.explosion_block, 3, 3, "given")
    assert float(acute_angle(found.direction, truth.direction)) < 1
    assert found.direction is not None
    assert found.direction.norm().item() == pytest.approx(1, abs=1e-6)
    assert (found.positions, found.tokens) == ("initial", ("<0>", "<20>", "<40>"))  # there is no tokenizer
    assert found.largest()[0][1] == float(found.direction.abs().max())
    defects = find_defects(trace_norms(truth.model, tokens))
    assert signature_of(defects).content_hash == found.content_hash
    measured = defects.trace.direction
    assert measured is not None
    scattered = replace(measured, mean_pairwise_angle_deg=50.0)
    assert "50° apart" in signature_of(replace(defects, trace=replace(defects.trace, direction=scattered))).notes[0]


@pytest.mark.usefixtures("as_users_run_it")
def test_the_shipped_model_tells_the_same_story_by_both_methods_and_weights_load_no_model(monkeypatch):
    measured = signature("tiny")
    monkeypatch.setattr(signing, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    told = signature("tiny", method="weights")
    assert measured.block == told.block == 2
    assert float(acute_angle(measured.direction, told.direction)) < 7
    assert told.gap == pytest.approx(3.75, abs=0.02)
    with pytest.raises(ValueError, match="block: got 6; allowed: 0 to 5"):
        signature("tiny", method="weights", block=6)
    quiet = signature("tiny", method="weights", block=3)  # one block is read
    assert quiet.block == 3
    assert any("does not stand out" in note for note in quiet.notes)
    assert float(acute_angle(quiet.direction, measured.direction)) > 60


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.usefixtures("as_users_run_it")
def test_random_models_have_no_signature_and_say_why(family):
    model = zoo.cached(family)
    run = signature(model, prompts=zoo.tokens(model, 3))
    assert not run.found
    assert run.because.startswith("no token's norm reaches 6 times")
    told = signature(weights_of(model))
    assert told.method == "weights"
    assert not told.found
    assert told.because.startswith("no FFN's largest singular value is 1.4 times its second")
    assert "no signature by weights" in told.sentence()


def test_a_block_that_cancels_is_no_explosion():
    def stretch(block, gap, cosine):
        return FFNStretch(block, gap, 1.0, torch.tensor([1.0, 0.0]), cosine, ())

    quiet, decay, loud, louder = stretch(0, 1.2, 1.0), stretch(4, 50.0, -0.99), stretch(1, 3.0, 0.1), stretch(2, 4.0, 0.7)
    assert explosion_among([quiet, loud, louder, decay]) is louder
    assert explosion_among([quiet, decay]) is None
    assert "only block 4's FFN stands out (50)" in why_none([quiet, decay])
    assert explosion_among([quiet]) is None
    assert "1.2, in block 0" in why_none([quiet])


def test_the_sign_is_that_of_the_largest_coordinate():
    direction = torch.tensor([0.1, -3.0, 1.0])
    torch.testing.assert_close(with_sign(direction), with_sign(-2 * direction), rtol=0, atol=0)
    assert with_sign(direction)[1] > 0.9


def test_saved_and_loaded_it_is_the_same(made, tmp_path):
    made.save(tmp_path / "v1.5")
    assert sorted(os.listdir(tmp_path)) == ["v1.5.json", "v1.5.safetensors"]
    for name in ("v1.5", "v1.5.json", "v1.5.safetensors"):
        again = Signature.load(tmp_path / name)
        torch.testing.assert_close(again.direction, made.direction, rtol=0, atol=0)
        assert replace(again, direction=None) == replace(made, direction=None)
    without = replace(made, direction=None, because="nothing there", block=None)
    without.save(tmp_path / "v1.5.json")
    assert Signature.load(tmp_path / "v1.5") == without


def test_the_hash_is_over_labels_and_vector(made, tmp_path):
    made.save(tmp_path / "one")
    labels = json.loads((tmp_path / "one.json").read_text(encoding="utf-8"))
    said = labels.pop("content_hash")
    del labels["schema"]
    text = json.dumps(labels, sort_keys=True, separators=(",", ":"))
    vector = np.array([-0.6, 0.0, 0.8, 0.0], dtype="<f4")
    assert hashlib.sha256(text.encode() + b"\0" + vector.tobytes()).hexdigest() == said == made.content_hash
    assert replace(made, block=2).content_hash != said


def test_an_edited_signature_is_refused(made, tmp_path):
    made.save(tmp_path / "one")
    listing, tensors = tmp_path / "one.json", tmp_path / "one.safetensors"
    text = listing.read_text(encoding="utf-8")
    for edited in (text.replace('"block": 1', '"block": 2'), text.replace('"n_tokens": 3', '"n_tokens": NaN')):
        assert edited != text
        listing.write_text(edited, encoding="utf-8")
        with pytest.raises(ValueError, match="path: hash mismatch"):
            Signature.load(listing)
    listing.write_text(text, encoding="utf-8")
    save_file({"direction": -load_file(tensors)["direction"]}, tensors)
    with pytest.raises(ValueError, match="hash mismatch"):
        Signature.load(listing)
    made.save(tmp_path / "one")
    assert Signature.load(listing).block == 1


def test_half_a_signature_and_other_files_are_refused(made, tmp_path):
    made.save(tmp_path / "one")
    listing, tensors = tmp_path / "one.json", tmp_path / "one.safetensors"
    content = tensors.read_bytes()
    tensors.unlink()
    with pytest.raises(ValueError, match=r"one\.json has no one\.safetensors beside it"):
        Signature.load(listing)
    tensors.write_bytes(content[:-3])
    with pytest.raises(ValueError, match="cannot be read"):
        Signature.load(listing)
    tensors.write_bytes(content)
    for text, needle in (
        ("{", "not valid JSON"),
        ("[]", "holds no signature"),
        ('{"schema": "other/1"}', "holds schema 'other/1'"),
    ):
        listing.write_text(text)
        with pytest.raises(ValueError, match=needle):
            Signature.load(listing)
    with pytest.raises(FileNotFoundError, match="no file"):
        Signature.load(tmp_path / "two.json")
    with pytest.raises(ValueError, match="whose folder does not exist"):
        made.save(tmp_path / "nowhere" / "one")


def test_both_files_are_written_or_none(made, tmp_path, monkeypatch):
    made.save(tmp_path / "old")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    move, calls = os.replace, []

    def fails_at_the_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no space left")
        move(source, target)

    for name in ("old", "new"):
        calls.clear()
        monkeypatch.setattr(os, "replace", fails_at_the_second)
        with pytest.raises(OSError, match="no space left"):
            replace(made, n_tokens=99).save(tmp_path / name)
        assert len(calls) >= 2
        monkeypatch.setattr(os, "replace", move)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    (tmp_path / "blocked.safetensors").mkdir()
    with pytest.raises(ValueError, match="which is a folder"):
        made.save(tmp_path / "blocked")
    assert not (tmp_path / "blocked.json").exists()


@pytest.mark.usefixtures("as_users_run_it")
def test_bad_input_is_named_before_any_work(tmp_path):
    model = zoo.cached("llama")
    weights = weights_of(model)
    for given, options, needle in (
        (model, {"method": "magic"}, "method: got 'magic'; allowed: 'activations', 'weights'"),
        (weights, {"method": "activations"}, "method: got 'activations' with weights only"),
        (model, {"method": "weights", "prompts": "a"}, "prompts: got some with method 'weights'"),
        (model, {"block": 1}, "block: got 1 with method 'activations'"),
        (weights, {"block": 3}, "block: got 3; allowed: 0 to 2"),
        (model, {"method": "weights", "block": -1}, "block: got -1; allowed: 0 to 2"),
        (model, {"dtype": torch.float16}, "dtype: got torch.float16 with a ready model"),
        (model, {"device": "cpu"}, "device: got 'cpu' with a ready model"),
        (model, {"min_ratio": 1.0}, "min_ratio: got 1.0"),
        (tmp_path, {}, "has no config.json"),
        (tmp_path, {"method": "weights"}, "has no config.json"),
        (3, {}, "model: got int"),
    ):
        with pytest.raises(ValueError, match=needle.replace("(", r"\(")):
            signature(given, **options)


def test_what_it_says(made):
    assert repr(made) == f"Signature(some/model “1”, by activations: d_model 4, block 1, {made.content_hash[:12]})"
    assert (
        "of some/model “1” is the mean direction of 3 high-norm tokens (initial and later '<s>', '“.”'); block 1 makes"
        in made.sentence()
    )
    assert made.sentence("x").startswith("The signature of x is")
    assert "no single block makes" in replace(made, block=None).sentence()
    assert made.largest(2) == [(2, pytest.approx(0.8)), (0, pytest.approx(-0.6))]
    frame = made.to_dataframe()
    assert list(frame.coordinate) == [2, 0, 1, 3]
    assert made.chance.d_model == 4
