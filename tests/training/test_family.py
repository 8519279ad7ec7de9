"""The stored family: whole, small, what its card says, and related as its members' names say."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import torch
from tokenizers import Tokenizer

import sd_lens
from sd_lens.linear.angles import acute_angle
from sd_lens.models.loading import TINY
from sd_lens.tracing.prompts import default_prompts
from training.data import data_of_text
from training.family import FAMILY, FAMILY_FOLDER, SERIES_STEPS, series_folder
from training.loop import held_out_windows, window_losses
from training.recipe import Recipe
from training.stories import tell_stories
from training.train_family import digest, is_shipped, load_start

CARD = (FAMILY_FOLDER / "README.md").read_text(encoding="utf-8")
FOLDERS = [folder for member in FAMILY.values() for folder in member.folders.values()]
SERIES = [series_folder(step) for step in SERIES_STEPS]


def path(name):
    return TINY if name == "tiny" else FAMILY_FOLDER / name


class Found(Mapping):
    """What is found in each model on the built-in prompts, each loaded once, when first asked for."""

    def __init__(self):
        self._found = {}

    def __getitem__(self, name):
        if name not in self._found:
            model = sd_lens.load(path(name))
            self._found[name] = sd_lens.find_defects(sd_lens.trace_norms(model, default_prompts(model)))
        return self._found[name]

    def __iter__(self):
        return iter(["tiny", *FOLDERS])

    def __len__(self):
        return 1 + len(FOLDERS)

    def angle(self, one, other):
        return acute_angle(self[one].direction.direction, self[other].direction.direction).item()


@pytest.fixture(scope="module")
def found():
    return Found()


@pytest.fixture(scope="module")
def card():
    """The card's table: row by name of the model, cell by heading."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in CARD.splitlines() if line.startswith("|")]
    start = next(index for index, cells in enumerate(lines) if "largest ratio" in cells)
    heading, rows = lines[start], lines[start + 2 : start + 3 + len(FOLDERS)]
    return {cells[0]: dict(zip(heading, cells, strict=True)) for cells in rows}


def test_the_folder_holds_the_family_and_nothing_else():
    assert sorted(child.name for child in FAMILY_FOLDER.iterdir() if child.is_dir()) == sorted(FOLDERS)
    assert len(SERIES) >= 6
    for name in FOLDERS:
        assert sum(file.stat().st_size for file in path(name).iterdir()) < 3e6, name


def test_weights_are_those_of_the_card():
    assert dict(re.findall(r"^([\w-]+) +([0-9a-f]{64})$", CARD, re.MULTILINE)) == {
        name: digest(path(name)) for name in ["tiny", *FOLDERS]
    }


def test_the_shipped_model_is_told_from_its_relatives():
    assert is_shipped(load_start(TINY))
    assert not any(is_shipped(load_start(path(name))) for name in ("step-01000", "fine-tuned"))


def test_all_share_tokenizer_and_shape():
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert {(path(name) / file).read_bytes() for name in FOLDERS} == {(TINY / file).read_bytes()}


def test_the_card_says_what_is_measured(found, card):
    assert list(card) == list(found)
    bases = {folder: member.base for member in FAMILY.values() for folder in member.folders.values()}
    for name, row in card.items():
        assert float(row["largest ratio"]) == pytest.approx(found[name].trace.ratios.max().item(), abs=0.1)
        blocks = [] if row["explosion blocks"] == "-" else [int(block) for block in row["explosion blocks"].split(", ")]
        assert blocks == list(found[name].explosion_blocks)
        for heading, other in (("angle to the shipped", "tiny"), ("angle to its base", bases.get(name))):
            if row[heading] == "-":
                assert other is None or not found[name].found
            else:
                assert float(row[heading].rstrip("°")) == pytest.approx(found.angle(name, other), abs=0.2)


def test_the_explosion_emerges_and_its_direction_settles(found):
    ratios = torch.stack([found[name].trace.ratios[3, found[name].trace.position == 0].max() for name in [*SERIES, "tiny"]])
    assert (ratios[1:4] < 6).all()
    assert (ratios[4:] > 6).all()
    assert (ratios[1:].diff() > 0).all()
    settled = [name for name, step in zip(SERIES, SERIES_STEPS, strict=True) if step >= 500]
    assert all(found[name].explosion_blocks == (2,) for name in settled)
    angles = [found.angle(name, "tiny") for name in settled]
    assert angles == sorted(angles, reverse=True)
    assert angles[0] < 30
    assert angles[-1] < 5


def test_what_stands_out_at_first_is_something_else(found):
    early = found["step-00050"]
    assert early.explosion_blocks[0] == 0
    assert found.angle("step-00050", "tiny") > 80
    assert not found["step-00125"].found


def test_fine_tunes_stay_with_their_bases_and_strangers_apart(found):
    for base, tuned in (("tiny", "fine-tuned"), ("other-seed", "other-seed-fine-tuned")):
        assert found[base].trace.ratios.max() > 6
        assert found[tuned].trace.ratios.max() > 6
        assert found.angle(base, tuned) < 15
    for one in ("tiny", "fine-tuned"):
        for other in ("other-seed", "other-seed-fine-tuned"):
            assert found.angle(one, other) > 60


@torch.no_grad()
def test_fine_tunes_have_learnt_stories_and_forgotten_documentation(card):
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    text = tell_stories().held_out
    stories = held_out_windows(
        Recipe(), data_of_text(tokenizer, text, text, {}), 16
    )  # the first of those that the card's loss is over
    manual = "\n\n".join(value.__doc__ for value in vars(str).values() if value.__doc__)
    documentation = held_out_windows(Recipe(), data_of_text(tokenizer, manual, manual, {}), 8)
    for base, tuned in (("tiny", "fine-tuned"), ("other-seed", "other-seed-fine-tuned")):
        before, after = (load_start(path(name)).eval() for name in (base, tuned))
        on_stories = {base: window_losses(before, stories).mean().item(), tuned: window_losses(after, stories).mean().item()}
        for name, loss in on_stories.items():
            assert float(card[name]["loss on stories"]) == pytest.approx(loss, rel=0.1)
        assert on_stories[base] - on_stories[tuned] > 4
        assert window_losses(after, documentation).mean() - window_losses(before, documentation).mean() > 1
