"""The largest singular values of many Jacobians against dense decompositions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sd_lens.propagation.spectral_norms import jacobian_norms

TOKENS = 4


def drawn(*shape, seed=0, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(function, x: Tensor) -> Tensor:
    """Spectral norm of each token's Jacobian, written out."""
    jacobians = [torch.autograd.functional.jacobian(function, token) for token in x.detach().flatten(0, -2)]
    return torch.stack([torch.linalg.svdvals(jacobian)[0] for jacobian in jacobians]).reshape(x.shape[:-1])  # pyright: ignore


def network(d: int, out: int):
    first, second = drawn(d, 50, seed=1) / math.sqrt(d), drawn(50, out, seed=2) / 7
    return lambda x: torch.nn.functional.silu(torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-3) @ first) @ second


@pytest.mark.parametrize(("d", "out"), [(24, 24), (24, 9), (150, 70)])
def test_norms_are_those_of_the_dense_jacobians(d, out):
    """In as many steps as there are dimensions, and long before: 150 are more than the steps."""
    function = network(d, out)
    x = (drawn(2, TOKENS, d) * torch.tensor([0.1, 1.0, 30.0, 500.0]).unsqueeze(-1)).requires_grad_()
    norms = jacobian_norms(function(x), x)
    wanted = dense(function, x)
    torch.testing.assert_close(norms, wanted, rtol=2e-5, atol=0.0)
    assert bool((norms >= wanted * (1 - 1e-12)).all())


def test_tokens_whose_jacobians_are_zero_of_low_rank_or_without_a_gap():
    d = 40
    orthogonal = torch.linalg.qr(drawn(d, d, seed=3)).Q
    maps = torch.stack([torch.zeros(d, d, dtype=torch.float64), torch.outer(drawn(d, seed=4), drawn(d, seed=5)), 3 * orthogonal])
    x = drawn(3, d, seed=6).requires_grad_()
    y = torch.einsum("tij,tj->ti", maps, x)
    torch.testing.assert_close(jacobian_norms(y, x), torch.linalg.matrix_norm(maps, ord=2), rtol=1e-5, atol=1e-12)


def test_the_last_steps_residual_is_added_where_the_iteration_has_not_converged():
    """With two steps the Ritz value is well below the norm; what is given back is said to be the upper end of an interval."""
    d = 100
    matrix = torch.diag(torch.linspace(1.0, 2.0, d, dtype=torch.float64))
    x = drawn(1, d).requires_grad_()
    short = float(jacobian_norms(x @ matrix, x, max_steps=2))
    start = drawn(1, d)
    start = start / start.norm()
    krylov = torch.linalg.qr(torch.cat([start, start @ matrix @ matrix]).T).Q
    ritz = torch.linalg.eigh(krylov.T @ matrix @ matrix @ krylov)
    vector = krylov @ ritz.eigenvectors[:, -1]
    residual = (matrix @ matrix @ vector - ritz.eigenvalues[-1] * vector).norm()
    assert short == pytest.approx(math.sqrt(float(ritz.eigenvalues[-1] + residual)), rel=1e-9)
    assert short > math.sqrt(float(ritz.eigenvalues[-1]))


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.02)])
def test_other_precisions(dtype, within):
    """Gains whose squares half precision cannot hold."""
    matrix = 400 * drawn(16, 16, seed=7) / 4
    x = drawn(3, 16).to(dtype).requires_grad_()
    norms = jacobian_norms(x @ matrix.to(dtype), x)
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, torch.linalg.matrix_norm(matrix, ord=2).expand(3), rtol=within, atol=0.0)
