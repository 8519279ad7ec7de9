"""Frobenius norms of Jacobians estimated from products with random signs, and how far the estimate may be off.

For a vector ``u`` of independent random signs ``E|Jᵀu|² = ‖J‖²_F`` (Hutchinson 1990, for the trace of ``J Jᵀ``). One product gives this for
every position at once, so that a few dozen do where the exact norm takes as many as the output has entries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.propagation.jacobian_norms import row_norms
from sd_lens.propagation.jacobians import Graph


class Estimate(NamedTuple):
    """Frobenius norms estimated from samples.

    Attributes:
        frobenius: The estimates.
        standard_error: Their standard errors.
    """

    frobenius: Float[Tensor, "source pos"]
    standard_error: Float[Tensor, "source pos"]


def estimated_norms(graph: Graph, *, n_probes: int, seed: int, chunk: int, bar: Any) -> Estimate:
    """Frobenius norms of the Jacobians, estimated.

    Args:
        graph: From `recorded`.
        n_probes: How many vectors of random signs.
        seed: Seeds them.
        chunk: How many products to take at once.
        bar: Progress bar, in products.
    """
    output = graph.output if graph.logits is None else graph.logits
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (n_probes, len(output)), generator=generator) * 2 - 1
    bar.reset(total=n_probes)
    squares = []
    for part in signs.split(chunk):
        squares.append(torch.stack([row_norms(rows).square() for rows in graph.products(part.to(output))], dim=1))
        bar.update(len(part))
    return of_samples(torch.cat(squares))


def of_samples(squares: Float[Tensor, "probe source pos"]) -> Estimate:
    """Norm and standard error from samples of the squared norm.

    The norm is the root of the mean; its standard error is that of the mean divided by twice the norm (delta method).

    Args:
        squares: ``|Jᵀu|²``, at least two samples.
    """
    norm = squares.mean(0).sqrt()
    error = squares.std(0) / len(squares) ** 0.5 / (2 * norm)
    return Estimate(norm, torch.where(norm > 0, error, 0.0))
