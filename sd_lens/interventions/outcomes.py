"""What removing the explosion subspace did to a model: the table, the texts beside each other, and what they say."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, get_args

import pandas as pd

from sd_lens.interventions.generation import Continuation
from sd_lens.interventions.sites import Side

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Where = Literal["initial", "delimiters", "everywhere"]
"""The first token of each prompt; its later tokens that have a high norm in the untouched model; all tokens."""

Kind = Literal["none", "ablate", "mean ablate", "random control"]

WHERE: tuple[Where, ...] = get_args(Where)
SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True)
class Measures:
    """What a run of the prompts shows. Those about norms are of tokens at blocks, and NaN where no token had a high norm.

    Attributes:
        loss: Mean cross-entropy of the next token, in nats, over all predicted tokens of all prompts.
        kl: ``KL(untouched ‖ this run)`` of the predicted distributions, in nats, averaged over all tokens.
        peak_norm: Largest norm, after the subspace's block or any later one, of the tokens that have a high norm in the untouched model.
        peak_ratio: Largest ratio of the same tokens, after the same blocks, to the median norm of the tokens after the first of their prompt
            at the same block in the same run (`NormTrace.reference`). Blocks before the subspace's are left out because nothing is changed there.
        block_ratio: The same right after the subspace's block: what is left of the explosion itself, before later blocks write.
        peak_ratio_anywhere: The same after any block, also before the subspace's.
        n_high: How many tokens, whichever, reach ``min_ratio`` times the median after the subspace's block or any later one: whether the
            explosion moved elsewhere.
        sink_rate: Gu et al.'s, at position 0: share of heads with ``α`` above ``epsilon``, taken in each prompt and averaged.
        sink_attention: ``α`` averaged over the sink heads of the untouched model; NaN where it has none.
    """

    loss: float
    kl: float
    peak_norm: float
    peak_ratio: float
    block_ratio: float
    peak_ratio_anywhere: float
    n_high: float
    sink_rate: float
    sink_attention: float


@dataclass(frozen=True)
class Outcome:
    """One row of the table.

    Attributes:
        intervention: ``"none"``, ``"ablate"``, ``"mean ablate"``, or ``"random control"``, the ablation's displacement along random directions.
        side: ``"trigger"``, ``"direction"``, ``"both"``; ``"none"`` for the untouched model.
        where: ``"initial"``, ``"delimiters"``, ``"everywhere"``; ``"none"`` for the untouched model.
        n_tokens: How many tokens were edited.
        measures: What the run shows; of controls, the mean over seeds.
        spread: Standard deviations over a control's seeds (of a sample: NaN where there is one seed only); None where there are no seeds.
    """

    intervention: Kind
    side: Side | Literal["none"]
    where: Where | Literal["none"]
    n_tokens: int
    measures: Measures
    spread: Measures | None = None


@dataclass(frozen=True)
class Consequences:
    """What removing an explosion subspace does to a model, before and after.

    Attributes:
        model_name: The model.
        block: The block whose subspace was removed.
        rank: How many singular vectors span it.
        rows: The table: the untouched model first.
        continuations: Text generated greedily by the untouched model and by the edited ones.
        n_tokens: Tokens of the prompts.
        n_prompts: The prompts.
        n_high: Tokens with a high norm in the untouched model, after any block.
        n_delimiters: How many of them are not the first of their prompt.
        n_sink_heads: Sink heads of the untouched model.
        controls: Seeds of each random control.
        min_ratio: Least norm of a high-norm token, as a multiple of the median.
        epsilon: What ``α`` of a sink exceeds.
        T: Queries after the first so many tokens of a prompt are left out of ``α``.
        notes: What the numbers rest on, and what is missing.
    """

    model_name: str
    block: int
    rank: int
    rows: tuple[Outcome, ...]
    continuations: tuple[Continuation, ...]
    n_tokens: int
    n_prompts: int
    n_high: int
    n_delimiters: int
    n_sink_heads: int
    controls: int
    min_ratio: float
    epsilon: float
    T: int
    notes: tuple[str, ...] = ()

    @property
    def untouched(self) -> Outcome:
        """The model as it is."""
        return self.rows[0]

    def row(self, intervention: str, side: str, where: str) -> Outcome:
        """One row.

        Raises:
            ValueError: The table has no such row.
        """
        for row in self.rows:
            if (row.intervention, row.side, row.where) == (intervention, side, where):
                return row
        raise ValueError(
            f"intervention, side, where: got {intervention!r}, {side!r}, {where!r}; allowed: those of to_dataframe(), "
            f"such as {', '.join(repr(getattr(self.rows[-1], name)) for name in ('intervention', 'side', 'where'))}"
        )

    @property
    def main(self) -> Outcome:
        """The ablation that reaches all high-norm tokens with the fewest edits, on the side that removes most: what sentences are about."""
        ablated = [row for row in self.rows if row.intervention == "ablate"]
        places = ("everywhere", "initial", "delimiters")
        if self.n_delimiters == 0:
            places = ("initial", "everywhere", "delimiters")
        elif self.n_delimiters == self.n_high:
            places = ("delimiters", "everywhere", "initial")
        return min(ablated, key=lambda row: (places.index(row.where), -SIDES.index(row.side)))  # pyright: ignore[reportArgumentType]

    @property
    def texts(self) -> pd.DataFrame:
        """The generated texts side by side: one row per prompt, a column ``untouched`` and one per place that was ablated."""
        table: dict[str, dict[str, str]] = {}
        for found in self.continuations:
            table.setdefault(found.prompt, {"prompt": found.prompt})[found.column] = found.text
        return pd.DataFrame(list(table.values()))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per intervention: what it is, `Measures`, and their standard deviations under ``..._std``."""
        nothing = dict.fromkeys(Measures.__dataclass_fields__, float("nan"))
        return pd.DataFrame(
            [
                {"intervention": row.intervention, "side": row.side, "where": row.where, "n_tokens": row.n_tokens}
                | asdict(row.measures)
                | {f"{name}_std": value for name, value in (nothing if row.spread is None else asdict(row.spread)).items()}
                for row in self.rows
            ]
        )

    def plot(self) -> Figure:
        """Peak ratio, KL, loss and sink rate of every row, random controls beside them."""
        from sd_lens.display.figures import consequence_panels

        return consequence_panels(self)

    def sentences(self) -> tuple[str, ...]:
        """What the removal does to the norm, what it costs, what sink heads do; beside the random control where there is one."""
        row, before = self.main, self.untouched.measures
        after = row.measures
        control = next((r for r in self.rows if (r.intervention, r.side, r.where) == ("random control", row.side, row.where)), None)

        def beside(name: str, format: str) -> str:
            if control is None:
                return ""
            value = getattr(control.measures, name)
            return f" (random control: {times(value) if not format else f'{value:{format}}'})"

        side = {"trigger": "trigger side", "direction": "direction side", "both": "both sides"}[row.side]
        tokens = {"initial": "the initial tokens", "delimiters": "the later high-norm tokens", "everywhere": "all tokens"}[
            row.where
        ]
        said = [
            f"With the explosion subspace of block {self.block} (rank {self.rank}, {side}) ablated at {tokens}, the high-norm tokens reach "
            f"{times(after.peak_ratio)} times the median of the others from that block on, instead of {times(before.peak_ratio)}"
            f"{beside('peak_ratio', '')}."
            if self.n_high
            else f"No token has a high norm that ablating the subspace of block {self.block} could remove."
        ]
        said.append(
            f"The loss goes from {before.loss:.3f} to {after.loss:.3f} nats per token{beside('loss', '.3f')}, and the predictions change by "
            f"a KL divergence of {after.kl:.3f}{beside('kl', '.3f')}."
        )
        if self.n_sink_heads:
            heads = f"The {self.n_sink_heads} sink heads pay" if self.n_sink_heads > 1 else "The sink head pays"
            attention = (
                f"{heads} position 0 {after.sink_attention:.0%} of their attention instead of {before.sink_attention:.0%}"
                f"{beside('sink_attention', '.0%')}, and the sink rate goes from {before.sink_rate:.1%} to {after.sink_rate:.1%}"
                f"{beside('sink_rate', '.1%')}"
            )
            falls = after.sink_attention < before.sink_attention
            if falls and control is not None and control.spread is not None:
                among = control.measures.sink_attention - 2 * control.spread.sink_attention
                if after.sink_attention > among:
                    attention += ". What their attention falls by cannot be told from what displacing tokens by as much does"
            said.append(f"{attention}.")
        return tuple(said)

    def __repr__(self) -> str:
        row, before = self.main, self.untouched.measures
        return (
            f"Consequences({self.model_name}, block {self.block}, rank {self.rank}: {len(self.rows)} rows; ablated ({row.side}, {row.where}), "
            f"peak ratio {times(before.peak_ratio)} -> {times(row.measures.peak_ratio)}, loss {before.loss:.3f} -> {row.measures.loss:.3f})"
        )


def times(ratio: float) -> str:
    """A ratio in three digits, a large one without decimals: ``1.39``, ``13.3``, ``4,643``."""
    return f"{ratio:,.0f}" if ratio >= 1000 else f"{ratio:.3g}"
