"""What a model answered to probes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        length: How many elements the sequence has.
        sample: Which of the samples.
        changed: Whether it is the second of a pair, whose digit to copy is changed.
        expected: The right answer.
        answered: The answer given; None where the text generated has no number.
        log_probability: Natural logarithm of the right answer's probability; None where text was generated.
        text: The text generated; None where candidates were scored.
    """

    length: int
    sample: int
    changed: bool
    expected: int
    answered: int | None
    log_probability: float | None = None
    text: str | None = None

    @property
    def correct(self) -> bool:
        """Whether the answer is right."""
        return self.answered == self.expected

    @property
    def absolute_error(self) -> float:
        """Distance of the answer from the right one; NaN without an answer."""
        return math.nan if self.answered is None else float(abs(self.answered - self.expected))


@dataclass(frozen=True)
class Answers:
    """A model's answers to a probe over lengths.

    Attributes:
        model_name: The model.
        probe: The probe's `records`.
        by: ``"logits"``, the most probable candidate, or ``"generation"``, the first number of the text that the model goes on with.
        candidates: The candidates scored; empty where text was generated.
        rows: The answers.
    """

    model_name: str
    probe: Mapping[str, Any]
    by: str
    candidates: tuple[int, ...]
    rows: tuple[Answer, ...]

    @property
    def accuracy(self) -> dict[int, float]:
        """Share of right answers, by length."""
        return self._by_length("accuracy")

    @property
    def mean_absolute_error(self) -> dict[int, float]:
        """Mean distance from the right answer, by length; sequences without an answer are left out, NaN where there is none."""
        return self._by_length("mean_absolute_error")

    def to_dataframe(self) -> pd.DataFrame:
        """One row per sequence asked."""
        frame = pd.DataFrame([asdict(row) | {"correct": row.correct, "absolute_error": row.absolute_error} for row in self.rows])
        return frame.astype({"answered": "Int64", "log_probability": float})

    def summary(self) -> pd.DataFrame:
        """One row per length: how many sequences, how many answers, the share of right ones, the mean and median absolute error.

        A text generated may hold any number, however large, which the mean is at the mercy of and the median is not.
        """
        groups = self.to_dataframe().groupby("length")
        table = groups.agg(
            n=("correct", "size"),
            n_answered=("answered", "count"),
            accuracy=("correct", "mean"),
            mean_absolute_error=("absolute_error", "mean"),
            median_absolute_error=("absolute_error", "median"),
        )
        return table.reset_index()

    def plot(self) -> Figure:
        """Accuracy and mean absolute error over length."""
        from sd_lens.display.figures import answer_curves

        return answer_curves(self)

    def __repr__(self) -> str:
        right, lengths = sum(row.correct for row in self.rows), sorted({row.length for row in self.rows})
        return (
            f"Answers({self.model_name}, {self.probe['name']} by {self.by}: {right} of {len(self.rows)} right, "
            f"lengths {lengths[0]} to {lengths[-1]})"
        )

    def _by_length(self, column: str) -> dict[int, float]:
        table = self.summary()
        return dict(zip(table["length"].tolist(), table[column].astype(float).tolist(), strict=True))
