"""What a sweep patches: the component in a subspace, of what a token shows at a site, or of what a head adds to the stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sd_lens.interventions.sites import Site
from sd_lens.models import hook_names
from sd_lens.models.running import Hook
from sd_lens.models.splits import HeadSplit
from sd_lens.models.weights import AttentionWeights, BlockWeights

_SPANNED = 1e-4  # singular value below which centred unit vectors are taken for dependent


@dataclass(frozen=True, eq=False)
class Targets:
    """The tokens of a forward pass that one patch changes.

    Attributes:
        rows: The row of each.
        places: Its position.
        heads: The head whose component is patched; not looked at where tokens are.
    """

    rows: Int[Tensor, "token"]
    places: Int[Tensor, "token"]
    heads: Int[Tensor, "token"]


@dataclass(frozen=True, eq=False)
class TokenPatch:
    """Patches the component of activations at a site.

    Attributes:
        site: The subspace there.
    """

    site: Site

    @property
    def reads(self) -> str:
        """Where coefficients are read."""
        return self.site.name

    def coefficients(self, activation: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos rank"]:
        """Coefficients of what stands where they are read."""
        return self.site.coefficients(activation)

    def hooks(self, targets: Targets, wanted: Float[Tensor, "token rank"], along: Site) -> list[Hook]:
        """Hooks that give targets other coefficients.

        Args:
            targets: Which tokens.
            wanted: Their new coefficients.
            along: What changes are written along: the site itself, or a random control of it.
        """

        def edit(activation: Tensor, hook: Any) -> Tensor:
            there = activation[targets.rows, targets.places]
            return _replaced(activation, targets, along.moved(there, wanted.to(there.device) - self.site.coefficients(there)))

        return [(self.site.name, edit)]


@dataclass(frozen=True, eq=False)
class HeadPatch:
    """Patches the component of what single heads add to the stream.

    Attributes:
        site: The subspace where the attention's output joins the stream.
        splits: For each of its vectors, the heads' shares.
    """

    site: Site
    splits: tuple[HeadSplit, ...]

    @property
    def reads(self) -> str:
        """Where coefficients are read."""
        return hook_names.mixed_values(self.site.block)

    def coefficients(self, z: Float[Tensor, "*batch heads d_head"]) -> Float[Tensor, "*batch heads rank"]:
        """Coefficients of what each head adds, the scale of a norm behind the attention included."""
        return torch.stack([split(z)[0] for split in self.splits], dim=-1)

    def hooks(self, targets: Targets, wanted: Float[Tensor, "token heads rank"], along: Site) -> list[Hook]:
        """Hooks that give one head's addition at each target other coefficients.

        Args:
            targets: Which tokens, and which head at each.
            wanted: The coefficients that heads' additions have in the other run; only those of the targets' heads are taken.
            along: What changes are written along: the site itself, or a random control of it.
        """
        by: list[Tensor] = []
        each = torch.arange(len(targets.rows)), targets.heads

        def see(z: Tensor, hook: Any) -> None:
            added = self.coefficients(z[targets.rows, targets.places])
            by.append((wanted.to(added.device) - added)[each])

        def edit(added: Tensor, hook: Any) -> Tensor:
            return _replaced(added, targets, along.moved(added[targets.rows, targets.places], by.pop()))

        return [(self.reads, see), (self.site.name, edit)]


def _replaced(activation: Tensor, targets: Targets, new: Tensor) -> Tensor:
    activation = activation.clone()
    activation[targets.rows, targets.places] = new
    return activation


def head_patch(
    block: int, attention: AttentionWeights, vectors: Float[Tensor, "d_model rank"], *, centred: bool = False
) -> HeadPatch:
    """Patches what a block's heads add along a subspace of the stream.

    Args:
        block: The block whose heads they are.
        attention: Its attention.
        vectors: Orthonormal columns in the stream.
        centred: Whether random controls must have nothing of the all-ones vector, as `vectors` have not.
    """
    vectors = vectors.float().to(attention.W_O.device)
    site = Site(hook_names.attn_out(block), block, vectors, vectors, centred=centred)
    return HeadPatch(site, tuple(HeadSplit(attention, vector) for vector in vectors.T))


def read_in_stream(weights: BlockWeights, right: Float[Tensor, "d_model rank"]) -> Float[Tensor, "d_model span"]:
    """The span of right singular vectors as directions of the stream that a block's FFN reads.

    The norm's scale is a number per token; where the norm centres, the FFN sees a direction of the stream less its mean.

    Args:
        weights: The block that the vectors are of.
        right: Orthonormal columns in the normalised stream.

    Returns:
        Orthonormal columns; one less than the vectors where these span what centring removes.

    Raises:
        ValueError: Centring removes all that there is.
    """
    norm = weights.ffn.norm
    if norm is None or norm.kind == "rms":
        return right
    centred = norm.center(right.T).T
    u, s, vh = torch.linalg.svd(centred, full_matrices=False)
    kept = s > _SPANNED
    if not bool(kept.any()):
        raise ValueError("subspace: got right vectors that the norm's centring removes; allowed: any that it leaves something of")
    # Of vectors that centring leaves alone this gives back the vectors themselves, which a product of u alone would turn.
    return u @ vh if bool(kept.all()) else u[:, kept]
