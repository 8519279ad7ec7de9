"""Our path: closed form and Krylov solvers, no matrix but the weights."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.linear.blocks import SHAPES, PlantedBlock, Shape, planted_block
from benchmarks.linear.paths import Found, PathRun
from benchmarks.linear.timing import Stages, fastest, timed
from benchmarks.memory import PeakMemory
from sd_lens.linear.linearize import linearize
from sd_lens.linear.maps import IdentityPlus, LinearMap
from sd_lens.linear.spectra import eigen_nearest, leading_singular

LINEARIZE, ATTENTION, FFN, BLOCK, EIGEN = "linearise", "triplet of I + A", "triplet of I + F", "triplet of L", "eigenpair of R"


@dataclass(frozen=True, kw_only=True)
class Ours(PathRun):
    """What our path took: time and cores in the fastest run.

    Attributes:
        products: How many products each stage asked for.
        in_products: Which part of each stage's time they took, in a run of their own.
        product: Seconds of one product with the block's map: one read of its weights.
        weight_bytes: What it reads.
        plain_read: Seconds that a sum over as many bytes takes, which is as fast as they can be read.
        without_defect: Seconds and products of one run on a block of the same shape in which nothing was planted.
        found: The numbers.
    """

    products: dict[str, int]
    in_products: dict[str, float]
    product: float
    weight_bytes: int
    plain_read: float
    without_defect: tuple[float, int]
    found: Found

    @property
    def reads(self) -> float:
        """How many reads of the block's weights our time is worth."""
        return self.total / self.product


class _Counted(LinearMap):
    """A map that counts its products and the time they take."""

    def __init__(self, inner: LinearMap, device: str):
        self._inner, self._device = inner, device
        self.products, self.seconds = 0, 0.0

    @property
    def like(self) -> Tensor:
        return self._inner.like

    @property
    def d_model(self) -> int:
        return self._inner.d_model

    def mv(self, x: Tensor) -> Tensor:
        return self._timed(self._inner.mv, x)

    def rmv(self, y: Tensor) -> Tensor:
        return self._timed(self._inner.rmv, y)

    def _timed(self, product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        out, seconds = timed(lambda: product(x), self._device)
        self.products, self.seconds = self.products + 1, self.seconds + seconds
        return out


def run_ours(shape: Shape, *, device: str = "cpu") -> Ours:
    """Our path on a random block."""
    _path(planted_block(SHAPES["tiny"], device=device), Stages(device))  # torch warm
    block = planted_block(shape, device=device)
    weights = block.weights()
    gc.collect()
    with PeakMemory(device) as memory:
        found = _path(block, Stages(device))
    runs = [Stages(device) for _ in range(3)]
    for stage in runs:
        _path(block, stage)
    best = min(runs, key=lambda stage: stage.total)
    stage, counted = _counting(block, device)
    plain_stage, plain_counted = _counting(planted_block(shape, device=device, planted=False), device)
    weight_bytes = sum(tensor.nbytes for _, tensor in weights.named_tensors())
    update = linearize(weights).update
    return Ours(
        seconds=best.seconds,
        peak=memory.beyond,
        fit_error=block.fit_error(block.closed_form(torch.float32)),
        cores=best.cores,
        products={name: one.products for name, one in counted.items()},
        in_products={name: one.seconds / stage.seconds[name] for name, one in counted.items()},
        product=fastest(lambda: update.mv(block.direction), device),
        weight_bytes=weight_bytes,
        plain_read=fastest(block.down.sum, device) * weight_bytes / block.down.nbytes,
        without_defect=(plain_stage.total, sum(one.products for one in plain_counted.values())),
        found=found,
    )


def _counting(block: PlantedBlock, device: str) -> tuple[Stages, dict[str, _Counted]]:
    """One run with its products counted, which takes a little time from it."""
    counted: dict[str, _Counted] = {}

    def wrap(name: str, linear_map: LinearMap) -> LinearMap:
        return counted.setdefault(name, _Counted(linear_map, device))

    stage = Stages(device)
    _path(block, stage, wrap)
    return stage, counted


def _path(block: PlantedBlock, stage: Stages, wrap: Callable[[str, LinearMap], LinearMap] = lambda _, plain: plain) -> Found:
    weights = block.weights()
    with stage(LINEARIZE):
        maps = linearize(weights)
    triplets = []
    for name, linear_map in ((ATTENTION, IdentityPlus(maps.attention)), (FFN, IdentityPlus(maps.ffn)), (BLOCK, maps.block)):
        with stage(name):
            u, s, _ = leading_singular(wrap(name, linear_map))
        triplets.append((float(s[0]), u[:, 0]))
    with stage(EIGEN):
        pair = eigen_nearest(wrap(EIGEN, maps.update), block.direction)
    return Found.of(triplets, pair.value, pair.vector, block.direction)
