"""Frobenius and spectral norms of Jacobians at every source and position, from rows that come in chunks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.propagation.jacobians import Graph, wide


class Norms(NamedTuple):
    """Norms of the Jacobians with respect to every source's input.

    Attributes:
        frobenius: Frobenius norms; NaN where they are not asked for.
        spectral: Largest singular values; NaN where they are not asked for.
        n_products: Vector-Jacobian products that were taken.
    """

    frobenius: Float[Tensor, "source pos"]
    spectral: Float[Tensor, "source pos"]
    n_products: int


def row_norms(rows: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos"]:
    """Euclidean norms, added up in float64."""
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)


def exact_norms(graph: Graph, *, frobenius: bool, spectral: bool, chunk: int, memory: int, bar: Any) -> Norms:
    """Norms from all rows of the Jacobians.

    For spectral norms the rows of as many positions are kept as fit into the memory given; where not all do, all products are taken once
    more for each further group of positions. Frobenius norms need no rows kept.

    Args:
        graph: From `recorded`.
        frobenius: Whether Frobenius norms are wanted.
        spectral: Whether spectral norms are.
        chunk: How many products to take at once.
        memory: Bytes for kept rows; those of one position are kept in any case.
        bar: Progress bar, in products.
    """
    cotangents = graph.rows(chunk)
    n_rows, width = cotangents.shape
    n_tokens, n_sources = graph.inputs[0].shape[1], len(graph.inputs)
    squares = torch.zeros(n_sources, n_tokens, dtype=torch.float64, device=cotangents.device)
    largest = torch.full_like(squares, float("nan"))
    dtype = wide(cotangents)
    group = min(n_tokens, max(1, memory // (n_sources * n_rows * width * dtype.itemsize))) if spectral else n_tokens
    starts = range(0, n_tokens, group)
    bar.reset(total=n_rows * len(starts))
    for start in starts:
        here = slice(start, min(start + group, n_tokens))
        kept = torch.empty((n_sources, here.stop - start, n_rows if spectral else 0, width), dtype=dtype, device=cotangents.device)
        done = 0
        for part in cotangents.split(chunk):
            for source, rows in enumerate(graph.from_output(part)):
                if start == 0:
                    squares[source] += row_norms(rows).square().sum(0)
                if spectral:
                    kept[source, :, done : done + len(part)] = rows[:, here].transpose(0, 1)
            done += len(part)
            bar.update(len(part))
        if spectral:
            # One at a time: a batched decomposition would take as much memory again as all the rows.
            largest[:, here] = torch.stack([_spectral(matrix) for matrix in kept.flatten(0, 1)]).view(n_sources, -1)
    return Norms(squares.sqrt() if frobenius else torch.full_like(squares, float("nan")), largest, n_rows * len(starts))


def _spectral(matrix: Float[Tensor, "row d_model"]) -> Float[Tensor, ""]:
    return torch.linalg.matrix_norm(matrix, ord=2).double()
