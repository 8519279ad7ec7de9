"""Per block: where its linear map sends, and whether it would cancel a direction.

Wang et al. (ICML 2025, arXiv 2502.07004), sections 3 and 4: at the explosion block the leading left singular vector of the block's
map is the defect direction; at the decay block the eigenvector nearest that direction has a clearly negative eigenvalue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.linear.angles import acute_angle
from sd_lens.linear.inputs import GaussianInput, Inputs, by_block
from sd_lens.linear.linearize import Estimator, linearize
from sd_lens.linear.maps import BlockMap, IdentityPlus, LinearMap
from sd_lens.linear.spectra import eigen_nearest, leading_singular
from sd_lens.models.weights import ModelWeights

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PARTS = ("attention", "ffn", "block")
NEAR = 30.0
"""An eigenvector within so many degrees of a direction speaks about it."""


@dataclass(frozen=True)
class BlockDirection:
    """One part of one block.

    Attributes:
        block: The block.
        part: ``"attention"`` (``I + A``), ``"ffn"`` (``I + F``) or ``"block"`` (``L``).
        sigma1: Largest singular value.
        sigma2: Second largest, to within 1 %, usually 0.1 %.
        angle_deg: Angle of the leading left singular vector to the reference direction, degrees.
        eigenvalue: Of the part without the identity (``A``, ``F``, ``R = L − I``): of the eigenvector nearest the reference.
        eigenvector_angle_deg: Angle of that eigenvector to the reference.
        residual: ``‖Mx − λx‖`` of that eigenpair.
        converged: Whether the residual is small. Where it is not, no eigenvector is near the reference, and the eigenpair means nothing.
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
    converged: bool
    balance: float | None

    @property
    def gap(self) -> float:
        """``σ1 / σ2``: how far the leading direction stands out. Infinite for a map of rank one."""
        return self.sigma1 / self.sigma2 if self.sigma2 > 0 else float("inf")


@dataclass(frozen=True)
class BlockDirections:
    """The table of all blocks.

    Attributes:
        model_name: The model.
        reference: The direction that angles are taken to, a unit vector.
        reference_source: Where it comes from: ``"given"``, ``"measured"`` (the defect direction), or ``"block b"`` whose leading left
            singular vector it is.
        rows: Three per block.
        notes: What the maps rest on beside the weights, and of which blocks this is so: the inputs and estimator of the fit,
            quadrature, scales of norms after the sublayers, router weights.
        n_blocks: How many blocks the model has.
    """

    model_name: str
    reference: Float[Tensor, "d_model"]
    reference_source: str
    rows: tuple[BlockDirection, ...]
    notes: tuple[str, ...] = ()
    n_blocks: int = 0

    def row(self, block: int, part: str = "block") -> BlockDirection:
        """One part of one block."""
        for row in self.rows:
            if row.block == block and row.part == part:
                return row
        raise ValueError(f"block, part: got {block}, {part!r}; allowed: the blocks in the table, and one of {', '.join(PARTS)}")

    def to_dataframe(self) -> pd.DataFrame:
        """One row per block and part."""
        frame = pd.DataFrame([vars(row) for row in self.rows])
        frame.insert(int(frame.columns.get_indexer(["sigma2"])[0]) + 1, "gap", [row.gap for row in self.rows])
        return frame

    def plot(self) -> Figure:
        """Angles and eigenvalues over blocks."""
        from sd_lens.display.figures import direction_angles

        return direction_angles(self)

    @property
    def reference_name(self) -> str:
        """The reference in words."""
        if self.reference_source in ("given", "measured"):
            return "the direction of the high-norm tokens" if self.reference_source == "measured" else "the direction given"
        return f"the leading left singular vector of {self.reference_source}"

    def sentence(self) -> str:
        """What the table shows, in one or two sentences."""
        blocks = [row for row in self.rows if row.part == "block"]
        loud = max(blocks, key=lambda row: row.gap)
        text = (
            f"The largest singular value stands out most in block {loud.block}: {loud.sigma1:.3g}, {loud.gap:.3g} times the second"
        )
        if self.reference_source != f"block {loud.block}":
            text += f"; its left vector is {loud.angle_deg:.1f}° from {self.reference_name}"
        near = [row for row in blocks if row.converged and row.eigenvector_angle_deg <= NEAR and row.eigenvalue.real < 0]
        if not near:
            return f"{text}. No block has a negative eigenvalue within {NEAR:g}° of {self.reference_name}."
        low = min(near, key=lambda row: row.eigenvalue.real)
        angle = f"{low.eigenvector_angle_deg:.1f}° from {self.reference_name}"
        return f"{text}. The most negative eigenvalue, {low.eigenvalue.real:.3g}, is block {low.block}'s, its vector {angle}."

    def __repr__(self) -> str:
        nearest = min((row for row in self.rows if row.part == "block"), key=lambda row: row.angle_deg)
        return f"BlockDirections({self.model_name}: reference {self.reference_source}, nearest block {nearest.block} at {nearest.angle_deg:.1f}°)"

    def _repr_html_(self) -> str:
        return str(self.to_dataframe().to_html(index=False))


def directions_of(
    weights: ModelWeights,
    direction: Float[Tensor, "d_model"] | None = None,
    *,
    blocks: Sequence[int] | None = None,
    norms: Mapping[int, float] | None = None,
    inputs: Inputs | Mapping[int, GaussianInput] = "unit",
    router: Mapping[int, Float[Tensor, "experts"]] | None = None,
    estimator: Estimator = "closed_form",
    samples: int = 100_000,
    paper: bool = False,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> BlockDirections:
    """Linearises blocks one at a time and compares each with a reference direction, from weights alone.

    Args:
        weights: The blocks, from `weights_of`.
        direction: The reference, usually the measured defect direction. Without one, the leading left singular vector of the block
            whose largest singular value stands out most from its second; the blocks are then read twice.
        blocks: Which blocks; default: all.
        norms: Norm of the high-norm tokens entering a block, for `BlockDirection.balance`.
        inputs: What FFNs are fitted to, see `sd_lens.linearize`; a mapping has a measured Gaussian for each block.
        router: Mean weights of each block's experts, see `measure_router`; default: uniform.
        estimator: ``"closed_form"`` or ``"sampled"``.
        samples: Number of samples of the sampled estimator.
        paper: Whether to leave out biases and mean subtraction, as the paper does.
        device: Where to compute; default: where the weights are.
        seed: Seeds the singular solver and the samples.
        progress: Whether to show a progress bar; None shows one on a terminal or in a notebook once the work takes seconds.

    Returns:
        The table, three rows per block.

    Raises:
        ValueError: A block does not exist or cannot be linearised; the direction has another width.

    Example:
        >>> from sd_lens.models.loading import load, weights_of
        >>> table = directions_of(weights_of(load("tiny")))
        >>> table.reference_source, table.row(2, "ffn").gap > 3
        ('block 2', True)
    """
    n = len(weights)
    chosen = list(range(n)) if blocks is None else list(blocks)
    if not chosen:
        raise ValueError("blocks: got none; allowed: at least one block")
    for block in chosen:
        if not -n <= block < n:
            raise ValueError(f"blocks: got {block}; allowed: 0 to {n - 1} (or negative, from the end)")
    chosen = list(dict.fromkeys(block % n for block in chosen))
    if direction is not None:
        direction = _unit(direction, weights.d_model)
    hidden = None if progress is None else not progress
    notes: dict[str, list[int]] = {}

    def each(label: str, look: Callable[[BlockMap], None]) -> None:
        """One block at a time: only its weights are converted, and they are let go before the next one's are read."""
        for block in tqdm(chosen, desc=label, unit="block", delay=2.0, disable=hidden, leave=False):
            look(linear_map(block))

    def linear_map(block: int) -> BlockMap:
        block_map = linearize(
            weights[block],
            inputs=by_block(inputs, block),
            estimator=estimator,
            samples=samples,
            seed=seed,
            paper=paper,
            router=None if router is None else router.get(block),
            device=device,
        )
        for note in block_map.notes:
            notes.setdefault(note, []).append(block)
        return block_map

    rows: list[BlockDirection] = []
    found: list[_Singular] = []

    def singular(block_map: BlockMap) -> None:
        found.extend(_singular(block_map, part, seed) for part in PARTS)

    def eigen(block_map: BlockMap) -> None:
        rows.extend(_row(block_map, part, reference, norms) for part in found if part.block == block_map.block_index)

    def both(block_map: BlockMap) -> None:
        singular(block_map)
        eigen(block_map)

    if direction is not None:
        reference, source = direction, "given"
        each("spectra", both)
    else:
        each("singular directions", singular)
        best = max((part for part in found if part.part == "block"), key=lambda part: part.gap)
        reference, source = best.u, f"block {best.block}"
        notes.clear()
        each("eigenvalues", eigen)
    said = tuple(note if len(where) == len(chosen) else f"{note} (blocks {_listed(where)})" for note, where in notes.items())
    said = (_inputs_note(inputs), *said)
    return BlockDirections(weights.name, _unit(reference, weights.d_model).float().cpu(), source, tuple(rows), said, n)


def _unit(direction: Tensor, d_model: int) -> Tensor:
    if tuple(direction.shape) != (d_model,):
        raise ValueError(f"direction: got shape {tuple(direction.shape)}; allowed: ({d_model},), the model's width")
    norm = direction.double().norm()
    if not bool(torch.isfinite(norm)) or not float(norm) > 0:
        raise ValueError("direction: got a zero or non-finite vector; allowed: a vector with a direction")
    return direction.double() / norm


def _inputs_note(inputs: Inputs | Mapping[int, GaussianInput]) -> str:
    if isinstance(inputs, str):
        where = "at the projections" if inputs == "unit" else "before the norm's gain and bias"
        return f"FFNs fitted to N(0, I) {where}"
    return "FFNs fitted to given Gaussians" if isinstance(inputs, Mapping) else f"FFNs fitted to {inputs!r}"


def _listed(blocks: Sequence[int]) -> str:
    return ", ".join(map(str, blocks))


@dataclass(frozen=True)
class _Singular:
    """The singular side of one part of one block: known before there is a reference."""

    block: int
    part: str
    sigma1: float
    sigma2: float
    u: Tensor

    @property
    def gap(self) -> float:
        return self.sigma1 / self.sigma2 if self.sigma2 > 0 else float("inf")


# The second singular value is there to be compared with the first: its vectors are not used.
_TOLERANCES = (1e-6, 1e-2)
# Eigenvectors near the reference are found within some ten products. Where the nearest candidate is far after so many, more products
# would be spent on a block that has none; where it is not, they are.
_KRYLOV, _LARGER_KRYLOV = 24, 96
_FAR = 65.0
# Of maps up to this width the whole space costs little.
_NARROW = 512


def _update(block_map: BlockMap, part: str) -> LinearMap:
    return {"attention": block_map.attention, "ffn": block_map.ffn, "block": block_map.update}[part]


def _singular(block_map: BlockMap, part: str, seed: int) -> _Singular:
    k = min(2, block_map.d_model)
    triplets = leading_singular(IdentityPlus(_update(block_map, part)), k, tol=_TOLERANCES[:k], seed=seed)
    sigma2 = float(triplets.s[1]) if k > 1 else 0.0
    return _Singular(block_map.block_index, part, float(triplets.s[0]), sigma2, triplets.u[:, 0])


def _row(block_map: BlockMap, singular: _Singular, direction: Tensor, norms: Mapping[int, float] | None) -> BlockDirection:
    update = _update(block_map, singular.part)
    pair = eigen_nearest(update, direction, max_krylov=_KRYLOV if update.d_model > _NARROW else update.d_model)
    if not pair.converged and pair.angle_deg < _FAR:
        pair = eigen_nearest(update, direction, max_krylov=_LARGER_KRYLOV)
    norm = None if norms is None else norms.get(singular.block)
    return BlockDirection(
        block=singular.block,
        part=singular.part,
        sigma1=singular.sigma1,
        sigma2=singular.sigma2,
        angle_deg=float(acute_angle(singular.u, direction.to(singular.u.device))),
        eigenvalue=pair.value,
        eigenvector_angle_deg=pair.angle_deg,
        residual=pair.residual,
        converged=pair.converged,
        balance=None if norm is None else pair.balance(norm),
    )
