"""What sets an FFN off: the leading right singular vector of its linear map, with the sign that the true FFN answers to.

Wang et al. (ICML 2025, arXiv 2502.07004), section 4.2, call its span the explosion subspace.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.linear.linearize import linearize
from sd_lens.linear.spectra import SingularTriplets, leading_singular
from sd_lens.models.weights import BlockWeights, FFNWeights, MoEWeights


@dataclass(frozen=True)
class Trigger:
    """The direction that sets a block's FFN off.

    Attributes:
        block: The block.
        vector: Unit vector ``v0``, in the normalised stream before the norm's gain (the gain is part of the map). Float32, CPU.
        sigma: The leading singular value.
        gap: Its ratio to the second.
        answer: Norm of the true FFN's answer to the normalised stream ``√d v0``, before a norm behind the FFN.
        opposite_answer: The same for ``-√d v0``; never the larger one.
    """

    block: int
    vector: Float[Tensor, "d_model"]
    sigma: float
    gap: float
    answer: float
    opposite_answer: float

    def coefficient(self, weights: BlockWeights, entering: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
        """How much of the trigger is in what an FFN reads.

        Args:
            weights: The block.
            entering: The stream entering the FFN.

        Returns:
            ``⟨x, v0⟩`` with ``x`` the normalised stream before the gain, between ``-√d`` and ``√d``; random streams have about 1. (Where
            no norm stands before the FFN, as in OLMo 2, ``x`` is the stream itself, of any length.)
        """
        x = normalised(weights.ffn, entering)
        return x @ self.vector.to(x)

    def __repr__(self) -> str:
        return f"Trigger(block {self.block}: sigma {self.sigma:.4g}, {self.gap:.3g} times the second, answer {self.answer:.4g})"


def normalised(ffn: FFNWeights | MoEWeights, entering: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """What an FFN's linear map acts on: the stream entering it, centred and divided by its scale, before the gain.

    An FFN without a norm before it (OLMo 2) reads the stream itself.
    """
    if ffn.norm is None:
        return entering.to(torch.promote_types(entering.dtype, torch.float32))
    return ffn.norm.normalised(entering)


def trigger_direction(weights: BlockWeights, **options: Any) -> Trigger:
    """The leading right singular vector of a block's FFN.

    Args:
        weights: The block.
        **options: Passed on to `linearize` (``inputs``, ``estimator``, ...).

    Returns:
        The vector, with the sign to which the true FFN gives the larger answer.

    Raises:
        ValueError: The block cannot be linearised.

    Example:
        >>> from sd_lens.models.loading import weights_of
        >>> from sd_lens.models.planted import planted
        >>> truth = planted()
        >>> found = trigger_direction(weights_of(truth.model)[truth.explosion_block])
        >>> bool(found.vector @ truth.trigger > 0.999)
        True
    """
    triplets = signed(weights, leading_singular(linearize(weights, **options).ffn, k=2))
    vector = triplets.v[:, 0].float()
    answer, opposite = answers(weights.ffn, full_length(torch.stack([vector, -vector]))).tolist()
    sigma, second = triplets.s[:2].tolist()
    return Trigger(
        block=weights.block,
        vector=vector.cpu(),
        sigma=sigma,
        gap=sigma / second if second else float("inf"),
        answer=answer,
        opposite_answer=opposite,
    )


def signed(weights: BlockWeights, triplets: SingularTriplets) -> SingularTriplets:
    """Singular triplets of a block's FFN with the sign, free in theory, that makes the true FFN give ``+v`` the larger answer.

    Args:
        weights: The block.
        triplets: Triplets of its FFN's map.
    """
    right = triplets.v.T
    sign = torch.where(answers(weights.ffn, full_length(-right)) > answers(weights.ffn, full_length(right)), -1.0, 1.0)
    sign = sign.to(triplets.u)
    return SingularTriplets(triplets.u * sign, triplets.s, triplets.v * sign)


def full_length(vectors: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """Unit vectors as long as a norm makes every stream: ``√d``."""
    return vectors * vectors.shape[-1] ** 0.5


def answers(ffn: FFNWeights | MoEWeights, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
    """Norm of `ffn_answer`, on the CPU."""
    return torch.linalg.vector_norm(ffn_answer(ffn, x), dim=-1).cpu()


@torch.no_grad()
def ffn_answer(ffn: FFNWeights | MoEWeights, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """What the true FFN makes of a normalised stream (before the gain), in float32; a norm behind it would hide how much, and is left out.

    Args:
        ffn: The layer.
        x: Normalised streams, of any length.
    """
    bare = replace(ffn, post_norm=None)
    weight = (ffn.experts[0] if isinstance(ffn, MoEWeights) else ffn).W_out
    x = x.float().to(weight.device)
    if ffn.norm is not None:
        x = x * ffn.norm.gain.float()
        x = x if ffn.norm.bias is None else x + ffn.norm.bias.float()
    x = x.to(weight)
    return (bare.output(x) if isinstance(bare, MoEWeights) else bare.output(bare.hidden(x))).float()
