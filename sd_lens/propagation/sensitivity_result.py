"""How much one position's output depends on every token before it: the result of `sensitivity`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pandas as pd
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sd_lens.propagation.jacobians import Output

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Norm = Literal["frobenius", "spectral"]


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Norms of Jacobians: of one position's output, with respect to the vector of every token in the stream entering some blocks.

    Attributes:
        model_name: The model.
        of: What is differentiated: ``"final"``, ``"logits"``, or the block whose output stream it is.
        position: The position whose output it is, from 0.
        sources: The blocks whose input is differentiated by; 0 is the embedding.
        frobenius: Frobenius norms, exact or estimated; 0 after ``position``, NaN where they were not asked for.
        spectral: Largest singular values; NaN where they were not asked for or the norms are estimated.
        standard_error: Of ``frobenius``; 0 where it is exact.
        stream_norm: Norm of what is differentiated by, the token's vector in the stream.
        tokens: Token ids of the prompt.
        texts: Each token as text.
        high_norm: Which tokens have a high norm after some block.
        sinks: Which tokens are attention sinks.
        method: ``"exact"`` or ``"hutchinson"``.
        n_products: How many vector-Jacobian products it took: of an estimate, the random probes.
        intervention: Name of the intervention during the run; None where there was none. The marks are those of the model without it.
        notes: What has to be known to read it.
    """

    model_name: str
    of: Output
    position: int
    sources: tuple[int, ...]
    frobenius: Float[Tensor, "source pos"]
    spectral: Float[Tensor, "source pos"]
    standard_error: Float[Tensor, "source pos"]
    stream_norm: Float[Tensor, "source pos"]
    tokens: Int[Tensor, "pos"]
    texts: tuple[str, ...]
    high_norm: Bool[Tensor, "pos"]
    sinks: Bool[Tensor, "pos"]
    method: str
    n_products: int
    intervention: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> Float[Tensor, "source pos"]:
        """Each token's part of the sum of squared Frobenius norms over all tokens, for every source."""
        squares = self.frobenius.square()
        return squares / squares.sum(1, keepdim=True)

    @property
    def relative(self) -> Float[Tensor, "source pos"]:
        """Frobenius norm times the norm of the token's vector: the answer to a change relative to the vector's length.

        A norm before a sublayer divides by the length of what it reads, so a token with a high norm is felt less per unit, and no less
        per share of its length.
        """
        return self.frobenius * self.stream_norm

    @property
    def of_name(self) -> str:
        """What is differentiated, in words."""
        return {"final": "final representation", "logits": "logits"}.get(str(self.of), f"stream after block {self.of}")

    def to_dataframe(self) -> pd.DataFrame:
        """One row per source and token up to ``position``: source, pos, token, id, frobenius, standard_error, spectral, share, stream_norm, relative, high_norm, sink."""
        n = self.position + 1
        n_sources = len(self.sources)
        columns: dict[str, object] = {
            "source": [source for source in self.sources for _ in range(n)],
            "pos": list(range(n)) * n_sources,
            "token": list(self.texts[:n]) * n_sources,
            "id": self.tokens[:n].tolist() * n_sources,
        }
        for name in ("frobenius", "standard_error", "spectral", "share", "stream_norm", "relative"):
            columns[name] = getattr(self, name)[:, :n].flatten().numpy()
        columns["high_norm"] = self.high_norm[:n].tolist() * n_sources
        columns["sink"] = self.sinks[:n].tolist() * n_sources
        return pd.DataFrame(columns)

    def plot(self) -> Figure:
        """One source: a bar per token on a log scale, marks in colour; several: a heat map, sources against tokens."""
        from sd_lens.display.figures import sensitivity_figure

        return sensitivity_figure(self)

    def __repr__(self) -> str:
        how = "" if self.method == "exact" else f", estimated from {self.n_products} probes"
        under = "" if self.intervention is None else f", {self.intervention}"
        blocks = ", ".join(map(str, self.sources))
        shown = self.frobenius if not bool(self.frobenius.isnan().all()) else self.spectral
        most = int(shown[0].argmax())
        return (
            f"Sensitivity({self.model_name}{under}: {self.of_name} at position {self.position} to the input of block {blocks}, "
            f"most to {self.texts[most]!r} at {most}{how})"
        )
