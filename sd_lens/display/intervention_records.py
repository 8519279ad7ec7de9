"""Machine-readable results of interventions."""

from __future__ import annotations

from dataclasses import asdict

from sd_lens.display.header import Record, header, plain
from sd_lens.interventions.causality import Causality
from sd_lens.interventions.outcomes import Consequences, Outcome
from sd_lens.interventions.responses import ResponseCurve


def patch_record(causality: Causality) -> Record:
    """What removing the explosion subspace does; all null where there is none."""
    trace, removal = causality.defects.trace, causality.consequences
    record = header("patch", trace.model_name, trace.d_model, trace.n_blocks) | {
        "found": causality.defects.found,
        "sentences": list(causality.sentences()),
    }
    record |= dict.fromkeys((*_FACTS, "notes", "rows", "texts")) if removal is None else _consequences(removal)
    return record | {
        "response": None if causality.response is None else _response(causality.response),
        "missing": dict(causality.missing),
    }


_FACTS = (
    "block",
    "rank",
    "n_tokens",
    "n_prompts",
    "n_high",
    "n_delimiters",
    "n_sink_heads",
    "controls",
    "min_ratio",
    "epsilon",
    "T",
)


def _consequences(found: Consequences) -> Record:
    record = {name: getattr(found, name) for name in _FACTS}
    texts = [asdict(text) | {"ids": list(text.ids)} for text in found.continuations]
    return record | {"notes": list(found.notes), "rows": [_row(row) for row in found.rows], "texts": texts}


def _row(row: Outcome) -> Record:
    """Measures as they are, and standard deviations, which only controls have, under ``..._std``."""
    record: Record = {"intervention": row.intervention, "side": row.side, "where": row.where, "n_tokens": row.n_tokens}
    record |= {name: plain(value) for name, value in asdict(row.measures).items()}
    spread = {} if row.spread is None else asdict(row.spread)
    return record | {f"{name}_std": plain(value) for name, value in spread.items()}


def _response(curve: ResponseCurve) -> Record:
    columns = curve.to_dataframe().to_dict("list")
    return {
        "block": curve.block,
        "vector": curve.vector,
        "exponent": plain(curve.exponent),
        "asymmetry": plain(curve.asymmetry),
        **{str(name): [plain(value) for value in values] for name, values in columns.items()},
    }
