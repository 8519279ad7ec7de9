"""The paper's path, without sd_lens: samples, least squares, dense decompositions; and its extrapolation where it does not fit."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks.linear.blocks import SHAPES, PlantedBlock, Shape, planted_block
from benchmarks.linear.paths import Found, PathRun
from benchmarks.linear.timing import Stages
from benchmarks.memory import PeakMemory

NEURONS, LSTSQ, DENSE, SVD, EIG = "samples and their neurons", "least squares", "dense A, F, L", "3 full SVDs", "full eig"
_FIT, _DECOMPOSITIONS = (NEURONS, LSTSQ), (SVD, EIG)
# Its matrices stay for seconds, and what looks at the memory must not take time from what is timed. (Ours is timed without.)
_SELDOM = 0.02


@dataclass(frozen=True, kw_only=True)
class Sampled(PathRun):
    """What the sampled path took: time and memory for all samples, the error with the last of ``run_with``.

    Attributes:
        samples: How many samples it stands for.
        run_with: The numbers of samples really run: ``(samples,)``, or the two that were extrapolated from.
        decomposed: Width of the matrices really decomposed: the block's, or a smaller one whose times were extrapolated.
        found: The numbers, with the last ``Ã``; None where only parts of the matrices were decomposed.
    """

    samples: int
    run_with: tuple[int, ...]
    decomposed: int
    found: Found | None

    @property
    def fewer(self) -> bool:
        """Whether it was run with fewer samples than it stands for."""
        return self.run_with[-1] < self.samples

    @property
    def partly(self) -> bool:
        """Whether only parts of the matrices were decomposed."""
        return self.found is None

    def extrapolated(self, stage: str) -> bool:
        """Whether a stage's time is not of a run."""
        return (stage in _FIT and self.fewer) or (stage in _DECOMPOSITIONS and self.partly)


def run_sampled(shape: Shape, *, samples: int, device: str = "cpu", quick: bool = False, label: str = "sampled path") -> Sampled:
    """The sampled path on the same random block.

    Args:
        shape: The block's sizes.
        samples: How many.
        device: Where it runs.
        quick: Whether to extrapolate whatever can be: from fewer samples, and from decompositions of half the width.
        label: Name on the progress bar.
    """
    warm = planted_block(SHAPES["tiny"], device=device)
    _decomposed(dense_maps(warm, _fit(warm, 256, Stages(device))), warm.direction, Stages(device))
    block = planted_block(shape, device=device)
    run_with = sample_sizes(shape, samples, _available(device), quick)
    width = shape.d_model // 2 if quick else shape.d_model
    gc.collect()
    start = PeakMemory(device).now()
    fit, times, peaks = torch.empty(0), [], []
    with tqdm(total=2 * len(run_with) + 5, desc=label, unit="stage", leave=False) as bar:
        stage = Stages(device, bar)
        for size in run_with:
            del fit  # of the last size
            stage.seconds = defaultdict(float)
            with PeakMemory(device, every=_SELDOM) as memory:
                fit = _fit(block, size, stage)
            times.append(stage.seconds)
            peaks.append(memory.peak - start)
        stage.seconds = defaultdict(float)
        with PeakMemory(device, every=_SELDOM) as memory:
            with stage(DENSE):
                dense = dense_maps(block, fit)
            direction = F.normalize(block.direction[:width], dim=0)
            found = _decomposed([matrix[:width, :width] for matrix in dense], direction, stage)
    del dense
    seconds = {name: extrapolated(run_with, [one[name] for one in times], samples) for name in _FIT}
    cubic = (shape.d_model / width) ** 3
    seconds |= {name: (cubic if name in _DECOMPOSITIONS else 1.0) * one for name, one in stage.seconds.items()}
    return Sampled(
        seconds=seconds,
        peak=max(int(extrapolated(run_with, peaks, samples)), memory.peak - start),
        fit_error=block.fit_error(fit),
        cores=stage.cores,
        samples=samples,
        run_with=run_with,
        decomposed=width,
        found=None if quick else found,
    )


def sample_sizes(shape: Shape, samples: int, available: float, quick: bool = False) -> tuple[int, ...]:
    """The numbers of samples to run with: all where three matrices of neurons fit into the bytes available, else two smaller ones."""
    need = 4 * samples * (shape.d_model + 3 * shape.d_mlp)
    if not quick and need <= 0.75 * available:
        return (samples,)
    fewer = max(2 * shape.d_model, samples // (10 if quick else 5))
    return (samples,) if 2 * fewer >= samples else (fewer, 2 * fewer)


def extrapolated(sizes: Sequence[int], values: Sequence[float], size: int) -> float:
    """What is linear in the number of samples, along the line through two points; itself where there is one point."""
    if len(sizes) == 1:
        return values[0]
    slope = (values[1] - values[0]) / (sizes[1] - sizes[0])
    return values[1] + slope * (size - sizes[1])


def dense_maps(block: PlantedBlock, fit: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``I + A``, ``I + F``, ``L`` and ``R``."""
    d, _, heads, kv_heads, d_head = block.shape
    value = block.value.view(kv_heads, 1, d_head, d).expand(kv_heads, heads // kv_heads, d_head, d).reshape(heads * d_head, d)
    eye = torch.eye(d, device=fit.device)
    attention = eye + (block.output @ value) * block.attention_gain
    ffn = eye + (block.down @ fit) * block.ffn_gain
    whole = ffn @ attention
    return attention, ffn, whole, whole - eye


def _available(device: str) -> int:
    return psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0]


def _fit(block: PlantedBlock, samples: int, stage: Stages) -> Tensor:
    """``Ã`` from samples, all at once."""
    with stage(NEURONS):
        generator = torch.Generator(block.gate.device).manual_seed(1)
        x = torch.randn(samples, block.shape.d_model, generator=generator, device=block.gate.device)
        h = F.silu(x @ block.gate.T) * (x @ block.up.T)
    with stage(LSTSQ):
        # The solution is a view of all of the solver's memory, which a copy lets go.
        return torch.linalg.lstsq(x, h, driver="gels").solution.T.contiguous()


def _decomposed(dense: Sequence[Tensor], direction: Tensor, stage: Stages) -> Found:
    triplets = []
    for matrix in dense[:3]:
        with stage(SVD):
            u, s, _ = torch.linalg.svd(matrix)
        triplets.append((float(s[0]), u[:, 0].clone()))
        del u, s
    with stage(EIG):
        values, vectors = torch.linalg.eig(dense[3])
        nearest = int((direction.to(vectors.dtype) @ vectors).abs().argmax())
    return Found.of(triplets, complex(values[nearest].item()), vectors[:, nearest], direction)
