"""The shipped model shows what its card says, found by the tools and not told to them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import sd_lens
from sd_lens.models.loading import TINY
from sd_lens.tracing.prompts import BUILT_IN_PROMPTS
from training.measure import initial_table, prompt_ids


@pytest.fixture(scope="module")
def tiny():
    return sd_lens.load("tiny")


@pytest.fixture(scope="module")
def findings(tiny):
    return sd_lens.analyse(tiny)


def test_bos_stands_once_in_front(tiny):
    tokens = tiny.to_tokens("A text.")[0].tolist()
    assert tokens.count(tiny.tokenizer.bos_token_id) == 1
    assert tokens[0] == tiny.tokenizer.bos_token_id


def test_initial_norm_is_ten_times_the_others(findings):
    defects = findings.defects
    assert len(defects.explosion_blocks) == 1
    assert len(defects.tokens) == len(BUILT_IN_PROMPTS)
    for token in defects.tokens:
        assert (token.pos, token.token) == (0, "<s>")
        assert token.peak_block == defects.explosion_blocks[0]
        assert token.ratio >= 10


def test_one_ffn_makes_it(findings):
    (share,) = findings.attribution.shares
    assert share.main_part == "ffn"
    assert share.ffn_share > 0.9
    assert share.ffn > 0.7 * share.after  # of all that is there, not only of this block's step
    assert abs(share.residual) < 1e-4 * share.after


def test_singular_direction_is_the_defect_direction(findings):
    defects, directions = findings.defects, findings.directions
    for row in directions.rows:
        if row.part == "block":
            if row.block in defects.explosion_blocks:
                assert row.angle_deg < 30
            else:
                assert row.angle_deg > 60
    block = directions.row(defects.explosion_blocks[0])
    dense = sd_lens.linearize(sd_lens.weights_of(sd_lens.load("tiny"))[block.block]).to_dense().double()
    u, s, _ = torch.linalg.svd(dense)
    assert block.sigma1 == pytest.approx(s[0].item(), rel=1e-6)
    assert block.angle_deg == pytest.approx(float(sd_lens.acute_angle(u[:, 0], defects.direction.direction)), abs=1e-2)


def test_no_decay_and_no_other_initial_token(tiny, findings):
    """What the card says the model does not show."""
    assert findings.defects.decay_blocks == ()
    without_bos = sd_lens.trace_norms(tiny, list(BUILT_IN_PROMPTS), prepend_bos=False)
    assert not sd_lens.find_defects(without_bos).found


def test_the_cards_table_is_what_is_measured(tiny):
    ids = prompt_ids(tiny)
    defects = sd_lens.find_defects(sd_lens.trace_norms(tiny, ids))
    measured = initial_table(tiny, ids, defects).map(str).to_numpy().tolist()
    card = (TINY / "README.md").read_text(encoding="utf-8")
    told = [line.strip("| \n").split(" | ") for line in card.splitlines() if re.match(r"\| \d \|", line)]
    assert len(told) == len(measured)
    for says, is_ in zip(told, measured, strict=True):
        numbers = [[float(n) for n in re.findall(r"[\d.]+", " ".join(row))] for row in (says, is_)]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.11)


def test_folder_is_small():
    assert sum(path.stat().st_size for path in Path(TINY).iterdir()) < 4 * 2**20
