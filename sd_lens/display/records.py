"""Machine-readable results: plain dictionaries that JSON can hold, and the file they go to."""

from __future__ import annotations

import json
import math
import os

from sd_lens.display.explanation_records import attribute_record, pathways_record
from sd_lens.display.header import Record, header, plain
from sd_lens.display.intervention_records import patch_record
from sd_lens.display.propagation_records import collapse_record, curve_record, sensitivity_record
from sd_lens.display.quantization_records import quantize_record
from sd_lens.display.signature_records import signature_record
from sd_lens.findings import Findings
from sd_lens.linear.directions import BlockDirections
from sd_lens.linear.parts import BlockDirection
from sd_lens.models.check import Check
from sd_lens.models.files import write_text
from sd_lens.tracing.defects import Defects
from sd_lens.tracing.sublayers import SublayerAttribution

__all__ = [
    "Record",
    "attribute_record",
    "check_record",
    "collapse_record",
    "patch_record",
    "pathways_record",
    "report_record",
    "spectrum_record",
    "sublayer_record",
    "trace_record",
    "write_json",
]


def report_record(findings: Findings) -> Record:
    """Everything `sd_lens.display.report` draws."""
    trace = findings.defects.trace
    shape = {"d_model": trace.d_model, "n_blocks": trace.n_blocks}
    directions = findings.directions
    return header("report", trace.model_name, **shape) | {
        "sentences": list(findings.sentences()),
        "found": findings.defects.found,
        "check": check_record(findings.check, **shape),
        "trace": trace_record(findings.defects),
        "sublayers": sublayer_record(findings.attribution, **shape),
        "spectrum": None if directions is None else spectrum_record(directions),
        "no_spectrum_because": findings.no_directions_because or None,
        "attribute": attribute_record(findings.anatomy),
        "pathways": pathways_record(findings.pathways),
        "patch": patch_record(findings.causality),
        "quantize": None if findings.uses.quantization is None else quantize_record(findings.uses.quantization),
        "signature": signature_record(findings.uses.signature),
        "no_quantize_because": findings.uses.missing.get("quantize"),
        "collapse": None if findings.propagation is None else curve_record(findings.propagation),
        "sensitivity": None if findings.propagation is None else sensitivity_record(findings.propagation.sensitivity),
        "no_collapse_because": findings.no_propagation_because or None,
    }


def trace_record(defects: Defects) -> Record:
    """Norms of all tokens, and what was found in them."""
    trace = defects.trace
    direction = defects.direction
    return header("trace", trace.model_name, trace.d_model, trace.n_blocks) | {
        "prompts": [
            {
                "tokens": trace.texts_of(prompt),
                "norms": [[_short(norm) for norm in row] for row in trace.of_prompt(prompt).tolist()],
            }
            for prompt in range(trace.n_prompts)
        ],
        "explosion_blocks": list(defects.explosion_blocks),
        "decay_blocks": list(defects.decay_blocks),
        "high_norm_tokens": [
            {
                "prompt": token.prompt,
                "pos": token.pos,
                "token": token.token,
                "peak_block": token.peak_block,
                "norm": _short(token.norm),
                "ratio": _short(token.ratio),
            }
            for token in defects.tokens
        ],
        "direction": None
        if direction is None
        else {"n_tokens": direction.n_tokens, "mean_pairwise_angle_deg": plain(direction.mean_pairwise_angle_deg)},
    }


def spectrum_record(directions: BlockDirections) -> Record:
    """The linear maps of all blocks."""
    return header("spectrum", directions.model_name, len(directions.reference), directions.n_blocks) | {
        "reference": directions.reference_source,
        "notes": list(directions.notes),
        "blocks": [_spectrum_row(row) for row in directions.rows],
    }


def _spectrum_row(row: BlockDirection) -> Record:
    return {
        "block": row.block,
        "part": row.part,
        "sigma1": plain(row.sigma1),
        "sigma2": plain(row.sigma2),
        "gap": plain(row.gap),
        "angle_deg": plain(row.angle_deg),
        "eigenvalue": [plain(row.eigenvalue.real), plain(row.eigenvalue.imag)],
        "eigenvector_angle_deg": plain(row.eigenvector_angle_deg),
        "residual": plain(row.residual),
        "converged": row.converged,
        "balance": None if row.balance is None else plain(row.balance),
    }


def sublayer_record(attribution: SublayerAttribution, *, d_model: int | None = None, n_blocks: int | None = None) -> Record:
    """How the steps of explosion and decay blocks split over their sublayers.

    Args:
        attribution: From `attribute_sublayers`.
        d_model: The model's width, null where not given: an attribution does not know it.
        n_blocks: How many blocks it has, the same.
    """
    names = ("before", "attention", "ffn", "after", "residual", "ffn_share")
    return header("sublayers", attribution.model_name, d_model, n_blocks) | {
        "n_tokens": attribution.n_tokens,
        "blocks": [
            {"block": share.block, "main_part": share.main_part} | {name: plain(getattr(share, name)) for name in names}
            for share in attribution.shares
        ],
    }


def check_record(check: Check, *, d_model: int | None = None, n_blocks: int | None = None) -> Record:
    """What was checked, and which analyses apply.

    Args:
        check: From `sd_lens.models.check.check`.
        d_model: The model's width, null where not given: a check does not know it.
        n_blocks: How many blocks it has, the same.
    """
    return header("check", check.model_name, d_model, n_blocks) | {
        "tolerance": plain(check.tolerance),
        "checks": [vars(row) | {"error": None if row.error is None else plain(row.error)} for row in check.rows],
        "analyses": [{**row, "applies": bool(row["applies"])} for row in check.analyses().to_dict("records")],
    }


def write_json(record: Record, path: str | os.PathLike[str]) -> None:
    """Writes a record as one JSON object, whole or not at all.

    Args:
        record: From one of the functions of this module.
        path: The file, replaced if it exists.

    Raises:
        OSError: It cannot be written there.
        ValueError: The record holds what JSON cannot: NaN, infinity.
    """
    write_text(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n", path)


def _short(value: float) -> float | None:
    """Six significant digits, as much as a float32 norm is good for, at half the length."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
