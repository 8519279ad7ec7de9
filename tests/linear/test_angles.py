import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sd_lens.linear.angles import acute_angle, mean_pairwise_angle

DEGREES = [0.0, 1e-9, math.degrees(1e-7), 1e-3, 10.0, 45.0, 60.0, 89.999, 90.0]


def _basis(d, seed, complex_=False):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.complex128 if complex_ else torch.float64
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=dtype)).Q


@given(
    degrees=st.sampled_from(DEGREES),
    d=st.integers(2, 50),
    seed=st.integers(0, 999),
    lengths=st.tuples(*[st.sampled_from([-1e8, -1.0, 1e-8, 1.0, 3e4])] * 2),
)
def test_known_angles_whatever_the_sign_and_length(degrees, d, seed, lengths):
    x, across = _basis(d, seed)[:2]
    y = math.cos(math.radians(degrees)) * x + math.sin(math.radians(degrees)) * across
    got = acute_angle(lengths[0] * x, lengths[1] * y)
    assert got.dtype == torch.float64
    # Rounding of the vectors themselves is some 1e-16 radians.
    assert got.item() == pytest.approx(degrees, rel=1e-12, abs=1e-13)
    obtuse = acute_angle(x, across * math.sin(math.radians(degrees)) - math.cos(math.radians(degrees)) * x)
    assert obtuse.item() == pytest.approx(degrees, rel=1e-12, abs=1e-13)


@given(degrees=st.sampled_from(DEGREES), phase=st.floats(0, 7), d=st.integers(2, 20), seed=st.integers(0, 999))
def test_complex_lines(degrees, phase, d, seed):
    x, across = _basis(d, seed, complex_=True)[:2]
    y = math.cos(math.radians(degrees)) * x + math.sin(math.radians(degrees)) * across
    turned = torch.exp(1j * torch.tensor(phase, dtype=torch.float64)) * y
    assert acute_angle(x, turned).item() == pytest.approx(degrees, rel=1e-12, abs=1e-13)
    assert acute_angle(turned, x).item() == pytest.approx(degrees, rel=1e-12, abs=1e-13)


def test_a_real_and_a_complex_vector():
    real, both = torch.tensor([1.0, 0.0]), torch.tensor([1.0 + 0j, 1j])
    assert acute_angle(real, both).item() == pytest.approx(45)
    assert acute_angle(both, 1j * real.to(both.dtype)).item() == pytest.approx(45)


def test_batches_are_broadcast():
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, math.sqrt(3)]])
    assert acute_angle(rows, torch.tensor([3.0, 0.0])).tolist() == pytest.approx([0, 90, 60])
    table = acute_angle(rows.unsqueeze(1), rows.unsqueeze(0))
    assert table.flatten().tolist() == pytest.approx([0, 90, 60, 90, 0, 30, 60, 30, 0], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_widened_before_anything_is_computed(dtype):
    a, b = torch.tensor([1.0, 0.0], dtype=dtype), torch.tensor([1.0, 2.0**-13], dtype=dtype)
    assert acute_angle(a, b).item() == pytest.approx(math.degrees(math.atan(2.0**-13)), rel=1e-12)
    large = torch.tensor([6e4, 6e4], dtype=dtype)
    assert acute_angle(large, a).item() == pytest.approx(45)


@pytest.mark.usefixtures("as_users_run_it")
def test_what_has_no_angle_is_refused():
    good = torch.ones(3)
    with pytest.raises(ValueError, match="b: got width 4; allowed: the width of a, 3"):
        acute_angle(good, torch.ones(4))
    for bad in (torch.zeros(3), torch.tensor([1.0, float("nan"), 0.0]), torch.tensor([1.0, float("inf"), 0.0])):
        with pytest.raises(ValueError, match="a: got a zero or non-finite vector"):
            acute_angle(bad, good)
        with pytest.raises(ValueError, match="b: got a zero or non-finite vector"):
            acute_angle(good, torch.stack([good, bad]))
    with pytest.raises(ValueError, match="vectors: got a zero or non-finite vector"):
        mean_pairwise_angle(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


def _by_hand(a, b):
    cosine = sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
    degrees = math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
    return min(degrees, 180 - degrees)


@given(n=st.integers(2, 8), d=st.integers(2, 6), seed=st.integers(0, 999))
def test_the_mean_over_pairs_is_a_double_loop(n, d, seed):
    vectors = 5 * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    pairs = [_by_hand(a, b) for a, b in itertools.combinations(vectors.tolist(), 2)]
    assert mean_pairwise_angle(vectors) == pytest.approx(sum(pairs) / len(pairs), rel=1e-9)


def test_the_mean_over_no_pair_is_nan():
    assert math.isnan(mean_pairwise_angle(torch.ones(1, 3)))
    assert math.isnan(mean_pairwise_angle(torch.ones(0, 3)))


def test_the_mean_of_nearly_equal_vectors_keeps_its_digits():
    angle = 1e-4  # nothing that float32 could tell from 0
    vectors = torch.tensor([[1.0, 0.0], [1.0, angle], [-1.0, -angle]], dtype=torch.float64)
    assert mean_pairwise_angle(vectors) == pytest.approx(2 / 3 * math.degrees(angle), rel=1e-6)
