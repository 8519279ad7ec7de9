"""Weights of paths: against the sum over all of them, against Theorem 5.1 on a model it is about, and their limit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from sd_lens.propagation.paths import lazy_walk, path_weights


def causal(n: int, blocks: int, seed: int) -> Tensor:
    """Random lower-triangular row-stochastic matrices, (block, query, key)."""
    weights = torch.rand(blocks, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tril()
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "blocks", "position"), [(4, 3, -1), (3, 4, 1), (5, 2, 0), (1, 3, 0)])
def test_weights_are_sums_over_all_paths(seed, n, blocks, position):
    beta1 = 0.3 + seed
    generator = torch.Generator().manual_seed(100 + seed)
    gains = 1 + torch.rand(blocks, n, generator=generator, dtype=torch.float64)
    attention = causal(n, blocks, seed) / beta1
    found = path_weights(attention, position=position, token_gains=gains)
    end = position % n
    for depth in range(blocks + 1):
        sums = [0.0] * n
        for steps in itertools.product(range(n), repeat=depth):  # where the path is before each block, the last block first
            weight, at = 1.0, end
            for block, before in zip(reversed(range(blocks)), steps, strict=False):
                weight *= float(gains[block, at]) * (float(attention[block, at, before]) + (at == before))
                at = before
            sums[at] += weight
        torch.testing.assert_close(found.weights[depth], torch.tensor(sums, dtype=torch.float64), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found.shares.sum(-1), torch.ones(blocks + 1, dtype=torch.float64))


def test_products_that_overflow_are_kept_as_logarithms():
    blocks, gain = 300, 1e4
    found = path_weights(causal(3, blocks, 0) * gain)
    assert float(found.log10_total[-1]) == pytest.approx(blocks * math.log10(1 + gain))  # rows add up to 1 + gain
    assert bool(torch.isinf(found.weights[-1, 0]))
    assert float(found.shares[-1].sum()) == pytest.approx(1.0)


class PaperModel:
    """The theorem's model: attention that depends on nothing, norms of known scale, FFNs with a known Lipschitz constant."""

    def __init__(self, seed: int, *, n: int = 6, d: int = 5, blocks: int = 3, layer_norm: bool = True, feed: bool = True):
        self.generator = torch.Generator().manual_seed(seed)
        self.alpha = causal(n, blocks, seed)
        self.betas = (0.5, 0.8, 1.5)
        self.layer_norm, self.feed = layer_norm, feed
        self.ffns = [(self.draw(d, 8), self.draw(8, d)) for _ in range(blocks)]
        lipschitz = [float(torch.linalg.matrix_norm(a, ord=2) * torch.linalg.matrix_norm(b, ord=2)) for a, b in self.ffns]
        self.sigma_psi = max(lipschitz) if feed else 0.0
        self.v = self.draw(n, d)

    def draw(self, *shape) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64) / 2

    def norm(self, x: Tensor, beta: float) -> Tensor:
        """Division by at least ``beta``: a LayerNorm whose epsilon is its square, or by exactly that."""
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=beta**2) if self.layer_norm else x / beta

    def __call__(self, v: Tensor) -> Tensor:
        for alpha, (first, second) in zip(self.alpha, self.ffns, strict=True):
            z = alpha @ self.norm(v, self.betas[0]) + v
            v = z + (torch.tanh(self.norm(z, self.betas[1]) @ first) @ second if self.feed else 0.0)
        return self.norm(v, self.betas[2])[-1]

    def jacobian_norms(self) -> Tensor:
        jacobian: Tensor = torch.autograd.functional.jacobian(self, self.v)  # pyright: ignore[reportAssignmentType]
        return torch.linalg.matrix_norm(jacobian.transpose(0, 1), ord=2)

    def bound(self) -> Tensor:
        """Theorem 5.1 with this model's own constants."""
        constant = (self.sigma_psi / self.betas[1] + 1) ** len(self.ffns) / self.betas[2]
        return constant * path_weights(self.alpha / self.betas[0]).weights[-1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("layer_norm", [True, False])
def test_the_theorem_bounds_the_jacobian_of_the_model_it_is_about(seed, layer_norm):
    model = PaperModel(seed, layer_norm=layer_norm)
    assert bool((model.jacobian_norms() <= model.bound()).all())


@pytest.mark.parametrize("seed", range(3))
def test_without_ffns_and_with_linear_norms_the_bound_is_attained(seed):
    model = PaperModel(seed, layer_norm=False, feed=False)
    torch.testing.assert_close(model.jacobian_norms(), model.bound())


@pytest.mark.parametrize("seed", range(5))
def test_a_lazy_walk_tends_to_the_first_column(seed):
    n = 12
    pattern = causal(n, 1, seed)[0]
    half = 0.5 * (pattern + torch.eye(n, dtype=torch.float64))
    by_hand = torch.eye(n, dtype=torch.float64)
    columns = []
    for steps in range(1, 31):
        by_hand = by_hand @ half
        columns.append(by_hand[:, 0].clone())
        if steps in (1, 7, 30):
            torch.testing.assert_close(lazy_walk(pattern, steps), by_hand, rtol=1e-12, atol=1e-300)
    assert all(bool((later >= earlier).all()) for earlier, later in itertools.pairwise(columns))
    limit = lazy_walk(pattern, 2000)
    torch.testing.assert_close(limit[:, 0], torch.ones(n, dtype=torch.float64), rtol=1e-6, atol=0.0)
    assert float(limit[:, 1:].abs().max()) < 1e-6


def test_the_second_largest_eigenvalue_says_how_fast():
    pattern = torch.tensor([[1.0, 0, 0, 0], [0.2, 0.8, 0, 0], [0.3, 0.4, 0.3, 0], [0.1, 0.6, 0.1, 0.2]], dtype=torch.float64)
    rest = [1 - lazy_walk(pattern, steps)[1:, 0] for steps in (60, 61)]
    torch.testing.assert_close(rest[1] / rest[0], torch.full((3,), 0.9, dtype=torch.float64))


def test_no_walk_leaves_where_it_is_in_no_steps():
    torch.testing.assert_close(lazy_walk(causal(4, 1, 0)[0], 0), torch.eye(4, dtype=torch.float64))


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: lazy_walk(causal(3, 1, 0)[0], -1), "steps: got -1; allowed: a whole number from 0"),
        (lambda: lazy_walk(torch.ones(2, 3), 1), r"attention: got shape \(2, 3\); allowed: a square matrix"),
        (
            lambda: lazy_walk(torch.tensor([[1.0, 0.0], [0.5, 0.4]]), 1),
            "attention: got negative entries or rows that do not add up to 1",
        ),
        (
            lambda: lazy_walk(torch.tensor([[1.0, 0.0], [-0.5, 1.5]]), 1),
            "attention: got negative entries or rows that do not add up to 1",
        ),
        (lambda: lazy_walk(torch.full((2, 2), 0.5), 1), "attention: got weight above the diagonal"),
        (lambda: path_weights([]), "attention: got no block; allowed: at least one"),
        (lambda: path_weights([torch.eye(3), torch.eye(2)]), r"attention: got shape \(2, 2\) in block 1"),
        (lambda: path_weights([-torch.eye(3)]), "attention: got negative entries or NaN in block 0"),
        (lambda: path_weights([torch.eye(3)], position=3), "position: got 3; allowed: -3 to 2"),
        (lambda: path_weights([torch.eye(3)], position=-4), "position: got -4; allowed: -3 to 2"),
        (lambda: path_weights([torch.eye(3)], token_gains=torch.ones(2, 3)), r"token_gains: got shape \(2, 3\); allowed: \(1, 3\)"),
    ],
)
def test_bad_input(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()
