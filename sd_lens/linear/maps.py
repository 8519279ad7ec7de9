"""Linear maps from residual stream to residual stream, known by their products.

A map knows how to multiply vectors (`LinearMap.mv`) and how its transpose does (`LinearMap.rmv`); solvers need nothing else. Maps act on
residual vectors in the last axis, any number of batch axes before it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

# Columns of a dense matrix computed at once: their neurons take d_mlp numbers each.
_DENSE_ROWS = 1024


class LinearMap(ABC):
    """A linear map from residual stream to residual stream, known by its products."""

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """Any tensor of the dtype and on the device that products are computed in."""

    @property
    @abstractmethod
    def d_model(self) -> int:
        """Width of the residual stream."""

    @abstractmethod
    def mv(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The map applied to vectors."""

    @abstractmethod
    def rmv(self, y: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The transposed map applied to vectors."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_model, d_model)``."""
        return self.d_model, self.d_model

    @property
    def offset(self) -> Float[Tensor, "d_model"]:
        """What is added to the map's product to make it the best affine approximation: ``mv(x) + offset``."""
        return self.like.new_zeros(self.d_model)

    def affine(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The map with its offset."""
        return self.mv(x) + self.offset

    def to_dense(self) -> Float[Tensor, "d_model d_model"]:
        """The matrix ``M`` with ``mv(x) = M x`` for column vectors. For checks and small models: d_model² numbers."""
        eye = torch.eye(self.d_model, dtype=self.like.dtype, device=self.like.device)
        return torch.cat([self.mv(rows) for rows in eye.split(_DENSE_ROWS)]).mT

    def as_linear_operator(self) -> LinearOperator:
        """The map as scipy's `LinearOperator` in float64, for any of scipy's solvers."""

        def on_columns(product: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
            def apply(columns: np.ndarray) -> np.ndarray:
                rows = torch.from_numpy(columns.reshape(self.d_model, -1).T.copy()).to(self.like)
                return product(rows).T.double().cpu().numpy().reshape(columns.shape)

            return apply

        forward, backward = on_columns(self.mv), on_columns(self.rmv)
        products: dict[str, Any] = {"matvec": forward, "rmatvec": backward, "matmat": forward, "rmatmat": backward}
        return LinearOperator(dtype="float64", shape=self.shape, **products)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(d_model={self.d_model}, dtype={self.like.dtype}, device={self.like.device})"


class DenseMap(LinearMap):
    """A square matrix as a map: ``mv(x) = M x`` for column vectors."""

    def __init__(self, matrix: Float[Tensor, "d_model d_model"]):
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix: got shape {tuple(matrix.shape)}; allowed: a square matrix")
        self.matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))

    @property
    def like(self) -> Tensor:
        """Any tensor of the dtype and on the device that products are computed in."""
        return self.matrix

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.matrix.shape[0]

    def mv(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The map applied to vectors."""
        return x @ self.matrix.mT

    def rmv(self, y: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The transposed map applied to vectors."""
        return y @ self.matrix


class IdentityPlus(LinearMap):
    """``I + M``: a residual connection around a map."""

    def __init__(self, update: LinearMap):
        self.update = update

    @property
    def like(self) -> Tensor:
        """Any tensor of the dtype and on the device that products are computed in."""
        return self.update.like

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.update.d_model

    def mv(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The map applied to vectors."""
        return x + self.update.mv(x)

    def rmv(self, y: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The transposed map applied to vectors."""
        return y + self.update.rmv(y)

    @property
    def offset(self) -> Float[Tensor, "d_model"]:
        """The update's offset."""
        return self.update.offset
