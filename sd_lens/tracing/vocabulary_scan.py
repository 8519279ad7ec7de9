"""What a scan of the vocabulary found: a norm and a coefficient per token id, and how to read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sd_lens.models.tokens import decode_each
from sd_lens.tracing.trace import require_ratio

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Pathway = Literal["initial", "no_attention", "second"]
PATHWAYS = ("initial", "no_attention", "second")


@dataclass(frozen=True)
class VocabularyScan:
    """Every token id in one and the same place, up to one block.

    Attributes:
        model_name: The model.
        pathway: ``"initial"``: alone, at position 0; ``"no_attention"``: the same with what attention adds left out; ``"second"``: after
            a random other id.
        block: The block after which norms are taken, and at whose FFN coefficients are.
        ids: The token ids scanned.
        norms: Norm of each id's stream after the block.
        coefficients: Coefficient of each id's normalised FFN input at the block on the leading right singular vector of that FFN's map;
            positive on the side that the FFN answers to more. NaN where the FFN could not be linearised.
        trained: False at ids whose embedding says that they were never trained: they are scanned, but not ranked or counted.
        reference: Median norm after the block of ordinary tokens, those after the first of their prompt, in the prompts run through the
            model as it is. Ratios are to this number on every pathway.
        control: Norms of random embeddings in the ids' place; None where none were asked for.
        explosion_found: Whether the prompts showed a block in which norms explode.
        notes: What the numbers rest on.
        min_ratio: Least ratio of an id that explodes.
        seed: Of the random embeddings, and of the other ids.
        others: On the pathway ``"second"`` the id that each comes after, else None.
        initial_norms: On that pathway also the norm of each id at position 0.
        initial_coefficients: Likewise the coefficient.
        tokenizer: The model's, if any.
    """

    model_name: str
    pathway: Pathway
    block: int
    ids: Int[Tensor, "id"]
    norms: Float[Tensor, "id"]
    coefficients: Float[Tensor, "id"]
    trained: Bool[Tensor, "id"]
    reference: float
    control: Float[Tensor, "sample"] | None
    explosion_found: bool
    notes: tuple[str, ...]
    min_ratio: float
    seed: int
    others: Int[Tensor, "id"] | None = None
    initial_norms: Float[Tensor, "id"] | None = None
    initial_coefficients: Float[Tensor, "id"] | None = None
    tokenizer: Any = field(default=None, repr=False, compare=False)

    @property
    def ratios(self) -> Float[Tensor, "id"]:
        """Norms relative to `reference`."""
        return self.norms / self.reference

    @property
    def share_exploding(self) -> float:
        """The fraction of trained ids that reach `min_ratio`; NaN where no id was trained."""
        return float((self.ratios[self.trained] >= self.min_ratio).float().mean())

    @property
    def control_share(self) -> float:
        """The fraction of random embeddings that reach it; NaN where there are none."""
        if self.control is None:
            return float("nan")
        return float((self.control / self.reference >= self.min_ratio).float().mean())

    def self_exploding(self, min_ratio: float | None = None) -> pd.DataFrame:
        """The trained ids that explode in this place, largest norm first.

        Args:
            min_ratio: Least ratio; default: the scan's.

        Returns:
            One row per id, as `top` gives them.

        Raises:
            ValueError: The ratio is not above 1.
        """
        least = self.min_ratio if min_ratio is None else min_ratio
        require_ratio(least)
        order = self._ranked(self.norms)
        return self._table(order[self.ratios[order] >= least])

    def top(self, k: int = 20, *, by: Literal["norm", "coefficient"] = "norm") -> pd.DataFrame:
        """The trained ids that come first.

        Args:
            k: How many.
            by: ``"norm"`` or ``"coefficient"``.

        Returns:
            One row per id: rank, id, token, norm, ratio, coefficient; on the pathway ``"second"`` also after (the token it came after),
            initial_norm, initial_ratio and initial_coefficient.

        Raises:
            ValueError: ``k`` is below 1, or there is nothing of this name to rank by.
        """
        if k < 1:
            raise ValueError(f"k: got {k}; allowed: at least 1")
        if by not in ("norm", "coefficient"):
            raise ValueError(f"by: got {by!r}; allowed: 'norm', 'coefficient'")
        if by == "coefficient" and bool(self.coefficients.isnan().any()):
            raise ValueError("by: got 'coefficient' of a scan without coefficients (see its notes); allowed: 'norm'")
        return self._table(self._ranked(self.norms if by == "norm" else self.coefficients)[:k])

    def to_dataframe(self) -> pd.DataFrame:
        """One row per id scanned, in the order of the scan: the columns of `top` but for the rank, and whether it was trained."""
        every = torch.arange(len(self.ids))
        return self._table(every).drop(columns="rank").assign(trained=self.trained.numpy())

    def texts(self, ids: Sequence[int]) -> list[str]:
        """Token ids as text, each on its own."""
        return decode_each(self, ids)

    def plot(self) -> Figure:
        """Norms over token ids, beside those of random embeddings, the largest named."""
        from sd_lens.display.figures import scan_scatter

        return scan_scatter(self)

    def _ranked(self, values: Tensor) -> Tensor:
        """Places of the trained ids in the scan, largest value first."""
        trained = self.trained.nonzero().flatten()
        return trained[values[trained].argsort(descending=True, stable=True)]

    def _table(self, places: Tensor) -> pd.DataFrame:
        ids = self.ids[places]
        columns = {
            "rank": range(1, len(places) + 1),
            "id": ids.numpy(),
            "token": self.texts(ids.tolist()),
            "norm": self.norms[places].numpy(),
            "ratio": self.ratios[places].numpy(),
            "coefficient": self.coefficients[places].numpy(),
        }
        if self.others is not None and self.initial_norms is not None and self.initial_coefficients is not None:
            columns["after"] = self.texts(self.others[places].tolist())
            columns["initial_norm"] = self.initial_norms[places].numpy()
            columns["initial_ratio"] = (self.initial_norms[places] / self.reference).numpy()
            columns["initial_coefficient"] = self.initial_coefficients[places].numpy()
        return pd.DataFrame(columns)

    def __repr__(self) -> str:
        trained = self.ratios[self.trained]
        parts = [
            f"{int((trained >= self.min_ratio).sum())} of {len(trained)} trained ids reach {self.min_ratio:g} times the ordinary norm "
            f"after block {self.block}"
        ]
        if self.control is not None:
            parts.append(f"random embeddings {100 * self.control_share:.3g} %")
        if not self.explosion_found:
            parts.append("no explosion in the prompts up to there")
        return f"VocabularyScan({self.model_name}, {self.pathway}: {'; '.join(parts)})"

    def _repr_html_(self) -> str:
        return self.plot()._repr_html_()
