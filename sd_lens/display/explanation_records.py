"""Machine-readable results of attribution and pathways."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from sd_lens.anatomy import Anatomy
from sd_lens.display.header import Record, header, plain
from sd_lens.pathways import Pathways
from sd_lens.tracing.defects import Defects
from sd_lens.tracing.repetition import RepeatedTokens
from sd_lens.tracing.shares import Attribution
from sd_lens.tracing.vocabulary_scan import VocabularyScan

# Of the many neurons of an FFN, and the many ids of a text or vocabulary, so many are written.
MOST = 50
_COLUMNS = ["kind", "block", "index", "keys", "value", "share"]


def attribute_record(anatomy: Anatomy) -> Record:
    """What an explosion is made of; the keys of the norm's attribution stand at the top, the trigger's under ``trigger``."""
    keys = ("block", "group", "n_tokens", "total", "residual", "parts", "groups")
    norm: Record = {key: None for key in keys} if anatomy.norm is None else _attribution(anatomy.norm)
    return (
        _header("attribute", anatomy.defects)
        | norm
        | {
            "trigger": None if anatomy.trigger is None else _attribution(anatomy.trigger),
            "massive_activations": {
                "criteria": anatomy.massive.criteria,
                "n_found": anatomy.massive.n_found,
                "dimensions": _rows(anatomy.massive.dimensions()),
                "top": _rows(anatomy.massive.top(MOST)),
            },
            "super_weights": None if anatomy.super_weights is None else _rows(anatomy.super_weights.to_dataframe()),
            "missing": dict(anatomy.missing),
        }
    )


def _attribution(attribution: Attribution) -> Record:
    """The main row at the top, all rows under ``groups``."""
    rows = [_parts(attribution, number) for number in range(len(attribution.rows))]
    return {"block": attribution.block, **rows[attribution.main], "groups": rows}


def _parts(attribution: Attribution, number: int) -> Record:
    row = attribution.rows[number]
    whole = attribution.top(len(attribution.components), row=number)
    inner = [attribution.top(MOST, row=number, inside=block) for block in attribution.inside]
    return {
        "group": row.label,
        "n_tokens": row.n_tokens,
        "total": plain(float(attribution.total[number])),
        "residual": plain(float(attribution.residual[number])),
        "parts": [part for frame in (whole, *inner) for part in _rows(frame.loc[:, _COLUMNS])],
    }


def pathways_record(pathways: Pathways) -> Record:
    """How tokens get to a high norm: one key per pathway scanned, and what the text shows."""
    sinks = pathways.sinks
    return _header("pathways", pathways.defects) | {
        **{scan.pathway: _scan(scan) for scan in pathways.scans},
        "confirmation": None if pathways.confirmation is None else _rows(pathways.confirmation.to_dataframe()),
        "tokens": _rows(pathways.tokens.to_dataframe().head(MOST)),
        "repeated": {
            "block": pathways.repeated.block,
            "largest_ratio": _largest(pathways.repeated),
            "rows": _rows(pathways.repeated.summary()),
        },
        "sinks": None
        if sinks is None
        else {
            "sink_rate": plain(sinks.sink_rate),
            "epsilon": sinks.epsilon,
            "T": sinks.T,
            "key": sinks.key,
            "n_prompts": sinks.n_prompts,
            "n_short": sinks.n_short,
            "heads": _rows(sinks.to_dataframe()),
        },
        "missing": dict(pathways.missing),
    }


def _largest(repeated: RepeatedTokens) -> float | None:
    """The largest norm of a repeat relative to the first token's, which does not count itself."""
    ratios = repeated.ratios if repeated.prefix else repeated.ratios[:, 1:]
    return plain(float(ratios.max())) if ratios.numel() else None


def _scan(scan: VocabularyScan) -> Record:
    control = scan.control
    return {
        "block": scan.block,
        "n_scanned": len(scan.ids),
        "n_trained": int(scan.trained.sum()),
        "n_exploding": len(scan.self_exploding()),
        "reference": plain(scan.reference),
        "explosion_found": scan.explosion_found,
        "notes": list(scan.notes),
        "top": _rows(scan.top(MOST).drop(columns="rank")),
        "control": None
        if control is None
        else {"n": len(control), "median_norm": plain(float(control.median())), "share_exploding": plain(scan.control_share)},
    }


def _header(command: str, defects: Defects) -> Record:
    trace = defects.trace
    return header(command, trace.model_name, trace.d_model, trace.n_blocks) | {"found": defects.found}


def _rows(frame: pd.DataFrame) -> list[Record]:
    """The rows of a table as JSON has them."""
    return [{str(name): _value(value) for name, value in row.items()} for row in frame.to_dict("records")]


def _value(value: Any) -> Any:
    if value is None or value is pd.NA:
        return None
    if hasattr(value, "item"):  # numpy's numbers
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
