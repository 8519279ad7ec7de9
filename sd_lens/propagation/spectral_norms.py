"""The largest singular values of many Jacobians at once, without writing any of them out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

_CHECK_EVERY = 4


def jacobian_norms(
    y: Float[Tensor, "*tokens d_out"],
    x: Float[Tensor, "*tokens d_in"],
    *,
    tolerance: float = 1e-5,
    max_steps: int = 64,
    seed: int = 0,
) -> Float[Tensor, "*tokens"]:
    """Spectral norm of every token's Jacobian ``dy/dx``, where no token's ``y`` depends on another's ``x``.

    Then one vector-Jacobian product holds the products of all tokens, and Lanczos' iteration on ``JᵀJ`` (with full reorthogonalisation)
    runs for all of them at once. ``J v`` is the derivative of ``Jᵀ u`` with respect to ``u``, so ``y`` must be differentiable twice.
    The largest Ritz value approaches the norm from below; what is given back is the upper end of the interval that its residual leaves,
    above the norm by no more than the tolerance where the iteration converged in ``max_steps``, and where it did not by that residual.

    Memory: the graph of ``y``, and ``d_in`` float32 numbers per token and step.

    Args:
        y: Outputs, with a graph back to ``x``.
        x: Inputs that ask for gradients.
        tolerance: Largest relative error; of half precision, a few roundings at least.
        max_steps: Most steps. ``d_in`` steps give the norm exactly.
        seed: Seeds the starting vectors.

    Returns:
        The norms, in float64 on the CPU.
    """
    forward, back = _products(y, x)
    work = torch.promote_types(x.dtype, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, work)
    q = q / q.norm(dim=-1, keepdim=True)
    small = torch.finfo(work).eps
    tolerance = max(tolerance, 8 * torch.finfo(x.dtype).eps)
    basis: list[Tensor] = []
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    most = min(max_steps, x.shape[-1])
    for step in range(1, most + 1):
        basis.append(q)
        answer = forward(q.to(x.dtype)).to(work)
        length = answer.norm(dim=-1, keepdim=True)  # taken out, since squares of large gains are too large for half precision
        w = back((answer / length.clamp(min=torch.finfo(work).tiny)).to(y.dtype)).to(work) * length
        diagonal.append((w * q).sum(-1).double())
        for _ in range(2):
            for known in basis:
                w = w - (known * w).sum(-1, keepdim=True) * known
        left = w.norm(dim=-1, keepdim=True)
        # What is no more than rounding is no new direction: the space that the Jacobian can be seen in is exhausted.
        left = torch.where(left > 10 * small * length.square(), left, 0.0)
        beside.append(left.squeeze(-1).double())
        if step == most or step % _CHECK_EVERY == 0:
            value, residual = _largest(diagonal, beside)
            if step == most or bool((residual <= 2 * tolerance * value).all()):
                return (value + residual).clamp(min=0).sqrt().cpu()
        q = torch.where(left > 0, w / left, 0.0)
    raise ValueError(f"max_steps: got {max_steps}; allowed: at least 1")


def _products(y: Tensor, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """``J v`` and ``Jᵀ u`` of every token."""
    u = torch.zeros_like(y, requires_grad=True)
    (gradient,) = torch.autograd.grad(y, x, u, create_graph=True)

    def forward(v: Tensor) -> Tensor:
        return torch.autograd.grad(gradient, u, v, retain_graph=True)[0]

    def back(u: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, u, retain_graph=True)[0]

    return forward, back


def _largest(diagonal: list[Tensor], beside: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Largest eigenvalue of each token's tridiagonal matrix, and the residual of its Ritz vector."""
    matrix = torch.diag_embed(torch.stack(diagonal, dim=-1))
    if len(beside) > 1:
        off = torch.stack(beside[:-1], dim=-1)
        matrix = matrix + torch.diag_embed(off, offset=1) + torch.diag_embed(off, offset=-1)
    values, vectors = torch.linalg.eigh(matrix)
    return values[..., -1], beside[-1] * vectors[..., -1, -1].abs()
