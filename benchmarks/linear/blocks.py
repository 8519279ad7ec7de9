"""Blocks with random weights, a defect planted in them, and the truth about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sd_lens.linear.gaussian import fit_ffn
from sd_lens.models.activations import KNOWN
from sd_lens.models.weights import AttentionWeights, BlockWeights, FFNWeights, NormWeights, split_heads

# How strongly a planted neuron reads and writes; a random one does both with norm 1.
_READS, _WRITES = 2.0, 20.0


class Shape(NamedTuple):
    """Sizes of a Llama block."""

    d_model: int
    d_mlp: int
    heads: int
    kv_heads: int
    d_head: int


SHAPES = {
    "tiny": Shape(64, 172, 4, 2, 16),
    "160M": Shape(768, 2048, 12, 12, 64),
    "1B": Shape(2048, 8192, 32, 8, 64),
    "8B": Shape(4096, 14336, 32, 8, 128),
}


@dataclass(frozen=True)
class PlantedBlock:
    """A block's weights in Hugging Face layout (rows are outputs), and the direction planted in them."""

    shape: Shape
    gate: Tensor
    up: Tensor
    down: Tensor
    value: Tensor
    output: Tensor
    attention_gain: Tensor
    ffn_gain: Tensor
    direction: Tensor

    def weights(self) -> BlockWeights:
        """The block as sd_lens has it of a live model: views."""
        value = split_heads(self.value.T, self.shape.kv_heads)
        output = rearrange(self.output.T, "(heads d_head) d_model -> heads d_head d_model", heads=self.shape.heads)
        norm = NormWeights("rms", self.attention_gain, None, 1e-5)
        return BlockWeights(0, AttentionWeights(value, output, None, None, norm), self._ffn(torch.float32), parallel=False)

    def closed_form(self, dtype: torch.dtype) -> Tensor:
        """``Ã`` for infinitely many samples, as a matrix."""
        fit = fit_ffn(self._ffn(dtype))
        assert fit.W_gate is not None
        assert fit.gate_coefficient is not None
        # Not fit.to_dense(), which multiplies by an identity matrix: minutes at the largest shape.
        return (fit.W_in * fit.in_coefficient).addcmul_(fit.W_gate, fit.gate_coefficient).mT

    def fit_error(self, found: Tensor) -> float:
        """Relative Frobenius error of an ``Ã`` against its closed form in float64."""
        exact = self.closed_form(torch.float64)
        scale = torch.linalg.vector_norm(exact)
        return float(torch.linalg.vector_norm(exact.sub_(found)) / scale)

    def _ffn(self, dtype: torch.dtype) -> FFNWeights:
        gate, up, down = (matrix.to(dtype).T for matrix in (self.gate, self.up, self.down))
        norm = NormWeights("rms", self.ffn_gain.to(dtype), None, 1e-5)
        return FFNWeights(up, down, gate, None, None, None, KNOWN["silu"], norm)


def planted_block(shape: Shape, *, device: str = "cpu", planted: bool = True) -> PlantedBlock:
    """Random weights, the same every time, with a defect planted in the FFN unless they are to be left as they are."""
    generator = torch.Generator().manual_seed(0)
    d, m = shape.d_model, shape.d_mlp
    gate, up, down = (random_matrix(*size, generator) for size in ((m, d), (m, d), (d, m)))
    value = random_matrix(shape.kv_heads * shape.d_head, d, generator)
    output = random_matrix(d, shape.heads * shape.d_head, generator)
    trigger, direction = random_directions(d, generator)
    gains = [random_gain(d, generator) for _ in range(2)]
    if planted:
        plant(gate, up, down, trigger, direction)
    return PlantedBlock(shape, *(one.to(device) for one in (gate, up, down, value, output, *gains, direction)))


def random_matrix(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A matrix whose rows have norm 1 on average."""
    # In place, so that no freed copy lies in the process's heap when its memory is measured.
    return torch.randn(rows, columns, generator=generator).mul_(columns**-0.5)


def random_gain(d_model: int, generator: torch.Generator) -> Tensor:
    """A norm's gain, near 1."""
    return 1 + 0.1 * torch.randn(d_model, generator=generator)


def random_directions(d_model: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A trigger and a direction, of norm 1."""
    trigger, direction = (F.normalize(torch.randn(d_model, generator=generator), dim=0) for _ in range(2))
    return trigger, direction


def plant(gate: Tensor, up: Tensor, down: Tensor, trigger: Tensor, direction: Tensor) -> None:
    """Writes into an FFN a neuron that writes the direction when it sees the trigger, and one that takes it away when it sees it."""
    for neuron, (reads, sign) in enumerate(((trigger, 1.0), (direction, -1.0))):
        gate[neuron] = up[neuron] = _READS * reads
        down[:, neuron] = sign * _WRITES * direction
