"""What a quantisation study found: perplexities, ranges, and the set to spare."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import pandas as pd
from torch import nn

from sd_lens.applications.calibration import ProjectionRange
from sd_lens.applications.int8 import Granularity
from sd_lens.applications.settings import compressor_ignore, compressor_settings, filter_fn, torchao_settings
from sd_lens.applications.sparing import Search

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Method = Literal["rtn", "smoothquant"]
METHODS: tuple[Method, ...] = ("rtn", "smoothquant")
FULL = "full precision"
DETECTED = "explosion and decay"
RECOMMENDED = "recommended"
_SHOWN = {"rtn": "RTN", "smoothquant": "SmoothQuant", FULL: "full precision"}


@dataclass(frozen=True)
class QuantizedRow:
    """The perplexity of one way to quantise.

    Attributes:
        method: ``"full precision"``, ``"rtn"`` (round to nearest) or ``"smoothquant"``.
        granularity: ``"per_tensor"`` or ``"per_token"``; empty in full precision.
        spared: What the set of spared projections is called: ``"none"``, ``"explosion and decay"`` (the down-projections of the blocks
            detected), ``"block b"`` (that block's down-projection), ``"recommended"``, or a name that was given.
        names: The projections spared.
        loss: Mean loss of the text's tokens, nats.
    """

    method: str
    granularity: str
    spared: str
    names: tuple[str, ...]
    loss: float

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss."""
        return math.exp(min(self.loss, 700.0))


def above(loss: float, full: float) -> str:
    """By how much a perplexity exceeds that of full precision: ``+4.0 %``, from tenfold on ``× 250``.

    Args:
        loss: Mean loss.
        full: Mean loss in full precision.
    """
    if loss - full >= math.log(10):
        return f"× {math.exp(min(loss - full, 700.0)):.3g}"
    text = f"{100 * math.expm1(loss - full):+.1f} %".replace("-", "−")
    return "±0.0 %" if text[1:] == "0.0 %" else text


@dataclass(frozen=True)
class Recommendation:
    """The smallest set of projections to spare within a budget, and how to tell other libraries.

    Attributes:
        method: How it quantises.
        granularity: What a range belongs to.
        budget: By how much the perplexity may exceed that of full precision, as a share of it.
        search: The search that found it.
        excluded: Projections that no quantiser is to touch: those left out of the study.
        alpha: SmoothQuant's migration strength; None for plain rounding.
        full: Mean loss in full precision, nats.
    """

    method: Method
    granularity: Granularity
    budget: float
    search: Search
    excluded: tuple[str, ...]
    alpha: float | None
    full: float

    @property
    def spared(self) -> tuple[str, ...]:
        """Names of the projections to spare, in the Hugging Face model."""
        return self.search.spared

    @property
    def within_budget(self) -> bool:
        """Whether sparing them is enough; otherwise it is the best that was found."""
        return self.search.within

    @property
    def perplexity(self) -> float:
        """With these projections spared."""
        return math.exp(self.search.loss)

    @property
    def filter_fn(self) -> Callable[[nn.Module, str], bool]:
        """For ``torchao.quantization.quantize_(model, ..., filter_fn=...)``."""
        return filter_fn(self.spared, self.excluded)

    @property
    def ignore(self) -> list[str]:
        """For llm-compressor's ``QuantizationModifier(..., ignore=...)``."""
        return compressor_ignore(self.spared, self.excluded)

    def torchao(self) -> str:
        """Python to paste that quantises with torchao."""
        return torchao_settings(self.spared, self.excluded, self.granularity, self.alpha)

    def llm_compressor(self) -> str:
        """Python to paste that defines llm-compressor's recipe."""
        return compressor_settings(self.spared, self.excluded, self.granularity, self.alpha)

    def sentence(self) -> str:
        """What to spare, in one sentence."""
        how = f"{_SHOWN[self.method]} {self.granularity.replace('_', '-')}"
        within = f"within {100 * self.budget:g} % of full precision's perplexity"
        excess = above(self.search.loss, self.full)
        names = ", ".join(self.spared) or "nothing"
        are = "are" if len(self.spared) > 1 else "is"
        if self.within_budget:
            return f"{how} is {within} ({excess}) {'once' if self.spared else 'when'} {names} {are} spared."
        why = {
            "limit": f"no more than {len(self.spared)} projection{'s' * (len(self.spared) != 1)} were to be spared",
            "gain": "no further down-projection brings back much",
            "candidates": "all down-projections are spared then",
        }[self.search.because]
        return f"{how} is not {within}: {excess} where {names} {are} spared, and {why}."

    def __repr__(self) -> str:
        return f"Recommendation({self.sentence()})"


@dataclass(frozen=True)
class QuantizationStudy:
    """Perplexities of a model in eight bits, and what to spare.

    Attributes:
        model_name: The model.
        d_model: Its width.
        n_blocks: Its blocks.
        rows: One per method, granularity and set of spared projections; the first is full precision.
        ranges: One per projection; empty where they were not asked for.
        explosion_blocks: Blocks where norms explode on this text.
        decay_blocks: Blocks where they decay.
        recommendation: The smallest set within the budget; None where it was not asked for.
        backend: ``"fake"``, or ``"torchao"``: real kernels.
        window: Tokens per window, BOS included.
        stride: Tokens that each window after the first adds.
        bos: Whether BOS stands in front of every window.
        n_tokens: Tokens scored.
        n_calibrated: Tokens that SmoothQuant's scales, ranges and errors were measured on.
        excluded: Linear layers that were left out: the unembedding, unless it was asked for.
        alpha: SmoothQuant's migration strength.
        notes: What the numbers rest on besides.
    """

    model_name: str
    d_model: int
    n_blocks: int
    rows: tuple[QuantizedRow, ...]
    ranges: tuple[ProjectionRange, ...]
    explosion_blocks: tuple[int, ...]
    decay_blocks: tuple[int, ...]
    recommendation: Recommendation | None
    backend: str
    window: int
    stride: int
    bos: bool
    n_tokens: int
    n_calibrated: int
    excluded: tuple[str, ...]
    alpha: float
    notes: tuple[str, ...] = ()

    @property
    def full(self) -> QuantizedRow:
        """The row of full precision."""
        return self.rows[0]

    def row(self, method: str, granularity: str, spared: str = "none") -> QuantizedRow:
        """One row.

        Raises:
            ValueError: There is none.
        """
        for row in self.rows:
            if (row.method, row.granularity, row.spared) == (method, granularity, spared):
                return row
        there = sorted({f"{row.method}, {row.granularity}, {row.spared}" for row in self.rows[1:]})
        raise ValueError(f"method, granularity, spared: got {method}, {granularity}, {spared}; allowed: {'; '.join(there)}")

    def recovered(self, method: str, granularity: str, spared: str = DETECTED) -> float:
        """Which share of the log-perplexity lost to quantising comes back where projections are spared; NaN where nothing is lost."""
        nothing, some = self.row(method, granularity).loss, self.row(method, granularity, spared).loss
        lost = nothing - self.full.loss
        return (nothing - some) / lost if lost > 0 else math.nan

    @property
    def schemes(self) -> tuple[tuple[str, str], ...]:
        """Method and granularity of the quantised rows, each once."""
        return tuple(dict.fromkeys((row.method, row.granularity) for row in self.rows[1:]))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per way to quantise: method, granularity, spared, names, perplexity, loss, lost (nats over full precision)."""
        frame = pd.DataFrame([asdict(row) for row in self.rows])
        frame.insert(3, "perplexity", [row.perplexity for row in self.rows])
        frame["lost"] = frame["loss"] - self.full.loss
        return frame.loc[:, ["method", "granularity", "spared", "perplexity", "loss", "lost", "names"]]

    def table(self) -> pd.DataFrame:
        """Perplexities as the paper prints them: a row per method and granularity, a column per spared set."""
        frame = self.to_dataframe().iloc[1:]
        order = list(dict.fromkeys(frame["spared"]))
        wide = frame.pivot(index=["method", "granularity"], columns="spared", values="perplexity")
        wide = wide.loc[list(self.schemes), order]
        wide.insert(0, FULL, self.full.perplexity)
        return wide.rename_axis(columns=None).reset_index()

    def ranges_dataframe(self) -> pd.DataFrame:
        """One row per projection: ranges of inputs and weights, and SQNR of every method in a column of its own."""
        rows = []
        for one in self.ranges:
            row = {name: value for name, value in asdict(one).items() if not isinstance(value, dict)}
            row |= {f"sqnr_db, {name}": value for name, value in one.sqnr_db.items()}
            rows.append(row | {f"token_sqnr_db, {name}": value for name, value in one.token_sqnr_db.items()})
        return pd.DataFrame(rows)

    def plot(self) -> Figure:
        """Perplexity over spared sets, beside full precision."""
        from sd_lens.display.figures import quantization_bars

        return quantization_bars(self)

    def plot_ranges(self) -> Figure:
        """Ranges and errors of every projection over blocks."""
        from sd_lens.display.figures import quantization_ranges

        return quantization_ranges(self)

    def sentences(self) -> tuple[str, ...]:
        """What was found, one sentence each."""
        found = [
            f"Over {self.n_tokens} tokens of text the perplexity of {self.model_name} is {self.full.perplexity:.2f}"
            f" in full precision{self._beside()}."
        ]
        method, granularity = self.schemes[0]
        labels = {row.spared for row in self.rows}
        if DETECTED in labels:
            share = self.recovered(method, granularity)
            blocks = ", ".join(map(str, sorted({*self.explosion_blocks, *self.decay_blocks})))
            verb = "costs nothing measurable" if math.isnan(share) else f"brings back {share:.0%} of the log-perplexity lost"
            found.append(
                f"Sparing the down-projections of the explosion and decay blocks ({blocks}) {verb}"
                f" ({_SHOWN[method]}, {granularity.replace('_', '-')})."
            )
        if self.recommendation is not None:
            found.append(self.recommendation.sentence())
        return tuple(found)

    def _beside(self) -> str:
        parts = [
            f"{self.row(*scheme).perplexity:.2f} with {_SHOWN[scheme[0]]} {scheme[1].replace('_', '-')}" for scheme in self.schemes
        ]
        return f", {' and '.join([', '.join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)}" if parts else ""

    def __repr__(self) -> str:
        return f"QuantizationStudy({' '.join(self.sentences())})"

    def _repr_html_(self) -> str:
        return str(self.table().to_html(index=False, float_format="%.2f"))
