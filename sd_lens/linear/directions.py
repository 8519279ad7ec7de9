"""Per block: where its linear map sends, and whether it would cancel a direction.

Wang et al. (ICML 2025, arXiv 2502.07004), sections 3 and 4: at the explosion block the leading left singular vector of the block's
map is the defect direction; at the decay block the eigenvector nearest that direction has a clearly negative eigenvalue.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.linear.angles import acute_angle
from sd_lens.linear.gaussian import Inputs
from sd_lens.linear.maps import BlockMap, IdentityPlus, LinearMap, linearize
from sd_lens.linear.spectra import SingularTriplets, eigen_nearest, leading_singular
from sd_lens.models.loading import weights_of
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.weights import ModelWeights

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PARTS = ("attention", "ffn", "block")


@dataclass(frozen=True)
class BlockDirection:
    """One part of one block.

    Attributes:
        block: The block.
        part: ``"attention"`` (``I + A``), ``"ffn"`` (``I + F``) or ``"block"`` (``L``).
        sigma1: Largest singular value.
        sigma2: Second largest.
        angle_deg: Angle of the leading left singular vector to the reference direction, degrees.
        eigenvalue: Of the part without the identity (``A``, ``F``, ``R = L − I``): of the eigenvector nearest the reference.
        eigenvector_angle_deg: Angle of that eigenvector to the reference.
        residual: ``‖Mx − λx‖`` of that eigenpair.
        balance: ``Re λ·√d / ‖x‖`` for the measured norm of high-norm tokens entering the block: −1 where it cancels them. None
            where no norm was measured.
    """

    block: int
    part: str
    sigma1: float
    sigma2: float
    angle_deg: float
    eigenvalue: complex
    eigenvector_angle_deg: float
    residual: float
    balance: float | None


@dataclass(frozen=True)
class BlockDirections:
    """The table of all blocks.

    Attributes:
        model_name: The model.
        reference: The direction that angles are taken to, a unit vector.
        reference_source: Where it comes from: ``"given"``, or ``"block b"`` whose leading left singular vector it is.
        rows: Three per block.
    """

    model_name: str
    reference: Float[Tensor, "d_model"]
    reference_source: str
    rows: tuple[BlockDirection, ...]

    def row(self, block: int, part: str = "block") -> BlockDirection:
        """One part of one block."""
        for row in self.rows:
            if row.block == block and row.part == part:
                return row
        raise ValueError(f"block, part: got {block}, {part!r}; allowed: the blocks in the table, and one of {', '.join(PARTS)}")

    def to_dataframe(self) -> pd.DataFrame:
        """One row per block and part."""
        return pd.DataFrame([vars(row) for row in self.rows])

    def plot(self) -> Figure:
        """Angles and eigenvalues over blocks."""
        from sd_lens.display.figures import direction_angles

        return direction_angles(self)

    def __repr__(self) -> str:
        nearest = min((row for row in self.rows if row.part == "block"), key=lambda row: row.angle_deg)
        return f"BlockDirections({self.model_name}: reference {self.reference_source}, nearest block {nearest.block} at {nearest.angle_deg:.1f}°)"

    def _repr_html_(self) -> str:
        return str(self.to_dataframe().to_html(index=False))


def block_directions(
    model: TransformerLensModel | ModelWeights,
    direction: Float[Tensor, "d_model"] | None = None,
    *,
    blocks: Sequence[int] | None = None,
    norms: Mapping[int, float] | None = None,
    inputs: Inputs = "unit",
    seed: int = 0,
    progress: bool | None = None,
) -> BlockDirections:
    """Linearises every block and compares it with a reference direction.

    Args:
        model: A TransformerLens model, or its `weights_of`.
        direction: The reference, usually the measured defect direction. Without one, the leading left singular vector of the block
            whose largest singular value stands out most from its second.
        blocks: Which blocks; default: all.
        norms: Norm of the high-norm tokens entering a block, for `BlockDirection.balance`.
        inputs: What FFNs are fitted to, see `sd_lens.linear.gaussian.fit_ffn`.
        seed: Seeds the singular solver.
        progress: Whether to show a progress bar.

    Returns:
        The table, three rows per block.

    Raises:
        ValueError: A block does not exist or cannot be linearised; the direction has another width.

    Example:
        >>> from sd_lens.models.planted import planted
        >>> truth = planted()
        >>> table = block_directions(truth.model, truth.direction)
        >>> round(table.row(truth.decay_block).eigenvalue.real)
        -60
    """
    weights = model if isinstance(model, ModelWeights) else weights_of(model)
    name = "weights" if isinstance(model, ModelWeights) else str(getattr(model.cfg, "model_name", "model"))
    chosen = range(len(weights)) if blocks is None else blocks
    if len(chosen) == 0:
        raise ValueError("blocks: got none; allowed: at least one block")
    if direction is not None and tuple(direction.shape) != (weights.d_model,):
        raise ValueError(f"direction: got shape {tuple(direction.shape)}; allowed: ({weights.d_model},), the model's width")
    hidden = None if progress is None else not progress

    def maps(label: str) -> Iterator[BlockMap]:
        """One block at a time: only its weights are converted and held."""
        for block in tqdm(chosen, desc=label, unit="block", delay=2.0, disable=hidden, leave=False):
            yield linearize(weights[block], inputs=inputs)

    source = "given"
    if direction is None:
        direction, source = _most_singular(maps("reference"), seed)
    rows = []
    for block_map in maps("spectra"):
        norm = None if norms is None else norms.get(block_map.block_index)
        rows += [_row(block_map, part, direction, norm, seed) for part in PARTS]
    unit = (direction.double() / direction.double().norm()).float().cpu()
    return BlockDirections(name, unit, source, tuple(rows))


def _most_singular(maps: Iterator[BlockMap], seed: int) -> tuple[Tensor, str]:
    best: tuple[float, SingularTriplets, int] | None = None
    for block_map in maps:
        triplets = leading_singular(block_map, 2, seed=seed)
        gap = float(triplets.s[0] / triplets.s[1])
        if best is None or gap > best[0]:
            best = gap, triplets, block_map.block_index
    assert best is not None
    return best[1].u[:, 0], f"block {best[2]}"


def _row(block_map: BlockMap, part: str, direction: Tensor, norm: float | None, seed: int) -> BlockDirection:
    update: LinearMap = {"attention": block_map.attention, "ffn": block_map.ffn, "block": block_map.update}[part]
    triplets = leading_singular(IdentityPlus(update), 2, seed=seed)
    pair = eigen_nearest(update, direction)
    return BlockDirection(
        block=block_map.block_index,
        part=part,
        sigma1=float(triplets.s[0]),
        sigma2=float(triplets.s[1]),
        angle_deg=float(acute_angle(triplets.u[:, 0], direction.to(triplets.u.device))),
        eigenvalue=pair.value,
        eigenvector_angle_deg=pair.angle_deg,
        residual=pair.residual,
        balance=None if norm is None else pair.balance(norm),
    )
