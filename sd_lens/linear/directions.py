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

from sd_lens.linear.blocks import BlockMap
from sd_lens.linear.inputs import GaussianInput, Inputs, by_block, require_inputs
from sd_lens.linear.linearize import Estimator, PostScales, linearize, require_estimator
from sd_lens.linear.parts import NEAR, PARTS, BlockDirection, Singular, direction_row, singular_side
from sd_lens.models.weights import ModelWeights

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


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
        """What the table shows, in two sentences."""
        return " ".join(self.sentences())

    def sentences(self) -> tuple[str, str]:
        """The same, one by one: what stands out, and which block subtracts the direction."""
        blocks = [row for row in self.rows if row.part == "block"]
        loud = max(blocks, key=lambda row: row.gap)
        text = (
            f"The largest singular value stands out most in block {loud.block}: {loud.sigma1:.3g}, {loud.gap:.3g} times the second"
        )
        if self.reference_source != f"block {loud.block}":
            text += f"; its left vector is {loud.angle_deg:.1f}° from {self.reference_name}"
        near = [row for row in blocks if row.converged and row.eigenvector_angle_deg <= NEAR and row.eigenvalue.real < 0]
        if not near:
            return f"{text}.", f"No negative eigenvalue was found with an eigenvector within {NEAR:g}° of {self.reference_name}."
        low = min(near, key=lambda row: row.eigenvalue.real)
        angle = f"{low.eigenvector_angle_deg:.1f}° from {self.reference_name}"
        return f"{text}.", f"The most negative eigenvalue, {low.eigenvalue.real:.3g}, is block {low.block}'s, its vector {angle}."

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
    post_scales: Mapping[int, PostScales] | None = None,
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
        post_scales: What the norms after each block's sublayers divide by, see `sd_lens.linearize`.
        device: Where to compute; default: where the weights are.
        seed: Seeds the singular solver and the samples.
        progress: Whether to show a progress bar; None shows one on a terminal or in a notebook once the work takes seconds.

    Returns:
        The table, three rows per block.

    Raises:
        ValueError: A block does not exist or cannot be linearised; the direction has another width.

    Example:
        >>> from sd_lens.models.loading import load, weights_of
        >>> table = directions_of(weights_of(load("tiny")), blocks=[2, 3])
        >>> table.reference_source, table.row(2, "ffn").gap > 3
        ('block 2', True)
    """
    chosen = require_options(
        weights,
        direction,
        blocks,
        norms=norms,
        inputs=inputs,
        router=router,
        post_scales=post_scales,
        estimator=estimator,
        samples=samples,
    )
    reference = None if direction is None else unit_direction(direction, weights.d_model)
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
            post_scales=None if post_scales is None else post_scales.get(block),
            device=device,
        )
        for note in block_map.notes:
            notes.setdefault(note, []).append(block)
        return block_map

    rows: list[BlockDirection] = []
    found: list[Singular] = []

    def singular(block_map: BlockMap) -> None:
        found.extend(singular_side(block_map, part, seed) for part in PARTS)

    def eigen(block_map: BlockMap) -> None:
        block = block_map.block_index
        norm = None if norms is None else norms.get(block)
        assert reference is not None
        rows.extend(direction_row(block_map, part, reference, norm) for part in found if part.block == block)

    def both(block_map: BlockMap) -> None:
        singular(block_map)
        eigen(block_map)

    source = "given"
    if reference is not None:
        each("spectra", both)
    else:
        each("singular directions", singular)
        best = max((part for part in found if part.part == "block"), key=lambda part: part.gap)
        reference, source = best.u, f"block {best.block}"
        notes.clear()
        each("eigenvalues", eigen)
        if len(chosen) < len(weights):
            notes[f"the reference is of the most singular of the blocks chosen ({_listed(chosen)})"] = chosen
    said = tuple(note if len(where) == len(chosen) else f"{note} (blocks {_listed(where)})" for note, where in notes.items())
    return BlockDirections(weights.name, reference.float().cpu(), source, tuple(rows), said, len(weights))


def require_options(
    weights: ModelWeights,
    direction: Tensor | None,
    blocks: Sequence[int] | None,
    *,
    norms: Mapping[int, float] | None,
    inputs: Inputs | Mapping[int, GaussianInput],
    router: Mapping[int, Tensor] | None,
    post_scales: Mapping[int, PostScales] | None,
    estimator: str,
    samples: int,
) -> list[int]:
    """The blocks asked for, once all options of `directions_of` have been found good: before any work.

    Raises:
        ValueError: One is not.
    """
    n = len(weights)
    if blocks is not None and not isinstance(blocks, Sequence):
        raise ValueError(f"blocks: got {blocks!r}; allowed: a list of blocks")
    chosen = list(range(n)) if blocks is None else list(blocks)
    if not chosen:
        raise ValueError("blocks: got none; allowed: at least one block")
    for block in chosen:
        if not isinstance(block, int) or not -n <= block < n:
            raise ValueError(f"blocks: got {block}; allowed: 0 to {n - 1} (or negative, from the end)")
    chosen = list(dict.fromkeys(block % n for block in chosen))
    if direction is not None:
        unit_direction(direction, weights.d_model)
    for block in chosen:
        require_inputs(by_block(inputs, block), weights.d_model)
    for name, given in (("norms", norms), ("router", router), ("post_scales", post_scales)):
        strangers = [] if given is None else [block for block in given if not 0 <= block < n]
        if strangers:
            raise ValueError(f"{name}: got block {strangers[0]}; allowed: 0 to {n - 1}")
    if norms is not None and not all(norm > 0 for norm in norms.values()):
        raise ValueError(f"norms: got {min(norms.values())}; allowed: positive numbers")
    require_estimator(estimator, samples, weights.d_model)
    return chosen


def unit_direction(direction: Tensor, d_model: int) -> Float[Tensor, "d_model"]:
    """A direction as a float64 unit vector.

    Raises:
        ValueError: It has another width, or is zero or not finite.
    """
    if not isinstance(direction, Tensor) or tuple(direction.shape) != (d_model,):
        got = f"shape {tuple(direction.shape)}" if isinstance(direction, Tensor) else type(direction).__name__
        raise ValueError(f"direction: got {got}; allowed: a tensor of shape ({d_model},), the model's width")
    norm = direction.double().norm()
    if not bool(torch.isfinite(norm)) or not float(norm) > 0:
        raise ValueError("direction: got a zero or non-finite vector; allowed: a vector with a direction")
    return direction.double() / norm


def _listed(blocks: Sequence[int]) -> str:
    return ", ".join(map(str, blocks))
