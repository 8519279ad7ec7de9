"""Solvers that see products only, against dense decompositions."""

import math

import numpy as np
import pytest
import torch
import zoo
from dense import angle, block_matrix
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import svds

from sd_lens.linear.linearize import linearize
from sd_lens.linear.maps import LinearMap
from sd_lens.linear.spectra import eigen_nearest, leading_singular
from sd_lens.models.loading import weights_of
from sd_lens.models.planted import planted


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
        assert float(found.s[0]) == pytest.approx(float(s[0]), rel=1e-6)
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


@pytest.mark.parametrize("method", ["krylov", "dense"])
@pytest.mark.parametrize("axis", [9, 5, 0])
def test_a_defective_map(method, axis):
    # A nilpotent shift: its only eigenvector is the first axis, with eigenvalue zero.
    shift = torch.diag(torch.ones(9, dtype=torch.float64), diagonal=1)
    direction = torch.eye(10, dtype=torch.float64)[axis]
    found = eigen_nearest(shift, direction, method=method)
    assert abs(found.value) < 1e-6
    assert found.vector.abs()[0] == pytest.approx(1, abs=1e-6)
    assert found.angle_deg == pytest.approx(90 if axis else 0, abs=1e-4)


@pytest.mark.parametrize(
    ("values", "degrees"), [((100.0, 1.3), (29, 10)), ((-100.0, -2.0), (20, 5)), ((1000.0, 1.1), (29, 5)), ((20.0, -5.0), (28, 5))]
)
def test_a_nearer_eigenvector_is_found_behind_a_louder_one(values, degrees):
    d = 600
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    direction = basis[:, 0]
    planted = [math.cos(math.radians(a)) * direction + math.sin(math.radians(a)) * basis[:, 1 + i] for i, a in enumerate(degrees)]
    vectors = torch.cat([torch.stack(planted, dim=1), basis[:, 2:]], dim=1)
    core = torch.zeros(d, d, dtype=torch.float64)
    core[0, 0], core[1, 1] = values
    core[2:, 2:] = torch.randn(d - 2, d - 2, generator=generator, dtype=torch.float64) / d**0.5
    found = eigen_nearest(vectors @ core @ torch.linalg.inv(vectors), direction)
    assert found.converged
    assert found.value.real == pytest.approx(values[1], rel=1e-3)
    assert found.angle_deg == pytest.approx(degrees[1], abs=0.01)


def test_of_a_pair_the_one_with_positive_imaginary_part():
    turn = torch.tensor([[0.0, -2.0], [2.0, 0.0]], dtype=torch.float64)
    for method in ("krylov", "dense"):
        found = eigen_nearest(turn, torch.tensor([1.0, 0.0]), method=method)
        assert found.value == pytest.approx(2j)
        _assert_eigenpair(turn, found)


def test_a_map_of_nan_is_refused():
    with pytest.raises(ValueError, match="linear_map: got products that are NaN or infinite"):
        leading_singular(torch.full((5, 5), float("nan")))


def test_a_norm_that_is_none_has_no_balance():
    pair = eigen_nearest(torch.eye(3), torch.ones(3))
    for norm in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"norm: got {norm}; allowed: a positive number"):
            pair.balance(norm)


def test_an_exhausted_space():
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


@pytest.mark.parametrize("n_kv_heads", [None, 1])
def test_what_is_planted_is_found_with_a_gate_and_any_number_of_key_value_heads(n_kv_heads):
    # The fixture's gated model has grouped heads: here are as many key-value heads as heads, and one for all.
    test_what_is_planted_is_found(planted("llama", n_kv_heads=n_kv_heads))


def test_a_map_that_is_zero_has_zero_singular_values():
    zero = Dense(torch.zeros(40, 40, dtype=torch.float64))
    u, s, v = leading_singular(zero, 3)
    assert s.tolist() == [0.0] * 3
    torch.testing.assert_close(u.T @ u, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(v.T @ v, torch.eye(3, dtype=torch.float64))


def test_equal_singular_values_are_all_found():
    # Of a space of vectors that are stretched alike one starting vector sees one: the others must be looked for.
    eye = Dense(3 * torch.eye(20, dtype=torch.float64))
    u, s, v = leading_singular(eye, 4)
    assert s.tolist() == pytest.approx([3.0] * 4)
    torch.testing.assert_close(u.T @ u, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(u, v)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_maps_of_low_rank(rank):
    matrix = _random(30, seed=1, columns=rank) @ _random(30, seed=2, columns=rank).T
    linear = Dense(matrix)
    found = leading_singular(linear, 6)
    torch.testing.assert_close(found.s, torch.linalg.svdvals(matrix)[:6], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.u.T @ found.u, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-9)
    assert linear.products < 30


@pytest.mark.parametrize("gap", [1.01, 1.3])
def test_arpack_agrees(gap):
    matrix = _with_singular_values([gap, *np.linspace(1, 0.1, 299)], seed=4)
    found = leading_singular(Dense(matrix), 3)
    _, s, vt = svds(Dense(matrix).as_linear_operator(), k=3, v0=np.ones(300), tol=1e-12)
    assert found.s.tolist() == pytest.approx(np.sort(s)[::-1].tolist(), rel=1e-9)
    assert angle(found.v[:, 0], torch.from_numpy(vt[s.argmax()].copy())) < 1e-5


def test_what_stands_out_takes_few_products_and_a_tolerance_saves_some():
    matrix = _with_singular_values([50.0, *np.linspace(1, 0.1, 499)])
    products = {}
    for tol in (1e-10, 1e-3, (1e-6, 1e-2), (1e-6, 1e-8)):
        linear = Dense(matrix)
        found = leading_singular(linear, 2 if isinstance(tol, tuple) else 1, tol=tol)
        products[tol] = linear.products
        assert float(found.s[0]) == pytest.approx(50, rel=1e-6)
        if isinstance(tol, tuple):
            assert float(found.s[1]) == pytest.approx(1, abs=tol[1])
    assert products[1e-10] <= 16
    assert products[1e-3] < products[1e-10]
    assert products[1e-6, 1e-2] < products[1e-6, 1e-8]


@pytest.mark.parametrize("tol", [0.0, -1.0, (1e-3,), (1e-3, 0.0), (1e-3, 1e-3, 1e-3)])
def test_tolerances_that_are_none_are_refused(tol):
    with pytest.raises(ValueError, match=r"tol: got .*; allowed: a positive number, or 2 of them"):
        leading_singular(Dense(_random(6, seed=0)), 2, tol=tol)


@settings(max_examples=20)
@given(d=st.integers(2, 60), seed=st.integers(0, 9999), mix=st.sampled_from([0.0, 1.0, 3.0]))
def test_the_dense_method_is_a_second_opinion(d, seed, mix):
    matrix = _random(d, seed=seed) / d**0.5
    direction = _random(d, seed=seed + 1, columns=1)[:, 0] / d**0.5 + mix * torch.linalg.eig(matrix)[1][:, seed % d].real
    dense, krylov = (eigen_nearest(Dense(matrix), direction, method=method) for method in ("dense", "krylov"))
    _assert_eigenpair(matrix, dense)
    assert dense.converged
    value, degrees = _nearest_by_eig(matrix, direction)
    assert dense.angle_deg == pytest.approx(degrees, abs=1e-4)
    assert krylov.angle_deg == pytest.approx(degrees, abs=0.01)  # the space was the whole one, or the vector near
    assert complex(dense.value.real, abs(dense.value.imag)) == pytest.approx(value, rel=1e-6, abs=1e-9)


def test_what_did_not_converge_says_so():
    matrix = _random(300, seed=0) / 300**0.5
    direction = _random(300, seed=1, columns=1)[:, 0]
    short = eigen_nearest(Dense(matrix), direction, max_krylov=8)
    assert not short.converged
    assert short.residual > 0.01
    assert eigen_nearest(Dense(matrix), direction, max_krylov=300).converged


def test_a_nearer_eigenvector_that_shows_later_is_waited_for():
    # One eigenvector at 40° with a large eigenvalue comes out first, one at 25° among small ones last.
    d = 120
    basis = torch.linalg.qr(_random(d, seed=8)).Q
    direction, a, b = basis[:, 0], basis[:, 1], basis[:, 2]
    far = math.cos(math.radians(40)) * direction + math.sin(math.radians(40)) * a
    near = math.cos(math.radians(25)) * direction + math.sin(math.radians(25)) * b
    vectors = torch.cat([far.unsqueeze(1), near.unsqueeze(1), basis[:, 1:2] + 0.3 * basis[:, 5:6], basis[:, 3:]], dim=1)
    vectors = vectors / vectors.norm(dim=0)
    values = torch.cat([torch.tensor([9.0, 1.3]), torch.linspace(-1, 1, d - 2)]).double()
    matrix = vectors @ torch.diag(values) @ torch.linalg.inv(vectors)
    found = eigen_nearest(Dense(matrix), direction)
    assert found.angle_deg == pytest.approx(_nearest_by_eig(matrix, direction)[1], abs=0.01)
    assert found.value.real == pytest.approx(1.3, rel=1e-3)


@pytest.mark.usefixtures("as_users_run_it")
def test_options_of_the_eigenpair_that_are_none_are_refused():
    linear = Dense(_random(4, seed=0))
    with pytest.raises(ValueError, match="method: got 'qr'; allowed: 'krylov', 'dense'"):
        eigen_nearest(linear, torch.ones(4), method="qr")
    for options in ({"max_krylov": 0}, {"tol": 0.0}):
        with pytest.raises(ValueError, match="max_krylov, tol: got "):
            eigen_nearest(linear, torch.ones(4), **options)


def test_no_vector_leaves_the_device(monkeypatch):
    # On an accelerator these calls copy to the host; none may be made on a vector of the stream's width.
    d = 200
    direction = torch.nn.functional.normalize(_random(d, seed=1, columns=1)[:, 0], dim=0)
    linear = Dense(_random(d, seed=2) / d**0.5 + 20 * torch.outer(direction, _random(d, seed=3, columns=1)[:, 0] + direction))
    sizes = []
    for name in ("cpu", "numpy", "tolist", "__array__"):
        original = getattr(torch.Tensor, name)

        def watched(self, *args, _original=original, **kwargs):
            sizes.append(self.numel())
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, watched)
    leading_singular(linear)
    eigen_nearest(linear, direction)
    assert sizes, "the small projected matrix is looked at on the host"
    assert max(sizes) < d
