"""Where in a forward pass a subspace is read and written: what an FFN reads, or the residual stream.

At either place an activation ``t`` has coefficients ``c = (t − bias) · read`` on the subspace, and adding ``Δc · writeᵀ`` changes them
by ``Δc`` and nothing else, because ``readᵀ · write`` is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.models import hook_names
from sd_lens.models.ffn_input import ffn_input
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.weights import BlockWeights

Side = Literal["trigger", "direction", "both"]
"""What the FFN reads (right singular vectors), the stream that the block leaves (left ones), or both."""


@dataclass(frozen=True, eq=False)
class Site:
    """A subspace at a hook point.

    Attributes:
        name: The hook point.
        block: The block that it belongs to.
        vectors: The subspace's orthonormal vectors, in columns.
        along: What changes of coefficients are written along: the same vectors, but for a control.
        gain: What the normalised stream was multiplied by at the hook point; None where it was not.
        bias: What was added to it there.
        centred: Whether the stream is centred there (behind a LayerNorm), so that all-ones vectors must not be added.
    """

    name: str
    block: int
    vectors: Float[Tensor, "d_model rank"]
    along: Float[Tensor, "d_model rank"]
    gain: Float[Tensor, "d_model"] | None = None
    bias: Float[Tensor, "d_model"] | None = None
    centred: bool = False

    @cached_property
    def _read(self) -> Tensor:
        if self.gain is None:
            return self.vectors
        seen = self.gain[:, None] != 0
        read = torch.where(seen, self.vectors / self.gain[:, None], 0.0)
        if bool(seen.all()):
            return read
        # Entries behind a gain of zero cannot be seen, by the FFN neither: coefficients are what fits the others best.
        visible = torch.where(seen, self.vectors, 0.0).double()
        return (read.double() @ torch.linalg.pinv(visible.T @ visible)).to(read)

    @cached_property
    def _write(self) -> Tensor:
        return self.along if self.gain is None else self.along * self.gain[:, None]

    def coefficients(self, activation: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch rank"]:
        """How much of the subspace is in activations, in float32 or better."""
        wide = activation.to(torch.promote_types(activation.dtype, torch.float32))
        read = self._read.to(wide)
        return wide @ read if self.bias is None else wide @ read - self.bias.to(wide) @ read

    def moved(
        self, activation: Float[Tensor, "*batch d_model"], by: Float[Tensor, "*batch rank"]
    ) -> Float[Tensor, "*batch d_model"]:
        """Activations with other coefficients.

        Args:
            activation: What stands at the hook point.
            by: What is added to the coefficients.
        """
        return activation + (by @ self._write.to(by).T).to(activation.dtype)

    def randomised(self, seed: int) -> Site:
        """The same coefficients, written along random orthonormal directions that have none of the subspace: a control.

        A displacement is as long as the true one, measured where the subspace's vectors are orthonormal.

        Args:
            seed: Seeds the directions.

        Raises:
            ValueError: The subspace leaves no room beside it.
        """
        d, rank = self.vectors.shape
        taken = self.vectors.double().cpu()
        if self.centred:
            taken = torch.cat([taken, torch.ones(d, 1, dtype=torch.float64)], dim=1)
        if taken.shape[1] + rank > d:
            raise ValueError(
                f"control: a subspace of rank {rank} leaves no room beside it in width {d}; allowed: at most {(d - self.centred) // 2}"
            )
        drawn = torch.randn(d, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        basis = torch.linalg.qr(torch.cat([taken, drawn], dim=1)).Q[:, -rank:]
        return replace(self, along=basis.to(self.vectors))


def trigger_site(model: TransformerLensModel, weights: BlockWeights, right: Float[Tensor, "d_model rank"]) -> Site:
    """Right singular vectors in what a block's FFN reads.

    Args:
        model: A TransformerLens model.
        weights: The block, read from it.
        right: Orthonormal columns in the normalised stream before the gain.

    Raises:
        ValueError: The model has no hook point for it.
    """
    at, norm = ffn_input(model, weights), weights.ffn.norm
    right = right.float().to((weights.attention.W_O if norm is None else norm.gain).device)
    # Copies: what is read and written must fit together also where the model is trained meanwhile.
    gain, bias = (None if tensor is None else tensor.detach().float().clone() for tensor in (at.gain, at.bias))
    return Site(at.name, weights.block, right, right, gain, bias, centred=norm is not None and norm.kind == "layer")


def direction_site(block: int, left: Float[Tensor, "d_model rank"]) -> Site:
    """Left singular vectors in the stream that a block leaves.

    Args:
        block: The block.
        left: Orthonormal columns in the stream.
    """
    return Site(hook_names.resid_post(block), block, left.float(), left.float())


def require_side(side: str, allowed: tuple[str, ...] = get_args(Side)) -> None:
    """Raises `ValueError` unless a side is one of those allowed."""
    if side not in allowed:
        raise ValueError(f"side: got {side!r}; allowed: {', '.join(map(repr, allowed))}")
