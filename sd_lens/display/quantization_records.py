"""Machine-readable results of the quantisation study."""

from __future__ import annotations

from dataclasses import asdict

from sd_lens.applications.calibration import ProjectionRange
from sd_lens.applications.quantization_result import QuantizationStudy, QuantizedRow
from sd_lens.display.header import Record, header, plain

_FACTS = ("backend", "window", "stride", "bos", "n_tokens", "n_calibrated", "alpha")


def quantize_record(study: QuantizationStudy) -> Record:
    """Perplexities, ranges and what to spare; what was recommended is null where nothing was searched for.

    Args:
        study: From `quantization_study`.
    """
    found = study.recommendation
    return header("quantize", study.model_name, study.d_model, study.n_blocks) | {
        "sentences": list(study.sentences()),
        "rows": [_row(row) for row in study.rows],
        "recommended": None if found is None else list(found.spared),
        "recommended_for": None if found is None else {"method": found.method, "granularity": found.granularity},
        "recommended_perplexity": None if found is None else plain(found.perplexity),
        "within_budget": None if found is None else found.within_budget,
        "budget": None if found is None else plain(found.budget),
        "ignore": None if found is None else found.ignore,
        "ranges": [_range(one) for one in study.ranges],
        "explosion_blocks": list(study.explosion_blocks),
        "excluded": list(study.excluded),
        "decay_blocks": list(study.decay_blocks),
        **{name: getattr(study, name) for name in _FACTS},
        "notes": list(study.notes),
    }


def _row(row: QuantizedRow) -> Record:
    return {
        "method": row.method,
        "granularity": row.granularity,
        "spared": row.spared,
        "names": list(row.names),
        "perplexity": plain(row.perplexity),
        "loss": plain(row.loss),
    }


def _range(one: ProjectionRange) -> Record:
    record = {name: plain(value) if isinstance(value, float) else value for name, value in asdict(one).items()}
    for name in ("sqnr_db", "token_sqnr_db"):
        record[name] = [
            {"method": method, "granularity": granularity, "value": plain(value)}
            for key, value in getattr(one, name).items()
            for method, granularity in [key.split(", ")]
        ]
    return record
