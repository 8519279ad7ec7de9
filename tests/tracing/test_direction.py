import math

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from streams import ragged, streams_alone

from sd_lens.tracing.defects import defect_direction
from sd_lens.tracing.direction import DirectionAccumulator
from sd_lens.tracing.norms import measure_direction, trace_norms


def pairwise_angle(vectors):
    """Mean acute angle over all pairs, degrees."""
    unit = vectors.double() / vectors.double().norm(dim=-1, keepdim=True)
    cosines = (unit @ unit.T).abs().clamp(max=1)[tuple(np.triu_indices(len(unit), 1))]
    return float(torch.rad2deg(torch.arccos(cosines)).mean())


def by_hand(streams, min_ratio=6.0):
    """The direction and all that is said of it, from kept streams: one (point, pos, d_model) per prompt."""
    flat = torch.cat(streams, dim=1)
    norms = flat.norm(dim=-1)
    later = torch.cat([torch.arange(stream.shape[1]) > 0 for stream in streams])
    others = norms[:, later].sort(dim=1).values
    high = norms >= min_ratio * others[:, (others.shape[1] - 1) // 2].unsqueeze(1)
    high[0] = False
    direction = flat[high].mean(0) / flat[high].mean(0).norm()
    chosen = high.any(0)
    groups = {"initial": chosen & ~later, "later": chosen & later}
    profiles = {group: (flat[:, who] @ direction).mean(1) for group, who in groups.items() if who.any()}
    return direction, flat[high], int(chosen.sum()), profiles


def assert_same(measured, truth, *, angle=True):
    direction, vectors, n_tokens, profiles = truth
    assert measured.direction.dtype == torch.float32
    assert float(measured.direction.norm()) == pytest.approx(1, abs=1e-6)
    assert float((measured.direction.double() - direction).norm()) < 1e-5
    assert (measured.n_vectors, measured.n_tokens) == (len(vectors), n_tokens)
    if angle:
        assert measured.mean_pairwise_angle_deg == pytest.approx(pairwise_angle(vectors), abs=2e-3)
    assert measured.profiles.keys() == profiles.keys()
    for group, profile in profiles.items():
        # Where the decay cancels the peak, the peak's rounding is left.
        assert measured.profiles[group] == pytest.approx(profile.tolist(), rel=1e-4, abs=1e-5 * float(profile.abs().max()))


def prompts_of(lengths=(9, 1, 14, 6), seed=0):
    """Ragged prompts with tokens that explode at the beginning, later, and by repetition."""
    prompts = ragged(96, lengths, first=0, seed=seed)
    prompts[0][3] = prompts[2][5:7] = 96
    prompts[3][:2] = prompts[3][0]
    return prompts


def test_it_is_the_mean_of_all_high_norm_vectors(planted_model):
    prompts = prompts_of()
    truth = by_hand(streams_alone(planted_model.model, prompts))
    for batch_tokens in (4096, 15, 1):
        trace = trace_norms(planted_model.model, prompts, batch_tokens=batch_tokens)
        assert_same(trace.direction, truth)
        assert_same(defect_direction(planted_model.model, prompts, batch_tokens=batch_tokens), truth)


def test_it_is_the_planted_one(planted_model):
    measured = defect_direction(planted_model.model, prompts_of())
    cosine = abs(float(measured.direction.double() @ planted_model.direction.double()))
    assert math.degrees(math.acos(min(1.0, cosine))) < 0.2
    # The vectors' own contents, next to a large common part, and the repeated tokens agree too.
    assert measured.mean_pairwise_angle_deg < 0.5
    explosion, decay = planted_model.explosion_block, planted_model.decay_block
    for profile in measured.profiles.values():
        plateau = profile[explosion + 1 : decay + 1]
        assert plateau == pytest.approx([planted_model.norm] * len(plateau), rel=0.02)
        assert max(map(abs, profile[: explosion + 1] + profile[decay + 1 :])) < 0.02 * planted_model.norm
    expected = {"head": {"initial", "later"}, "embedding": {"later"}}[planted_model.pathway]  # one repeats its first token
    assert set(measured.profiles) == expected


def test_the_order_of_the_prompts_does_not_matter(planted_model):
    prompts = prompts_of()
    one, other = (defect_direction(planted_model.model, order) for order in (prompts, prompts[::-1]))
    assert float((one.direction - other.direction).abs().max()) < 1e-6
    assert (one.n_vectors, one.n_tokens) == (other.n_vectors, other.n_tokens)
    assert one.mean_pairwise_angle_deg == pytest.approx(other.mean_pairwise_angle_deg, abs=2e-3)
    for group, profile in one.profiles.items():
        assert profile == pytest.approx(other.profiles[group], rel=1e-5, abs=1e-3)


def test_the_first_prompts_with_a_high_norm_token_are_used(planted_model):
    model = planted_model.model
    prompts = [torch.arange(5), *prompts_of(seed=1)]
    streams = streams_alone(model, prompts)
    # What is high is decided over all prompts; prompt 0 has no trigger token.
    first = {"head": [0, 1], "embedding": [1, 3]}[planted_model.pathway]
    trace = trace_norms(model, prompts, direction_prompts=2)
    direction = by_hand([streams[number] for number in first])[0]
    assert float((trace.direction.direction.double() - direction).norm()) < 1e-5
    assert trace_norms(model, prompts, direction_prompts=0).direction is None
    everything = measure_direction(model, trace)
    assert_same(everything, by_hand(streams))


def test_a_trace_that_was_stopped_early_has_the_direction_of_its_blocks(planted_model):
    prompts = prompts_of()
    trace = trace_norms(planted_model.model, prompts, stop_at=3)
    assert_same(trace.direction, by_hand([stream[:4] for stream in streams_alone(planted_model.model, prompts)]))
    assert all(len(profile) == 4 for profile in trace.direction.profiles.values())


def test_a_model_without_high_norm_tokens_has_none():
    model, prompts = zoo.cached("llama"), ragged(zoo.VOCAB, (5, 8))
    trace = trace_norms(model, prompts)
    assert trace.direction is None
    assert measure_direction(model, trace) is None
    with pytest.raises(ValueError, match=r"^prompts: no token's norm reaches 6 times .*\(largest ratio 1\.\d\); allowed: "):
        defect_direction(model, prompts)
    # A threshold low enough finds some, which then agree with nothing but the definition.
    assert_same(measure_direction(model, trace, min_ratio=1.2), by_hand(streams_alone(model, prompts), 1.2))
    with pytest.raises(ValueError, match=r"^min_ratio: got 1\.0; allowed: above 1"):
        defect_direction(model, prompts, min_ratio=1.0)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6)),
    split=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    share=st.sampled_from([0.1, 0.5, 1.0]),
)
def test_sums_over_any_batches_are_those_over_all_vectors(shape, split, seed, share):
    generator = torch.Generator().manual_seed(seed)
    streams = torch.randn(3, *shape, 5, generator=generator) + 1.0
    high = torch.rand(3, *shape, generator=generator) < share
    accumulator = DirectionAccumulator(3, 5, min_ratio=6.0)
    for rows in torch.arange(shape[0]).split(split):
        for point in range(3):
            accumulator.add(point, streams[point, rows], high[point, rows], high[:, rows].any(0))
    result = accumulator.result()
    if not high.any():
        assert result is None
        return
    total = streams[high].double().sum(0)
    direction = total / total.norm()
    assert float((result.direction - direction).norm()) < 1e-6
    assert (result.n_vectors, result.n_tokens) == (int(high.sum()), int(high.any(0).sum()))
    if result.n_vectors == 1:
        assert math.isnan(result.mean_pairwise_angle_deg)
    else:
        assert result.mean_pairwise_angle_deg == pytest.approx(pairwise_angle(streams[high]), abs=1e-2)
    columns = {"initial": slice(0, 1), "later": slice(1, None)}
    wanted = {group: high.any(0)[:, where] for group, where in columns.items()}
    assert set(result.profiles) == {group for group, who in wanted.items() if who.any()}
    for group, profile in result.profiles.items():
        means = [float((stream[:, columns[group]][wanted[group]].double() @ direction).mean()) for stream in streams]
        assert profile == pytest.approx(means, abs=1e-6)


def fed(vectors, **options):
    """The direction of these vectors, taken in 100 at a time."""
    accumulator = DirectionAccumulator(1, vectors.shape[1], min_ratio=6.0, **options)
    for some in vectors.split(100):
        every = torch.ones(1, len(some), dtype=torch.bool)
        accumulator.add(0, some.unsqueeze(0), every, every)
    return accumulator.result()


def test_beyond_512_vectors_the_angle_is_that_of_a_uniform_sample():
    generator = torch.Generator().manual_seed(0)
    # The first third agree, the rest do not: a sample of the first or the last ones would be far off.
    agreeing = torch.ones(900, 16) + 0.01 * torch.randn(900, 16, generator=generator)
    scattered = torch.ones(1800, 16) + 3.0 * torch.randn(1800, 16, generator=generator)
    vectors = torch.cat([agreeing, scattered])
    truth = pairwise_angle(vectors)
    estimates = [fed(vectors, seed=seed).mean_pairwise_angle_deg for seed in range(8)]
    # Measured: the estimates scatter by about 1 degree around 56.
    assert max(abs(estimate - truth) for estimate in estimates) < 4.0
    assert abs(float(np.mean(estimates)) - truth) < 1.5
    assert len(set(estimates)) == 8
    assert fed(vectors, seed=3).mean_pairwise_angle_deg == estimates[3]
    assert fed(vectors).n_vectors == 2700
    assert fed(vectors[:512]).mean_pairwise_angle_deg == pytest.approx(pairwise_angle(vectors[:512]), abs=2e-3)


def test_vectors_that_cancel_have_no_direction():
    assert fed(torch.tensor([[1.0, 2.0], [-1.0, -2.0]])) is None


def test_half_precision_vectors_are_added_up_exactly():
    vectors = torch.full((3000, 4), 60000.0, dtype=torch.float16)
    vectors[:, 1] = 30000.0
    wanted = torch.tensor([2.0, 1.0, 2.0, 2.0]) / 13**0.5
    assert float((fed(vectors).direction - wanted).abs().max()) < 1e-6
