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


def test_the_pathway_told_in_docs_tiny(findings):
    """The numbers of docs/tiny.md, whose sentences would be wrong with others."""
    norm, trigger = findings.anatomy.norm, findings.anatomy.trigger
    assert (norm.block, norm.rows[norm.main].label, norm.rows[norm.main].n_tokens) == (2, "initial", 6)
    shares = {name: share for name, share in norm.top(3)[["name", "share"]].itertuples(index=False)}
    assert shares == pytest.approx({"L2 FFN": 0.782, "L1 FFN": 0.169, "L0 FFN": 0.043}, abs=1e-3)
    neurons = norm.top(4, inside=2)
    assert neurons["name"].tolist() == ["L2N205", "L2N259", "L2N14", "L2N179"]
    assert float(neurons["value"].sum()) == pytest.approx(0.98 * norm.part("ffn", 2), rel=5e-3)
    heads = norm.to_dataframe().query("kind == 'head' and label == 'initial'")
    assert float(heads.share.sum()) == pytest.approx(0.007, abs=1e-3)
    assert float(trigger.total[trigger.main]) == pytest.approx(8.72, abs=0.01)
    assert trigger.part("ffn", 1) == pytest.approx(6.02, abs=0.01)
    assert trigger.part("neuron", 1, 51) == pytest.approx(5.47, abs=0.01)
    assert trigger.top(3, inside=0)["name"].tolist() == ["L0N184", "L0N203", "L0N166"]
    assert not findings.anatomy.massive.found
    assert not findings.anatomy.super_weights.rows
    for scan, ratio in zip(findings.pathways.scans, (13.3, 13.0, 12.9), strict=True):
        assert scan.self_exploding().token.tolist() == ["<s>"]
        assert float(scan.self_exploding().ratio.iloc[0]) == pytest.approx(ratio, abs=0.1)
    assert findings.pathways.sinks.sink_rate == pytest.approx(0.278, abs=1e-3)
