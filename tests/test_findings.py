"""The two sentences say what was found, and only that."""

import re
from dataclasses import replace

import pytest
import torch
import zoo
from shared import planted

from sd_lens.findings import analyse
from sd_lens.wording import propagated


@pytest.fixture(scope="module")
def initial():
    return analyse(planted().model, torch.arange(60).reshape(3, 20), progress=False)


def test_an_explosion_at_the_first_position(initial):
    what, whence, *more = initial.sentences()
    assert re.fullmatch(
        r"planted has an explosion in block 1: 3 high-norm tokens \(all at position 0\) among 60 tokens of 3 prompts; the strongest, "
        r"'<\d+>' at position 0, reaches \d+\.\d times the median of the others \(norm \d+\), and the norm falls again in block 4\.",
        what,
    )
    assert re.fullmatch(
        r"The FFN of block 1 writes 100% of its step, and the leading left singular vector of that block's linear map is \d° from the "
        r"direction of the high-norm tokens, against \d\d° or more in the blocks that neither explode nor decay\.",
        whence,
    )
    assert repr(initial) == f"Findings({' '.join([what, whence, *more])})"
    assert more[0].startswith(
        "In initial tokens, the projection on the defect direction after block 1 is written by L1 FFN (100%; its neuron 0 "
    )
    assert more[1].endswith(" is written by embedding (100%).")
    assert more[2].startswith("Token ids that explode by themselves: 97 of 97 alone at position 0, 0 of 97 without attention, ")
    removal = initial.causality.sentences()
    said = propagated(initial.propagation)
    assert tuple(more[-len(said) :]) == said
    assert tuple(more[-len(said) - 2 : -len(said)]) == removal
    assert removal[0].startswith("With the explosion subspace of block 1 (rank 2, both sides) ablated at the initial tokens")
    assert initial.causality.response.block == 1


def test_a_check_that_fails_leaves_the_subspace_in_place(monkeypatch):
    from sd_lens import findings
    from sd_lens.models.check import check

    def not_edited(model):
        checked = check(model)
        rows = [replace(row, passed=False, detail="never run: it") if row.check == "FFN input" else row for row in checked.rows]
        return replace(checked, rows=tuple(rows))

    def no_room(*_, **__):
        raise ValueError("no room")

    monkeypatch.setattr(findings, "check", not_edited)
    monkeypatch.setattr(findings, "propagation", no_room)
    everything = findings.analyse(planted().model, torch.arange(20).reshape(1, 20), progress=False)
    assert (everything.propagation, everything.no_propagation_because) == (None, "no room")
    found = everything.causality
    assert (found.consequences, found.response) == (None, None)
    assert set(found.missing.values()) == {"FFN input: never run: it"}


@pytest.mark.parametrize(
    ("positions", "who"),
    [
        ((5,), "1 high-norm token among 60 tokens"),
        ((5, 9), "2 high-norm tokens (none at position 0) among"),
        ((0, 5, 9), "3 high-norm tokens (1 at position 0, 2 later) among"),
    ],
)
def test_high_norm_tokens_are_counted_by_position(initial, positions, who):
    tokens = tuple(replace(initial.defects.tokens[0], pos=pos) for pos in positions)
    assert who in replace(initial, defects=replace(initial.defects, tokens=tokens)).sentences()[0]


def test_several_blocks(initial):
    defects = replace(initial.defects, explosion_blocks=(1, 4), decay_blocks=())
    what, whence, *_more = replace(initial, defects=defects).sentences()
    assert "an explosion in blocks 1, 4:" in what
    assert "the norm does not fall again before the end." in what
    assert re.search(r"the leading left singular vectors of those blocks' linear maps are \d°, \d° from", whence)


def test_growth_over_many_blocks(initial):
    what, whence, *_more = replace(initial, defects=replace(initial.defects, explosion_blocks=())).sentences()
    assert what.startswith("planted has 3 high-norm tokens (all at position 0) among 60 tokens")
    assert what.endswith("but no block makes their norm in one step.")
    assert whence == "The growth of their norm is spread over several blocks."


def test_a_model_that_cannot_be_linearised(initial):
    _, whence, *_more = replace(initial, directions=None, no_directions_because="a reason").sentences()
    assert whence == "The FFN of block 1 writes 100% of its step; its linear map was not computed (a reason)."


@pytest.mark.parametrize("family", ["olmo2", "mixtral"])
def test_nothing_found_in_models_with_norms_after_the_sublayers_or_experts(family):
    model = zoo.FAMILIES[family].build()
    findings = analyse(model, zoo.tokens(model, 3), progress=False)
    what, whence, *_more = findings.sentences()
    assert re.match(r"No explosion was found in \w+: over 36 tokens of 3 prompts, no token's norm reaches 6 times the median", what)
    assert whence == "There is nothing to attribute."
    assert len(findings.directions.rows) == 9
    assert findings.directions.reference_source.startswith("block ")
    assert findings.no_directions_because == ""
    assert findings.attribution.shares == ()
    assert findings.causality.missing == dict.fromkeys(("consequences", "response"), "no explosion was found")


def test_a_model_that_looks_ahead_is_refused(monkeypatch):
    from sd_lens import findings
    from sd_lens.models.check import Check, CheckRow

    looks_ahead = Check("model", 1e-4, (CheckRow("causality", False, 0.3, 0, "a token changes those before it"),))
    monkeypatch.setattr(findings, "check", lambda model: looks_ahead)
    with pytest.raises(ValueError, match=r"^model: its tokens change those before them"):
        findings.analyse(zoo.cached("llama"), zoo.tokens(zoo.cached("llama")))
