"""What `squashing_bound` found: the bound over positions and depth, and the constants it stands on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sd_lens.propagation.sensitivity_result import Norm, Sensitivity
from sd_lens.tracing.arguments import require_whole

if TYPE_CHECKING:
    import plotly.graph_objects as go

Which = Literal["theorem", "token"]


@dataclass(frozen=True)
class BlockConstants:
    """The theorem's constants of one block, and what they are made of.

    Attributes:
        block: The block.
        beta1: ``β1``: attention counts as ``Λ / β1``. Where it is measured, ``norm_scale / (head_factor * post_gain)``.
        norm_scale: Smallest scale that the norm before attention divides a token by; 1 where there is none.
        head_factor: What the heads' output and value weights, with that norm's gain, stretch ``Λ`` by.
        post_gain: Largest spectral norm of the Jacobian of a norm after attention, times the scale of attention's output; 1 without these.
        beta2: ``β2``, smallest scale that the norm before the FFN divides a token by; 1 where there is none.
        sigma_psi: ``σψ``, largest over tokens of scale times norm of the FFN's Jacobian: the norm taken over what normalised vectors can
            differ in.
        ffn_gain: What counts as ``σψ/β2``: the largest spectral norm of the FFN's Jacobian, which is at most the quotient of both; the
            quotient where one of them was given.
    """

    block: int
    beta1: float
    norm_scale: float
    head_factor: float
    post_gain: float
    beta2: float
    sigma_psi: float
    ffn_gain: float


@dataclass(frozen=True, eq=False)
class SquashingBound:
    """A bound on the Jacobian of one token's final representation with respect to the streams that enter the blocks.

    Depth ``d`` has walked back through the last ``d`` blocks: it is about the stream that enters block ``n_blocks - d``, and the last depth
    about what enters block 0. Products over many blocks overflow, so they are kept as shares that add up to 1 over positions, and logarithms.

    Attributes:
        model_name: The model.
        heads: What ``Λ`` is of the heads' patterns.
        position: The token, counted from 0.
        tokens: Token ids of the prompt.
        texts: Each token as text.
        constants: One row per block.
        beta3: ``β3``, of the final norm.
        given: Which constants the caller gave; all others are measured.
        intervention: What edited the run, if anything.
        shares: Each position's share of ``Π_l (Λ_l/β1 + I)``'s row.
        log10_weight: Logarithm of that row's sum.
        log10_constant: Logarithm of ``C``, of the blocks walked through.
        token_shares: The same shares where every token has its own constants.
        log10_token_bound: Logarithm of the sum over positions of the bound with such constants.
    """

    model_name: str
    heads: str
    position: int
    tokens: Int[Tensor, "pos"]
    texts: tuple[str, ...]
    constants: tuple[BlockConstants, ...]
    beta3: float
    given: tuple[str, ...]
    intervention: str | None
    shares: Float[Tensor, "depth pos"]
    log10_weight: Float[Tensor, "depth"]
    log10_constant: Float[Tensor, "depth"]
    token_shares: Float[Tensor, "depth pos"]
    log10_token_bound: Float[Tensor, "depth"]

    @property
    def n_blocks(self) -> int:
        """How many blocks there are."""
        return len(self.constants)

    @property
    def rows(self) -> Float[Tensor, "depth pos"]:
        """The row of ``Π_l (Λ_l/β1 + I)`` after every number of blocks; infinite where float64 cannot hold it."""
        return self.shares * 10 ** self.log10_weight.unsqueeze(-1)

    @property
    def path_weights(self) -> Float[Tensor, "pos"]:
        """The row after all blocks: the weight of all paths from each input token, without ``C``."""
        return self.rows[-1]

    @property
    def bound(self) -> Float[Tensor, "pos"]:
        """The bound on ``‖∂y_n/∂v_i‖`` for each input token; infinite where float64 cannot hold it."""
        return 10 ** self.log10_bound[-1]

    @property
    def token_bound(self) -> Float[Tensor, "pos"]:
        """The bound with constants of every token's own, which is at most `bound`."""
        return 10 ** self.log10_bounds("token")[-1]

    @property
    def log10_bound(self) -> Float[Tensor, "depth pos"]:
        """Logarithm of the theorem's bound, over depth; ``-inf`` at positions that no path starts from."""
        return self.log10_bounds("theorem")

    def log10_bounds(self, which: Which) -> Float[Tensor, "depth pos"]:
        """Logarithm of a bound, over depth.

        Args:
            which: ``"theorem"``, or ``"token"`` where every token has its own constants.
        """
        shares = self._of(which)
        whole = self.log10_weight + self.log10_constant if which == "theorem" else self.log10_token_bound
        return shares.log10() + whole.unsqueeze(-1)

    def _of(self, which: Which) -> Tensor:
        if which not in ("theorem", "token"):
            raise ValueError(f"which: got {which!r}; allowed: 'theorem', 'token'")
        return self.shares if which == "theorem" else self.token_shares

    def first_column(self, depth: int = -1, *, which: Which = "theorem") -> float:
        """The first token's share of the row after some number of blocks, which Proposition 5.2 says tends to 1.

        Args:
            depth: How many of the last blocks; -1 for all of them.
            which: Of the theorem's row, or of that with constants of every token's own.

        Raises:
            ValueError: There are not so many blocks.
        """
        if depth != -1:
            require_whole("depth", depth, 0, self.n_blocks)
        return float(self._of(which)[depth, 0])

    def correlation(
        self, sensitivity: Sensitivity, *, norm: Norm = "frobenius", which: Which = "theorem"
    ) -> Float[Tensor, "source"]:
        """Spearman's rank correlation over positions of the bound with the true Jacobian's norms: does it put tokens in the right order?

        Args:
            sensitivity: Norms of the Jacobian of the same position's final representation, from `sensitivity`.
            norm: Which norm.
            which: The theorem's bound, or that with constants of every token's own.

        Returns:
            One number per source block; NaN with fewer than three positions, or where either says the same of all.

        Raises:
            ValueError: The norms are of another output, position, prompt or intervention.
        """
        from scipy.stats import spearmanr

        norms, bounds = self._beside(sensitivity, norm, which)
        found = []
        for bound, true in zip(bounds, norms, strict=True):
            tells = len(bound) > 2 and min(len(bound.unique()), len(true.unique())) > 1
            rank = spearmanr(bound, true).statistic if tells else math.nan  # pyright: ignore[reportAttributeAccessIssue]
            found.append(float(rank))
        return torch.tensor(found, dtype=torch.float64)

    def log10_slack(
        self, sensitivity: Sensitivity, *, norm: Norm = "spectral", which: Which = "theorem"
    ) -> Float[Tensor, "source pos"]:
        """How many orders of magnitude the bound lies above the true Jacobian's norms; negative where the true one exceeds it.

        Args:
            sensitivity: Norms of the Jacobian of the same position's final representation, from `sensitivity`.
            norm: Which norm. The bound is one of spectral norms.
            which: The theorem's bound, or that with constants of every token's own.

        Returns:
            One row per source block, for the positions up to the one meant.

        Raises:
            ValueError: The norms are of another output, position, prompt or intervention.
        """
        norms, bounds = self._beside(sensitivity, norm, which)
        return bounds - norms.log10()

    def _beside(self, sensitivity: Sensitivity, norm: Norm, which: Which) -> tuple[Tensor, Tensor]:
        """True norms and logarithms of the bound for each source, at the positions that can be felt."""
        if norm not in ("spectral", "frobenius"):
            raise ValueError(f"norm: got {norm!r}; allowed: 'spectral', 'frobenius'")
        norms = (sensitivity.spectral if norm == "spectral" else sensitivity.frobenius).double().cpu()
        if not torch.equal(sensitivity.tokens.cpu(), self.tokens) or sensitivity.model_name != self.model_name:
            raise ValueError("sensitivity: got one of another prompt or model; allowed: of the same as the bound")
        for name, got, wanted in (
            ("of", sensitivity.of, "final"),
            ("position", sensitivity.position, self.position),
            ("intervention", sensitivity.intervention, self.intervention),
        ):
            if got != wanted:
                raise ValueError(f"sensitivity: got {name}={got!r}; allowed: {wanted!r}, which the bound is about")
        felt = slice(0, self.position + 1)
        return norms[:, felt], self.log10_bounds(which)[[self.n_blocks - block for block in sensitivity.sources], felt]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per depth and position.

        Columns: depth, source (the block that the stream enters), pos, token, share, log10_bound, token_share, log10_token_bound.
        """
        depths, n = self.shares.shape
        depth = torch.arange(depths).repeat_interleave(n)
        return pd.DataFrame(
            {
                "depth": depth.numpy(),
                "source": (self.n_blocks - depth).numpy(),
                "pos": torch.arange(n).repeat(depths).numpy(),
                "token": list(self.texts) * depths,
                "share": self.shares.flatten().numpy(),
                "log10_bound": self.log10_bound.flatten().numpy(),
                "token_share": self.token_shares.flatten().numpy(),
                "log10_token_bound": self.log10_bounds("token").flatten().numpy(),
            }
        )

    def constants_table(self) -> pd.DataFrame:
        """One row per block: its constants, see `BlockConstants`."""
        return pd.DataFrame([vars(row) for row in self.constants])

    def plot(self) -> go.Figure:
        """Shares of positions over depth as a heat map, and the first token's share beside it."""
        from sd_lens.display.figures import squashing_heatmap

        return squashing_heatmap(self)

    def __repr__(self) -> str:
        most = float(self.log10_bound[-1].max())
        return (
            f"SquashingBound({self.model_name}: position {self.position} of {len(self.texts)}, {self.n_blocks} block{'s' * (self.n_blocks != 1)}, "
            f"heads {self.heads}, 10^{most:.1f} at most)"
        )
