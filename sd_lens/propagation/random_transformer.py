"""A small transformer with random weights, whose mask and positions can be left out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sd_lens.models.precision import PRECISIONS
from sd_lens.propagation.arguments import chosen, require_heads
from sd_lens.propagation.positions import POSITIONS, Positions, placed_pattern, rotate, sinusoids
from sd_lens.tracing.arguments import require_seed, require_whole

_DIGITS = 10


@dataclass(frozen=True, eq=False)
class KeyValues:
    """What later tokens need of earlier ones, for one block: keys (rotated where the model rotates) and values."""

    keys: Float[Tensor, "head pos d_head"]
    values: Float[Tensor, "head pos d_head"]

    def first(self, n: int) -> KeyValues:
        """Of the first tokens only."""
        return KeyValues(self.keys[:, :n], self.values[:, :n])


@dataclass(frozen=True, eq=False)
class _Block:
    """Weights of one block; vectors stand on the left: ``x @ weight``."""

    qkv: Float[Tensor, "d_model three_d_model"]
    out: Float[Tensor, "d_model d_model"]
    up: Float[Tensor, "d_model d_ffn"]
    down: Float[Tensor, "d_ffn d_model"]


class RandomTransformer:
    """A pre-norm transformer with random weights: layer norms, attention, FFNs four times as wide with GELU, a final layer norm.

    Its vocabulary are the ten digits. Weights are normal with variance one over the number of inputs, embeddings standard normal; they are
    drawn in float64 and then rounded, so that a seed means the same model in every precision.
    """

    def __init__(
        self,
        *,
        positions: Positions = "nope",
        causal: bool = True,
        n_layers: int = 3,
        d_model: int = 32,
        n_heads: int = 4,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        weights_like: torch.dtype | None = None,
    ):
        """Draws the weights.

        Args:
            positions: Positional encoding: ``"nope"``, ``"sinusoidal"`` (added to the embeddings), ``"rope"``, ``"alibi"``.
            causal: Whether tokens see no later ones.
            n_layers: Number of blocks.
            d_model: Width.
            n_heads: Attention heads per block; each must be left an even width.
            seed: Of the weights.
            dtype: Precision that it runs in.
            weights_like: Precision that its weights are rounded to before; default: `dtype`.

        Raises:
            ValueError: An argument is none of those.
        """
        chosen("positions", [positions], tuple(POSITIONS))
        chosen("dtype", [dtype], tuple(PRECISIONS.values()))
        require_whole("n_layers", n_layers, 1)
        require_heads(n_heads, d_model)
        require_seed(seed)
        self.positions: Positions = positions
        self.causal, self.n_heads, self.d_model, self.dtype = causal, n_heads, d_model, dtype
        generator = torch.Generator().manual_seed(seed)

        def normal(rows: int, columns: int, scale: float) -> Tensor:
            return (
                (scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64)).to(weights_like or dtype).to(dtype)
            )

        self._embedding = normal(_DIGITS, d_model, 1.0)
        narrow, wide = d_model**-0.5, (4 * d_model) ** -0.5
        self._blocks = [
            _Block(
                normal(d_model, 3 * d_model, narrow),
                normal(d_model, d_model, narrow),
                normal(d_model, 4 * d_model, narrow),
                normal(4 * d_model, d_model, wide),
            )
            for _ in range(n_layers)
        ]

    def __call__(self, digits: str) -> Float[Tensor, "pos d_model"]:
        """Representations after the final norm.

        Args:
            digits: The tokens, such as ``"1100"``.
        """
        return self.run(digits)[0]

    def run(self, digits: str, past: list[KeyValues] | None = None) -> tuple[Float[Tensor, "pos d_model"], list[KeyValues]]:
        """Representations after the final norm, and what later tokens need.

        Args:
            digits: The tokens, such as ``"1100"``.
            past: What ``run`` gave for the tokens before; only with a causal mask.

        Raises:
            ValueError: The tokens are no digits.
        """
        ids = digit_ids("digits", digits)
        before = past[0].keys.shape[1] if past else 0
        at = torch.arange(before, before + len(ids))
        stream = self._embedding[ids]
        if self.positions == "sinusoidal":
            stream = stream + sinusoids(at, self.d_model).to(self.dtype)
        kept = []
        for number, block in enumerate(self._blocks):
            mixed, remembered = self._attention(block, self._norm(stream), at, past[number] if past else None)
            stream = stream + mixed
            stream = stream + F.gelu(self._norm(stream) @ block.up) @ block.down
            kept.append(remembered)
        return self._norm(stream), kept

    def _norm(self, stream: Tensor) -> Tensor:
        return F.layer_norm(stream, (self.d_model,))

    def _attention(
        self, block: _Block, normed: Float[Tensor, "pos d_model"], at: Int[Tensor, "pos"], past: KeyValues | None
    ) -> tuple[Tensor, KeyValues]:
        split = (normed @ block.qkv).unflatten(1, (3, self.n_heads, -1)).permute(1, 2, 0, 3)
        queries, keys, values = split.unbind(0)
        if self.positions == "rope":
            queries, keys = rotate(queries, at), rotate(keys, at)
        if past is not None:
            keys, values = torch.cat([past.keys, keys], 1), torch.cat([past.values, values], 1)
        pattern = placed_pattern(
            queries, keys, at, torch.arange(keys.shape[1]), alibi=self.positions == "alibi", causal=self.causal
        )
        mixed = (pattern @ values).transpose(0, 1).flatten(1)
        return mixed @ block.out, KeyValues(keys, values)


def digit_ids(argument: str, digits: Any) -> Int[Tensor, "pos"]:
    """Digits as token ids.

    Args:
        argument: What they are called.
        digits: A string of digits.

    Raises:
        ValueError: It is none, or empty.
    """
    if not isinstance(digits, str) or not digits or not set(digits) <= set("0123456789"):
        raise ValueError(f"{argument}: got {digits!r}; allowed: a string of digits 0 to 9")
    return torch.tensor([int(digit) for digit in digits])


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference of two vectors' elements (L∞)."""
    difference = float((a.double() - b.double()).abs().max())
    return difference if math.isfinite(difference) else math.nan
