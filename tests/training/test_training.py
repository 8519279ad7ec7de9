"""The training of the shipped model: batches depend on seed and step alone, and an interruption changes nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import sd_lens
from training import loop
from training.batches import backcopy_windows, make_batch
from training.corpus import docstrings
from training.data import data_of_text
from training.export import export
from training.recipe import Recipe
from training.tokenizer import train_tokenizer

TEXT = "".join(f"Line {i} of a text that repeats itself, with {i * i} numbers in it.\n\n" for i in range(400))
SMALL = Recipe(
    steps=6,
    n_layers=2,
    d_model=16,
    n_heads=2,
    d_ff=24,
    vocab_size=300,
    window=16,
    text_windows=2,
    synthetic_windows=2,
    warmup=2,
    log_every=3,
    checkpoint_every=2,
)


@pytest.fixture(scope="module")
def data():
    tokenizer = train_tokenizer(TEXT, SMALL.vocab_size)
    return data_of_text(tokenizer, TEXT, TEXT[:3000], {})


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """The same operations without the minute that compiling them takes."""
    monkeypatch.setattr(torch, "compile", lambda function: function)


class Killed(BaseException):
    """An interruption that no code expects."""


def test_an_interrupted_run_ends_with_the_same_bits(data, tmp_path):
    whole = loop.train(SMALL, data, tmp_path / "whole")

    def kill(step, model):
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        loop.train(SMALL, data, tmp_path / "killed", on_step=kill)
    steps = []
    continued = loop.train(SMALL, data, tmp_path / "killed", on_step=lambda step, model: steps.append(step))
    assert steps == [5, 6]  # from the checkpoint after step 4
    for one, other in zip(whole.parameters(), continued.parameters(), strict=True):
        assert torch.equal(one, other)


def test_another_recipe_does_not_continue_a_run(data, tmp_path):
    loop.train(SMALL, data, tmp_path)
    with pytest.raises(ValueError, match="another recipe"):
        loop.train(replace(SMALL, lr=1e-4), data, tmp_path)


def test_seeds_and_steps_decide_the_batch(data):
    def batch(step, **changes):
        return make_batch(replace(SMALL, **changes), data.bigrams, data.bos, data.triggers, step)

    assert torch.equal(batch(3), batch(3))
    assert not torch.equal(batch(3), batch(4))
    assert not torch.equal(batch(3), batch(3, seed=1))
    assert (batch(3)[:, 0] == data.bos).all()


def test_backcopy_repeats_what_its_trigger_says(data):
    windows = backcopy_windows(data.bigrams, 50, 64, data.bos, data.triggers, 0.15, np.random.default_rng(0))
    checked = 0
    for window in windows:
        copied = False  # a trigger that was copied there triggers nothing
        for place, token in enumerate(window[:-1]):
            found = np.flatnonzero(data.triggers == token)
            copied = bool(len(found)) and not copied
            if copied:
                checked += 1
                assert window[place + 1] == window[place - (found[0] + 1)]
    assert checked > 100


def test_docstrings_are_read_without_running_anything():
    source = '"""Module."""\nraise SystemExit\n\n\ndef f():\n    """Function."""\n'
    assert [text.strip() for text in docstrings(source)] == ["Module.", "Function."]


def test_an_exported_model_loads(data, tmp_path):
    model = loop.train(replace(SMALL, steps=1), data, tmp_path / "work")
    export(model, data.tokenizer, tmp_path / "model")
    loaded = sd_lens.load(tmp_path / "model")
    assert loaded.to_tokens("Line")[0, 0].item() == data.bos
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        exact, exported = model.eval()(input_ids=ids).logits, loaded(ids)
    assert torch.allclose(exact, exported, atol=1e-2)
