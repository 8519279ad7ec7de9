"""Machine-readable results of information propagation."""

from __future__ import annotations

from typing import Any

import pandas as pd

from sd_lens.display.header import Record, header, plain
from sd_lens.propagation.overview_result import Propagation
from sd_lens.propagation.sensitivity_result import Sensitivity
from sd_lens.propagation.squashing_result import SquashingBound
from sd_lens.wording import propagated

_SENSITIVITY = ("of", "position", "method", "n_products", "intervention")


def collapse_record(found: Propagation) -> Record:
    """All of it; null where something was not asked for or cannot be had, with the reason under ``missing``.

    Args:
        found: From `sd_lens.propagation.overview.propagation_overview`.
    """
    ablated, helped, answers = found.consequences, found.mitigations, found.answers
    return header("collapse", found.model_name, found.d_model, found.n_blocks) | {
        "sentences": list(propagated(found)),
        **curve_record(found),
        "sensitivity": sensitivity_record(found.sensitivity),
        "bound": bound_record(found),
        "mitigations": None
        if helped is None
        else {
            "metric": helped.metric,
            "layer": helped.layer,
            "lengths": list(helped.lengths),
            "rows": [_row(row) for row in helped.rows()],
        },
        "without_explosion": None
        if ablated is None
        else {
            "block": ablated.block,
            "side": ablated.side,
            "rank": ablated.rank,
            "metric": ablated.metric,
            "rows": [_row(row) for row in ablated.rows()],
            "curves": {run: [_row(row) for row in curve.rows()] for run, curve in ablated.curves.items()},
            "sensitivity": {run: sensitivity_record(felt) for run, felt in ablated.sensitivities.items()},
        },
        "answers": None
        if answers is None
        else {
            "by": answers.by,
            "candidates": _candidates(answers.candidates),
            "rows": _rows(answers.to_dataframe()),
            "summary": _rows(answers.summary()),
        },
        "missing": dict(found.missing),
    }


def curve_record(found: Propagation) -> Record:
    """The collapse curve and its critical lengths, those of its first layer by precision.

    Args:
        found: From `sd_lens.propagation.overview.propagation_overview`.
    """
    curve, critical = found.curve, found.critical_lengths
    first = {
        one.dtype: {"layer": one.layer, "metric": one.metric, "below_epsilon": one.below_epsilon, "equal": one.equal}
        for one in reversed(critical)
        if one.measured == one.dtype
    }
    return {
        "probe": dict(curve.probe),
        "rows": [_row(row) for row in curve.rows()],
        "critical_length": dict(reversed(first.items())),
        "critical_lengths": [_row(vars(one)) for one in critical],
        "shared": curve.shared,
        "notes": list(found.notes),
    }


def sensitivity_record(felt: Sensitivity | None) -> Record | None:
    """What one token's output feels, a row per token up to it.

    Args:
        felt: From `sensitivity`.
    """
    if felt is None:
        return None
    return {name: getattr(felt, name) for name in _SENSITIVITY} | {"rows": _rows(felt.to_dataframe()), "notes": list(felt.notes)}


def bound_record(found: Propagation) -> Record | None:
    """The over-squashing bound: constants of the blocks, its shares at full depth, and how well it orders tokens.

    Args:
        found: From `sd_lens.propagation.overview.propagation_overview`.
    """
    bound = found.bound
    if bound is None:
        return None
    return {
        "position": bound.position,
        "heads": bound.heads,
        "constants": [_row(vars(row)) for row in bound.constants],
        "beta3": plain(bound.beta3),
        "rows": _whole_depth(bound),
        "first_column": [plain(share) for share in bound.shares[:, 0].tolist()],
        "rank_correlation": {which: plain(value) for which, value in found.correlation.items()},
    }


def _candidates(numbers: tuple[int, ...]) -> Record | None:
    """How many, and from where to where; None where text was generated."""
    return {"n": len(numbers), "smallest": numbers[0], "largest": numbers[-1]} if numbers else None


def _whole_depth(bound: SquashingBound) -> list[Record]:
    frame = bound.to_dataframe()
    return _rows(frame.loc[(frame["source"] == 0) & (frame["pos"] <= bound.position)].drop(columns=["depth", "source"]))


def _rows(frame: pd.DataFrame) -> list[Record]:
    return [_row(row) for row in frame.astype(object).to_dict("records")]


def _row(row: Any) -> Record:
    """A row as JSON has it."""
    return {str(name): _value(value) for name, value in row.items()}


def _value(value: Any) -> Any:
    if value is None or value is pd.NA:
        return None
    if isinstance(value, bool | str):
        return value
    if hasattr(value, "item"):
        value = value.item()
    return plain(value) if isinstance(value, float) else value
