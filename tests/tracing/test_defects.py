import itertools

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from streams import norms_alone, ragged, worst

from sd_lens.models.planted import planted
from sd_lens.tracing.defects import find_defects
from sd_lens.tracing.norms import trace_norms
from sd_lens.tracing.trace import NormTrace

TRIGGER = 96


def prompts_with_triggers():
    """Ragged prompts: trigger tokens in the middle, twice in a row, none, and repeated tokens at the beginning."""
    prompts = ragged(TRIGGER, (11, 7, 4, 9), first=0)
    prompts[0][6] = TRIGGER
    prompts[1][3:5] = TRIGGER
    prompts[3][:3] = TRIGGER
    return prompts


def exploding(truth, prompts):
    """Where a planted model's tokens explode: every trigger token, or every token that sees only tokens like itself."""
    return [
        (prompt, place)
        for prompt, ids in enumerate(prompts)
        for place in range(len(ids))
        if (ids[place] == TRIGGER if truth.pathway == "embedding" else (ids[: place + 1] == ids[0]).all())
    ]


def assert_found(defects, truth, prompts):
    trace, wanted = defects.trace, exploding(truth, prompts)
    assert defects.found
    assert (defects.explosion_blocks, defects.decay_blocks) == ((truth.explosion_block,), (truth.decay_block,))
    assert [(token.prompt, token.pos) for token in defects.tokens] == wanted
    plateau = range(truth.explosion_block, truth.decay_block)
    truths = torch.zeros(len(prompts), 11, dtype=torch.bool)
    truths[tuple(zip(*wanted, strict=True))] = True
    assert torch.equal(defects.mask(), truths)
    for block in range(trace.n_blocks):
        mask = defects.mask(block)
        if block in plateau:
            assert torch.equal(mask, truths)
        elif block < plateau.start:
            assert not mask.any()
        else:  # rounding may leave a rest of what was cancelled
            assert not (mask & ~truths).any()
    for token in defects.tokens:
        assert token.peak_block in plateau
        assert token.id == int(prompts[token.prompt][token.pos])
        assert token.norm == float(trace.of_prompt(token.prompt)[token.peak_block + 1, token.pos])
        assert token.norm == pytest.approx(truth.norm, rel=0.02)
        assert token.ratio == pytest.approx(token.norm / float(trace.reference[token.peak_block + 1]), rel=1e-6)
    listed = f"explosion in block {truth.explosion_block}, decay in block {truth.decay_block})"
    assert repr(defects) == f"Defects(planted: {len(wanted)} high-norm tokens, {listed}"
    frame = defects.to_dataframe()
    assert frame[["prompt", "pos"]].to_numpy().tolist() == [list(pair) for pair in wanted]
    assert frame.norm.tolist() == [token.norm for token in defects.tokens]


@pytest.mark.parametrize("direction_prompts", [32, 0])
def test_the_planted_blocks_and_tokens_are_found(planted_model, direction_prompts):
    prompts = prompts_with_triggers()
    trace = trace_norms(planted_model.model, prompts, direction_prompts=direction_prompts)
    defects = find_defects(trace)
    assert_found(defects, planted_model, prompts)
    assert (defects.direction is None) == (direction_prompts == 0)
    upto = planted_model.decay_block + 1  # the decay leaves rounding behind
    assert worst(trace.norms[:upto], norms_alone(planted_model.model, prompts)[:upto]) < 1e-4


WHERE = [("llama", 0, 5), ("gpt2", 0, 1), ("llama", 4, 5), ("gpt_neox", 3, 4), ("gpt_neox", 1, 2)]


@pytest.mark.parametrize("pathway", ["head", "embedding"])
@pytest.mark.parametrize(("architecture", "explosion_block", "decay_block"), WHERE)
def test_wherever_they_are_planted(architecture, pathway, explosion_block, decay_block):
    truth = planted(architecture, pathway=pathway, explosion_block=explosion_block, decay_block=decay_block, seed=1)
    prompts = prompts_with_triggers()
    for direction_prompts in (32, 0):
        trace = trace_norms(truth.model, prompts, batch_tokens=16, direction_prompts=direction_prompts)
        assert_found(find_defects(trace), truth, prompts)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_untrained_models_have_none(family):
    trace = trace_norms(zoo.cached(family), ragged(zoo.VOCAB, (24, 5, 24)))
    defects = find_defects(trace)
    assert not defects.found
    assert (defects.explosion_blocks, defects.decay_blocks, defects.tokens) == ((), (), ())
    assert not defects.mask().any()
    assert defects.mask().shape == (3, 24)
    assert defects.direction is None
    assert defects.to_dataframe().empty
    largest = float((trace.norms / trace.reference.unsqueeze(1))[1:].max())
    assert repr(defects) == f"Defects({trace.model_name}: no high-norm token, largest ratio {largest:.1f})"
    assert largest < 2.5


def made_up(initial, later=None, *, others=1.0, length=8):
    """The trace of two prompts: their first tokens have the norms ``initial``, one other ``later``, all the rest ``others``."""
    norms = torch.full((len(initial), 2 * length), others)
    norms[:, 0] = norms[:, length] = torch.tensor(initial, dtype=torch.float32)
    if later is not None:
        norms[:, 3] = torch.tensor(later, dtype=torch.float32)
    places = torch.arange(2 * length)
    return NormTrace(
        norms=norms,
        tokens=places,
        prompt=places // length,
        position=places % length,
        texts=tuple("abcdefgh" * 2),
        model_name="made up",
        d_model=8,
        n_blocks=len(initial) - 1,
    )


# Norm of the first tokens after the embedding and after each block; the others' is 1.
SHAPES = {
    "one block up, one down": ([1, 1, 100, 100, 100, 1], (1,), (4,)),
    "two blocks up": ([1, 50, 100, 100, 1], (0, 1), (3,)),
    "two blocks down": ([1, 100, 100, 50, 1], (0,), (2, 3)),
    "a rise over five blocks": ([1, 20, 40, 60, 80, 100, 1], (), (5,)),
    "a fall over five blocks": ([1, 100, 80, 60, 40, 20, 1], (0,), ()),
    "no decay": ([1, 1, 100, 100, 100], (1,), ()),
    "a late explosion in two steps of 40 and 60": ([1, 1, 1, 40, 100], (2, 3), ()),
    "two explosions, the second higher": ([1, 60, 20, 100, 1], (0, 2), (1, 3)),
    "two explosions, the first higher": ([1, 100, 30, 80, 1], (0, 2), (1, 3)),
    "the last block explodes": ([1, 1, 1, 100], (2,), ()),
    "a plateau below the threshold": ([1, 1, 4.9, 4.9, 1], None, None),
    "high after the embedding only": ([100, 1, 1, 1, 1], None, None),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_made_up_norms(shape):
    norms, explosion, decay = SHAPES[shape]
    defects = find_defects(made_up(norms))
    assert (defects.explosion_blocks, defects.decay_blocks) == (explosion or (), decay or ())
    assert defects.found == bool(explosion)
    assert [(token.prompt, token.pos) for token in defects.tokens] == ([] if explosion is None else [(0, 0), (1, 0)])
    if explosion == ():
        assert repr(defects) == "Defects(made up: 2 high-norm tokens, but no block that makes them)"
    elif decay == ():
        assert repr(defects).endswith(", decay in no block)")
    for token in defects.tokens:
        assert (token.norm, token.ratio) == (100, 100)


def test_groups_that_explode_in_different_blocks_are_followed_apart():
    defects = find_defects(made_up([1, 1000, 1000, 1000, 1], [1, 1, 30, 1, 1]))
    assert (defects.explosion_blocks, defects.decay_blocks) == ((0, 1), (2, 3))
    assert [(token.prompt, token.pos, token.peak_block) for token in defects.tokens] == [(0, 0, 0), (0, 3, 1), (1, 0, 0)]
    assert set(defects.profiles) == {"initial", "later"}
    assert defects.profiles["later"] == pytest.approx([0, 0, (30**2 - 1) ** 0.5, 0, 0])
    assert [defects.mask(block).nonzero().tolist() for block in range(4)] == [
        [[0, 0], [1, 0]],
        [[0, 0], [0, 3], [1, 0]],
        [[0, 0], [1, 0]],
        [],
    ]


def test_thresholds_are_shares_of_the_peak():
    trace = made_up([1, 30, 100, 70, 1])
    for min_jump, explosion in ((0.25, (0, 1)), (0.35, (1,)), (0.75, ())):
        assert find_defects(trace, min_jump=min_jump).explosion_blocks == explosion
    for min_fall, decay in ((0.25, (2, 3)), (0.35, (3,)), (0.75, ())):
        assert find_defects(trace, min_fall=min_fall).decay_blocks == decay
    assert find_defects(trace, min_ratio=99.0).tokens
    assert not find_defects(trace, min_ratio=101.0).tokens


@given(
    heights=st.lists(st.floats(1, 1e4), min_size=2, max_size=7),
    scale=st.sampled_from([1e-3, 1.0, 1e6]),
)
def test_blocks_are_those_of_large_steps_whatever_the_scale(heights, scale):
    defects = find_defects(made_up([1.0, *heights]))
    scaled = find_defects(made_up([scale, *(scale * height for height in heights)], others=scale))
    assert scaled.tokens == () or len(scaled.tokens) in (0, 2)
    peak = max(range(len(heights)), key=heights.__getitem__)
    for one in (defects, scaled):
        assert set(one.explosion_blocks).isdisjoint(one.decay_blocks)
        for profile in one.profiles.values():
            assert all(value == value for value in profile)
    # Excess over the others in one step, by the definition; steps at the threshold's very edge may go either way.
    excess = [0.0, *((height**2 - 1) ** 0.5 for height in heights)]
    shares = [(b - a) / max(excess) if max(excess) else 0.0 for a, b in itertools.pairwise(excess)]
    if defects.tokens and all(abs(abs(share) - 0.25) > 1e-3 for share in shares):
        rises = tuple(b for b, share in enumerate(shares) if share > 0.25)
        assert defects.explosion_blocks == rises
        first = rises[0] if rises else peak
        assert defects.decay_blocks == tuple(b for b, share in enumerate(shares) if share < -0.25 and b > first)
        assert (scaled.explosion_blocks, scaled.decay_blocks) == (defects.explosion_blocks, defects.decay_blocks)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"min_jump": 0.0}, r"min_jump: got 0\.0; allowed: above 0, up to 1"),
        ({"min_jump": 1.01}, r"min_jump: got 1\.01; allowed: above 0, up to 1"),
        ({"min_fall": 0.0}, r"min_fall: got 0\.0; allowed: above 0, up to 1"),
        ({"min_fall": float("nan")}, "min_fall: got nan; allowed: above 0, up to 1"),
        ({"min_ratio": 1.0}, r"min_ratio: got 1\.0; allowed: above 1"),
    ],
    ids=str,
)
def test_thresholds_out_of_range_are_refused(options, reason):
    with pytest.raises(ValueError, match=f"^{reason}"):
        find_defects(made_up([1, 100, 1]), **options)


def test_blocks_that_were_not_traced_have_no_mask():
    defects = find_defects(made_up([1, 100, 100, 1]))
    for block in (-1, 3):
        with pytest.raises(ValueError, match=f"^block: got {block}; allowed: 0 to 2, the blocks traced"):
            defects.mask(block)


def test_a_direction_for_another_threshold_does_not_decide(planted_model):
    """Profiles measured for one threshold are not used for another: tokens it does not know would be missing from them."""
    trace = trace_norms(planted_model.model, ragged(96, (20, 20)), min_ratio=1e9)
    assert trace.direction is None
    other = trace_norms(planted_model.model, ragged(96, (20, 20)), min_ratio=50.0)
    found = find_defects(other, min_ratio=6.0)
    assert found.explosion_blocks == ((planted_model.explosion_block,) if found.tokens else ())


def test_a_group_that_goes_the_opposite_way_is_followed():
    """Tokens whose residual vectors point against the direction explode as much as those that point along it."""
    from sd_lens.tracing.defects import _steps

    up, down = _steps(torch.tensor([0.0, 0.0, -10.0, -10.0, -1.0], dtype=torch.float64), 0.25, 0.25)
    assert (up, down) == ([1], [3])


def test_rare_tokens_that_explode_elsewhere_are_not_outvoted():
    """Two delimiters that explode in block 1 among ten that do in block 3: both blocks are explosion blocks."""
    n = 40
    norms = torch.ones(6, n)
    norms[2:, 5:7] = 100.0
    norms[4:, 10:20] = 100.0
    trace = NormTrace(
        norms=norms,
        tokens=torch.zeros(n, dtype=torch.long),
        prompt=torch.zeros(n, dtype=torch.long),
        position=torch.arange(n),
        texts=("x",) * n,
        model_name="made up",
        d_model=8,
        n_blocks=5,
    )
    assert find_defects(trace).explosion_blocks == (1, 3)
