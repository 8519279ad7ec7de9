"""The command that makes the family, with runs of a second: what it keeps are the models of the training loop, to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
from typer import Typer
from typer.testing import CliRunner

from training import loop, train_family
from training.data import data_of_text
from training.export import export, to_half
from training.family import FAMILY, Member
from training.recipe import Recipe
from training.stories import tell_stories
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
SERIES = Member("series", SMALL, "library", {2: "step-00002", 5: "step-00005"})
FOUNDER = Member("founder", replace(SMALL, seed=1), "library", {6: "founder"})
CHILD = Member("child", replace(SMALL, steps=4, synthetic_windows=0), "stories", {4: "child"}, base="founder")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Little text, and no minute spent on compiling."""
    tokenizer = train_tokenizer(TEXT, SMALL.vocab_size)
    data = data_of_text(tokenizer, TEXT, TEXT[:3000], {})
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(train_family, "load_data", lambda work, vocab_size: data)
    monkeypatch.setattr(train_family, "tell_stories", lambda: tell_stories(40, 4))
    return data


def weights(model_or_folder):
    if isinstance(model_or_folder, LlamaForCausalLM):
        return dict(to_half(model_or_folder).named_parameters())
    # Copies, because what safetensors reads changes with its file.
    return {name: tensor.clone() for name, tensor in load_file(model_or_folder / "model.safetensors").items()}


def same(one, other):
    one, other = weights(one), weights(other)
    return all(torch.equal(one[name], other[name]) for name in one.keys() & other.keys())


class Killed(BaseException):
    """An interruption that no code expects."""


def test_the_series_is_the_loops_own_snapshots_also_after_an_interruption(small, tmp_path, monkeypatch):
    kept = {}
    last = loop.train(SMALL, small, tmp_path / "plain", on_step=lambda step, model: kept.update({step: to_half(model)}))

    def kill(model, tokenizer, folder):
        if folder.name.startswith("step-00005"):
            raise Killed
        export(model, tokenizer, folder)

    with monkeypatch.context() as context:
        context.setattr(train_family, "export", kill)
        with pytest.raises(Killed):
            train_family.make_member(SERIES, tmp_path / "out", tmp_path / "work")
    assert not (tmp_path / "out").exists()  # nothing half done
    final = train_family.make_member(SERIES, tmp_path / "out", tmp_path / "work")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["step-00002", "step-00005"]
    assert same(tmp_path / "out/step-00002", kept[2])
    assert same(tmp_path / "out/step-00005", kept[5])
    assert same(final, last)
    assert not same(kept[2], kept[5])


def test_a_descendant_begins_from_its_base_and_reads_stories(small, tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    train_family.make_member(FOUNDER, out, work)
    train_family.make_member(CHILD, out, work)
    stories = tell_stories(40, 4)
    data = data_of_text(small.tokenizer, stories.train, stories.held_out, {})
    start = LlamaForCausalLM.from_pretrained(out / "founder", dtype=torch.float32).train()
    by_hand = loop.train(CHILD.recipe, data, tmp_path / "by hand", start=start)
    assert same(out / "child", by_hand)
    assert not same(out / "child", out / "founder")


def test_another_base_is_not_continued_from_the_checkpoint_of_the_first(tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    train_family.make_member(FOUNDER, out, work)
    train_family.make_member(CHILD, out, work)
    first = weights(out / "child")
    train_family.make_member(replace(FOUNDER, name="another", recipe=replace(SMALL, seed=2)), out, work)
    train_family.make_member(CHILD, out, work)
    second = weights(out / "child")
    assert not any(torch.equal(first[name], second[name]) for name in first if first[name].ndim > 1)


def test_what_cannot_be_made_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"child: got no model in .*founder; allowed: after 'founder' has been made"):
        train_family.make_member(CHILD, tmp_path / "out", tmp_path / "work")
    train_family.make_member(replace(SERIES, folders={2: "step-00002"}), tmp_path / "out", tmp_path / "work")
    with pytest.raises(ValueError, match="beyond the steps of step-00005"):
        train_family.make_member(SERIES, tmp_path / "out", tmp_path / "work")


def test_an_unknown_member_is_refused_before_any_work(tmp_path):
    app = Typer()
    app.command()(train_family.main)
    result = CliRunner().invoke(app, ["fine-tuned", "cousin", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "cousin" in result.output
    assert not (tmp_path / "out").exists()


def test_the_command_makes_what_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(train_family, "FAMILY", {member.name: member for member in (SERIES, FOUNDER, CHILD)})
    app = Typer()
    app.command()(train_family.main)
    out = tmp_path / "out"
    threads = torch.get_num_threads()
    # The base comes first, in whatever order they are asked for.
    result = CliRunner().invoke(app, ["child", "founder", "--out", str(out), "--work", str(tmp_path), "--threads", str(threads)])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["child", "founder"]
    assert f"{train_family.digest(out / 'child')}  {out / 'child'}" in result.output


def test_bases_come_before_their_descendants():
    names = ["tiny", *FAMILY]
    assert all(member.base is None or names.index(member.base) < names.index(name) for name, member in FAMILY.items())
    assert all(max(member.folders) <= member.recipe.steps for member in FAMILY.values())
