"""Records are plain JSON with the keys of the design, and reach the disk whole or not at all."""

import json
import math
import os
from dataclasses import replace

import pytest

from sd_lens.display.records import (
    check_record,
    patch_record,
    report_record,
    spectrum_record,
    sublayer_record,
    trace_record,
    write_json,
)
from sd_lens.models.version import version

HEADER = {"schema", "sd_lens", "model", "d_model", "n_blocks"}


def through_json(record):
    return json.loads(json.dumps(record, allow_nan=False))


def test_a_trace(findings):
    defects = findings.defects
    record = trace_record(defects)
    assert through_json(record) == record
    assert record.keys() == HEADER | {"prompts", "explosion_blocks", "decay_blocks", "high_norm_tokens", "direction"}
    assert (record["schema"], record["sd_lens"]) == ("sd_lens.trace/1", version())
    assert (record["model"], record["d_model"], record["n_blocks"]) == ("planted", 64, 6)
    assert (record["explosion_blocks"], record["decay_blocks"]) == ([1], [4])
    prompt = record["prompts"][1]
    assert prompt["tokens"] == defects.trace.texts_of(1)
    assert len(prompt["norms"]) == 7
    assert prompt["norms"][2] == pytest.approx(defects.trace.of_prompt(1)[2].tolist(), rel=5e-6)
    assert all(len(f"{norm:g}".replace(".", "")) <= 8 for norm in prompt["norms"][0])
    assert record["high_norm_tokens"][0].keys() == {"prompt", "pos", "token", "peak_block", "norm", "ratio"}
    assert record["high_norm_tokens"][0]["token"] == "<s>"
    assert record["direction"].keys() == {"n_tokens", "mean_pairwise_angle_deg"}


def test_a_trace_without_high_norm_tokens(not_found):
    record = trace_record(not_found.defects)
    assert record["direction"] is None
    assert record["high_norm_tokens"] == record["explosion_blocks"] == record["decay_blocks"] == []


def test_what_is_not_a_number_is_null(findings):
    defects = findings.defects
    norms = defects.trace.norms.clone()
    norms[1, 0], norms[2, 0] = math.nan, math.inf
    direction = replace(defects.direction, mean_pairwise_angle_deg=math.nan)
    record = trace_record(replace(defects, trace=replace(defects.trace, norms=norms, direction=direction)))
    assert record["prompts"][0]["norms"][1][0] is record["prompts"][0]["norms"][2][0] is None
    assert record["direction"]["mean_pairwise_angle_deg"] is None
    through_json(record)


def test_a_spectrum(findings):
    record = spectrum_record(findings.directions)
    assert through_json(record) == record
    assert (record["schema"], record["d_model"], record["n_blocks"]) == ("sd_lens.spectrum/1", 64, 6)
    assert len(record["blocks"]) == 18
    assert (record["reference"], record["notes"]) == ("measured", ["FFN fitted to N(0, I) at the projections"])
    row = next(row for row in record["blocks"] if row["block"] == 4 and row["part"] == "block")
    expected = findings.directions.row(4)
    assert row == {
        "block": 4,
        "part": "block",
        "sigma1": expected.sigma1,
        "sigma2": expected.sigma2,
        "gap": expected.sigma1 / expected.sigma2,
        "angle_deg": expected.angle_deg,
        "eigenvalue": [expected.eigenvalue.real, expected.eigenvalue.imag],
        "eigenvector_angle_deg": expected.eigenvector_angle_deg,
        "residual": expected.residual,
        "converged": True,
        "balance": expected.balance,
    }


def test_a_balance_that_was_not_measured_is_null(not_found):
    assert {row["balance"] for row in spectrum_record(not_found.directions)["blocks"]} == {None}


def test_sublayers(findings):
    record = sublayer_record(findings.attribution, d_model=64, n_blocks=6)
    assert through_json(record) == record
    assert record["schema"] == "sd_lens.sublayers/1"
    assert [(row["block"], row["main_part"]) for row in record["blocks"]] == [(1, "ffn"), (4, "ffn")]
    assert record["blocks"][0]["ffn"] == findings.attribution.shares[0].ffn
    assert sublayer_record(findings.attribution).keys() == record.keys() > HEADER


def test_checks(findings):
    record = check_record(findings.check)
    assert through_json(record) == record
    assert record["schema"] == "sd_lens.check/1"
    assert record["checks"][1] == vars(findings.check.rows[1])
    assert record["analyses"][0] == {
        "analyses": "trace_norms, find_defects, defect_direction",
        "applies": True,
        "because": "",
    }


def test_the_report_holds_all_of_them(findings):
    record = report_record(findings)
    assert through_json(record) == record
    assert record["schema"] == "sd_lens.report/1"
    assert record["sentences"] == list(findings.sentences())
    assert record["trace"] == trace_record(findings.defects)
    assert record["spectrum"] == spectrum_record(findings.directions)
    assert record["patch"] == patch_record(findings.causality)
    assert (record["quantize"], "tokenizer" in record["no_quantize_because"]) == (None, True)
    assert record["signature"]["content_hash"] == findings.uses.signature.content_hash
    assert record["collapse"]["rows"] == findings.propagation.curve.rows()
    assert [row["frobenius"] for row in record["sensitivity"]["rows"]] == findings.propagation.sensitivity.frobenius[0].tolist()
    assert record["no_collapse_because"] is None
    assert {record[part]["n_blocks"] for part in ("trace", "spectrum", "sublayers", "check", "patch")} == {6}


def test_the_report_of_a_model_that_cannot_be_linearised(findings):
    record = report_record(replace(findings, directions=None, no_directions_because="a reason"))
    assert (record["spectrum"], record["no_spectrum_because"]) == (None, "a reason")


def test_the_report_of_a_model_that_cannot_be_run_in_any_precision(findings):
    record = report_record(replace(findings, propagation=None, no_propagation_because="a reason"))
    assert (record["collapse"], record["sensitivity"], record["no_collapse_because"]) == (None, None, "a reason")


def test_a_record_is_written_whole_or_not_at_all(findings, tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_json(trace_record(findings.defects), path)
    before = path.read_text(encoding="utf-8")
    assert json.loads(before) == trace_record(findings.defects)
    assert "🙂" in before

    with pytest.raises(ValueError, match="Out of range float"):
        write_json({"value": math.nan}, path)

    def no_space(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="no space"):
        write_json({}, path)
    assert path.read_text(encoding="utf-8") == before
    assert list(tmp_path.iterdir()) == [path]
