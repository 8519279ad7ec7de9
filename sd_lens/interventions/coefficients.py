"""How much of an explosion subspace is in every token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sd_lens.linear.trigger import normalised
from sd_lens.models import hook_names
from sd_lens.models.batches import Batch
from sd_lens.models.weights import BlockWeights
from sd_lens.tracing.source import Source
from sd_lens.tracing.trace import labels_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True, eq=False)
class Coefficients:
    """Coefficients of tokens on a subspace.

    Attributes:
        model_name: The model.
        block: The block.
        side: ``"trigger"``: in the normalised stream that the FFN reads, between ``-√d`` and ``√d``. ``"direction"``: in the stream that the
            block leaves.
        values: One row per token, one column per vector, float32.
        tokens: Token ids.
        prompt: Which prompt each token is in.
        position: Its position there.
        texts: The tokens as text.
    """

    model_name: str
    block: int
    side: str
    values: Float[Tensor, "token rank"]
    tokens: Int[Tensor, "token"]
    prompt: Int[Tensor, "token"]
    position: Int[Tensor, "token"]
    texts: tuple[str, ...]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per token: prompt, pos, token, id, and a column per vector, ``c0`` for the leading one."""
        frame = pd.DataFrame(
            {"prompt": self.prompt.numpy(), "pos": self.position.numpy(), "token": self.texts, "id": self.tokens.numpy()}
        )
        for number, column in enumerate(self.values.T):
            frame[f"c{number}"] = column.numpy()
        return frame

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` tokens with the largest coefficient, by magnitude, on the leading vector."""
        if k < 1:
            raise ValueError(f"k: got {k}; allowed: at least 1")
        return self.to_dataframe().sort_values("c0", key=abs, ascending=False, kind="stable").head(k).reset_index(drop=True)

    def plot(self) -> Figure:
        """Coefficients on the leading vector over positions, one point per token."""
        from sd_lens.display.figures import coefficient_scatter

        return coefficient_scatter(self)

    def __repr__(self) -> str:
        most = self.top(1).iloc[0]
        return (
            f"Coefficients({self.model_name}, {self.side} of block {self.block}: {len(self.values)} tokens, largest {most.c0:.3g} "
            f"at {most.token!r}, position {int(most.pos)})"
        )


def measure(source: Source, weights: BlockWeights, vectors: Float[Tensor, "d_model rank"], side: str) -> Coefficients:
    """Coefficients of all tokens of a source.

    Args:
        source: Where activations come from.
        weights: The block.
        vectors: Orthonormal columns.
        side: ``"trigger"`` or ``"direction"``.
    """
    block = weights.block
    points = points_of(weights, side)
    values = torch.zeros(sum(map(len, source.sequences)), vectors.shape[1])

    def on_batch(batch: Batch) -> Callable[[int, Tensor], None]:
        seen: list[Tensor] = []

        def receive(point: int, activation: Tensor) -> None:
            seen.append(activation)
            if len(seen) == len(points):
                values[batch.flat[batch.mask]] = (
                    of_stream(weights, seen, vectors, side)[batch.mask.to(activation.device)].float().cpu()
                )

        return receive

    source.run(points, on_batch, stop_at=block + 1, label="coefficients")
    return Coefficients(
        model_name=str(getattr(source.model.cfg, "model_name", "model")),
        block=block,
        side=side,
        values=values,
        **labels_of(source.sequences, source.model),
    )


def points_of(weights: BlockWeights, side: str) -> list[str]:
    """Hook points that coefficients can be computed from on any architecture."""
    if side == "direction":
        return [hook_names.resid_post(weights.block)]
    return hook_names.entering_ffn(weights.block, parallel=weights.parallel)


def of_stream(
    weights: BlockWeights, activations: list[Tensor], vectors: Float[Tensor, "d_model rank"], side: str
) -> Float[Tensor, "*batch rank"]:
    """Coefficients from what stands at `points_of`."""
    stream = activations[0] if len(activations) == 1 else sum(activations[1:], activations[0])
    x = stream.to(torch.promote_types(stream.dtype, torch.float32)) if side == "direction" else normalised(weights.ffn, stream)
    return x @ vectors.to(x)
