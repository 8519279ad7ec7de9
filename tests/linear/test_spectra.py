"""Solvers that see products only, against dense decompositions."""

import math

import numpy as np
import pytest
import torch
import zoo
from dense import angle, block_matrix
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_lens.linear.maps import LinearMap, linearize
from sd_lens.linear.spectra import eigen_nearest, leading_singular
from sd_lens.models.loading import weights_of


class Dense(LinearMap):
    """A matrix as a map."""

    def __init__(self, matrix):
        self.matrix = matrix
        self.products = 0

    like = property(lambda self: self.matrix)
    d_model = property(lambda self: self.matrix.shape[0])

    def mv(self, x):
        self.products += 1
        return x @ self.matrix.T

    def rmv(self, y):
        self.products += 1
        return y @ self.matrix


def _random(d, *, seed, columns=None):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(d, columns or d, generator=generator, dtype=torch.float64)


def _with_singular_values(values, seed=0):
    d = len(values)
    u, v = (torch.linalg.qr(_random(d, seed=seed + i)).Q for i in (1000, 2000))
    return u @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ v.T


def _assert_leading(matrix, k, found):
    u, s, vh = torch.linalg.svd(matrix)
    torch.testing.assert_close(found.s, s[:k], rtol=1e-6, atol=0)
    for i in range(k):
        assert angle(found.u[:, i], u[:, i]) < 1e-4
        assert angle(found.v[:, i], vh[i]) < 1e-4
    # The pairs belong together, sign included, and the sign is fixed.
    torch.testing.assert_close(matrix @ found.v, found.u * found.s, rtol=1e-6, atol=1e-6 * float(s[0]))
    torch.testing.assert_close(found.u.norm(dim=0), torch.ones(k, dtype=torch.float64))
    assert (found.u.gather(0, found.u.abs().argmax(0, keepdim=True)) > 0).all()


@settings(max_examples=15)
@given(d=st.integers(2, 80), k=st.integers(1, 5), seed=st.integers(0, 999))
def test_leading_triplets_of_random_matrices(d, k, seed):
    k = min(k, d)
    matrix = _random(d, seed=seed)
    _assert_leading(matrix, k, leading_singular(Dense(matrix), k))


@pytest.mark.parametrize("d", [20, 200])
@pytest.mark.parametrize("gap", [1.01, 1.1, 100.0])
def test_a_weak_gap_is_resolved(d, gap):
    matrix = _with_singular_values([gap, *np.linspace(1, 0.1, d - 1)])
    linear = Dense(matrix)
    _assert_leading(matrix, 1, leading_singular(linear))
    assert linear.products < 1000


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_the_same_seed_gives_the_same_bits(seed):
    linear = Dense(_random(60, seed=3))
    first, second = (leading_singular(linear, 3, seed=seed) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    # Another starting vector ends in the same place, sign included.
    for a, b in zip(first, leading_singular(linear, 3, seed=99), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_how_many_triplets_there_can_be():
    matrix = _random(6, seed=0)
    for k in (4, 5, 6):
        _assert_leading(matrix, k, leading_singular(Dense(matrix), k))
    for k in (0, 7, -1):
        with pytest.raises(ValueError, match=f"k: got {k}; allowed: 1 to d_model = 6"):
            leading_singular(Dense(matrix), k)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox_parallel"])
def test_float32_maps_of_models(name):
    # float32 products limit what can be reached; the solver must still stop.
    for block in weights_of(zoo.cached(name)):
        found = leading_singular(linearize(block))
        u, s, _ = torch.linalg.svd(block_matrix(block))
        assert float(found.s[0]) == pytest.approx(float(s[0]), rel=1e-5)
        assert angle(found.u[:, 0], u[:, 0]) < 0.05
        assert found.s.dtype == torch.float64


def _nearest_by_eig(matrix, direction):
    """Eigenvalue with a non-negative imaginary part, and angle, of the eigenvector's line nearest the direction."""
    values, vectors = torch.linalg.eig(matrix)
    cosines = (direction.to(vectors) @ vectors).abs() / direction.norm()
    best = int(cosines.argmax())
    value = complex(values[best])
    return complex(value.real, abs(value.imag)), math.degrees(math.acos(min(1.0, float(cosines[best]))))


def _assert_eigenpair(matrix, found):
    vector = found.vector
    assert float(vector.norm()) == pytest.approx(1)
    residual = torch.linalg.vector_norm(matrix.to(vector) @ vector - found.value * vector)
    assert found.residual == pytest.approx(float(residual), rel=1e-3, abs=1e-12)
    assert found.residual < 1e-4 * float(torch.linalg.eigvals(matrix).abs().max())


@settings(max_examples=25)
@given(d=st.integers(20, 200), seed=st.integers(0, 9999), mix=st.sampled_from([0.0, 1.0, 1.0, 3.0]))
def test_the_eigenvector_nearest_a_direction(d, seed, mix):
    matrix = _random(d, seed=seed) / d**0.5
    _, vectors = torch.linalg.eig(matrix)
    # From any direction whatever (mix 0) to one that is mostly an eigenvector's.
    direction = _random(d, seed=seed + 1, columns=1)[:, 0] / d**0.5 + mix * vectors[:, seed % d].real
    found = eigen_nearest(Dense(matrix), direction)
    value, degrees = _nearest_by_eig(matrix, direction)
    _assert_eigenpair(matrix, found)
    assert found.angle_deg > degrees - 0.01
    # Where every eigenvector is nearly orthogonal to the direction, any of those is as good an answer.
    if degrees < 70:
        assert found.angle_deg == pytest.approx(degrees, abs=0.01)
        assert complex(found.value.real, abs(found.value.imag)) == pytest.approx(value, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("eigenvalue", [-30.0, -3.0, 5.0])
@pytest.mark.parametrize("offset", [0.0, 0.2])
def test_a_planted_eigenvector(eigenvalue, offset):
    d = 300
    direction = torch.nn.functional.normalize(_random(d, seed=1, columns=1)[:, 0], dim=0)
    noise = _random(d, seed=2) / d**0.5
    matrix = noise + eigenvalue * torch.outer(direction, direction)
    asked = direction + offset * torch.nn.functional.normalize(_random(d, seed=3, columns=1)[:, 0], dim=0)
    linear = Dense(matrix)
    found = eigen_nearest(linear, asked)
    value, degrees = _nearest_by_eig(matrix, asked)
    _assert_eigenpair(matrix, found)
    assert value == pytest.approx(eigenvalue, rel=0.1)
    assert found.value == pytest.approx(value, rel=1e-4)
    assert found.angle_deg == pytest.approx(degrees, abs=0.01)
    assert (found.vector @ asked.to(found.vector)).real > 0
    # An eigenvalue that stands out is found long before the Krylov space is the whole space.
    assert abs(eigenvalue) < 5 or linear.products < d / 2


@pytest.mark.parametrize("turn", [0.3, 1.5])
def test_a_complex_pair(turn):
    # A rotation in one plane, scaled, among small real eigenvalues: no real vector of the plane is an eigenvector.
    basis = torch.linalg.qr(_random(40, seed=5)).Q
    core = torch.diag(torch.linspace(-0.5, 0.5, 40, dtype=torch.float64))
    core[:2, :2] = 4 * torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    matrix = basis @ core @ basis.T
    found = eigen_nearest(Dense(matrix), basis[:, 0])
    assert complex(found.value.real, abs(found.value.imag)) == pytest.approx(4 * complex(math.cos(turn), math.sin(turn)))
    assert found.angle_deg == pytest.approx(45)  # from a real vector of the plane to (1, ±i) / sqrt(2)
    _assert_eigenpair(matrix, found)


def test_a_defective_and_an_exhausted_space():
    # The direction is an eigenvector: one product is enough.
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64))
    found = eigen_nearest(Dense(matrix), torch.tensor([0.0, -7.0, 0.0, 0.0]))
    assert (found.value, found.angle_deg) == (pytest.approx(2), pytest.approx(0, abs=1e-10))
    assert found.residual < 1e-12
    zero = eigen_nearest(Dense(torch.zeros(5, 5, dtype=torch.float64)), torch.ones(5))
    assert (zero.value, zero.residual) == (0, 0)


def test_what_is_no_direction_is_refused():
    linear = Dense(_random(4, seed=0))
    for wrong in (torch.ones(5), torch.ones(3)):
        with pytest.raises(ValueError, match=rf"direction: got shape \({len(wrong)},\); allowed: \(4,\), the map's width"):
            eigen_nearest(linear, wrong)
    for wrong in (torch.zeros(4), torch.tensor([1.0, float("nan"), 0.0, 0.0])):
        with pytest.raises(ValueError, match="direction: got a zero or non-finite vector; allowed: "):
            eigen_nearest(linear, wrong)


def test_balance_is_minus_one_where_the_block_cancels_the_vector():
    matrix = torch.diag(torch.tensor([-2.0, 0.1, 0.2, 0.3], dtype=torch.float64))
    found = eigen_nearest(Dense(matrix), torch.tensor([1.0, 0.1, 0.0, 0.0]))
    assert found.balance(norm=4.0) == pytest.approx(-1)  # the map's input has norm 2
    assert found.balance(norm=40.0) == pytest.approx(-0.1)


def test_what_is_planted_is_found(planted_model):
    weights = weights_of(planted_model.model)
    explosion, decay = (linearize(weights[i]) for i in (planted_model.explosion_block, planted_model.decay_block))
    assert angle(leading_singular(explosion.block).u[:, 0], planted_model.direction) < 2
    ffn = leading_singular(explosion.ffn)
    assert angle(ffn.v[:, 0], planted_model.trigger) < 2
    assert float(ffn.s[0]) == pytest.approx(planted_model.sigma, rel=0.01)
    eigen = eigen_nearest(decay.update, planted_model.direction)
    assert eigen.value == pytest.approx(planted_model.eigenvalue, rel=0.01)
    assert eigen.angle_deg < 2
    assert eigen.residual < 1e-3 * abs(eigen.value)
    # The truth's own norm is defined by what this eigenvalue cancels where the neuron is far from its threshold.
    assert eigen.balance(planted_model.norm) < 0


def test_a_map_that_is_zero_has_zero_singular_values():
    zero = Dense(torch.zeros(40, 40, dtype=torch.float64))
    u, s, v = leading_singular(zero, 3)
    assert s.tolist() == [0.0] * 3
    assert torch.equal(u.T @ u, torch.eye(3, dtype=torch.float64))
    assert torch.equal(v.T @ v, torch.eye(3, dtype=torch.float64))
