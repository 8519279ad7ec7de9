"""Sections and records of interventions: the table, the texts, and what is said where there is nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from sd_lens.display.intervention_records import patch_record
from sd_lens.display.intervention_sections import removal, response
from sd_lens.display.report import render_causality
from sd_lens.interventions.generation import Continuation


class Cells(HTMLParser):
    """The rows of each table."""

    def __init__(self, fragment):
        super().__init__()
        self.tables, self._in_cell = [], False
        self.feed(fragment)

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        self._in_cell &= tag not in ("td", "th")

    def handle_data(self, data):
        if self._in_cell:
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def causality(planted_findings):
    return planted_findings.causality


def with_texts(causality, *texts):
    found = [Continuation("<s>def f():\n", "none", "none", "none", texts[0], (1, 2), 2)]
    found += [Continuation("<s>def f():\n", "ablate", "both", "everywhere", text, (1, 3), 1) for text in texts[1:]]
    return replace(causality, consequences=replace(causality.consequences, continuations=tuple(found)))


def test_the_table_shows_every_row_that_edited_something(causality):
    found = causality.consequences
    [table] = Cells(str(removal(causality))).tables
    heading, *rows = table
    edited = [row for row in found.rows if row.n_tokens]
    assert len(rows) == 1 + len(edited) < len(found.rows)  # nothing is a delimiter there
    # The model has no sink head.
    assert heading == ["", "side", "tokens", "of them", "loss", "KL", "peak norm", "its ratio", "high-norm tokens", "sink rate"]
    before = found.untouched.measures
    assert rows[0][:5] == ["untouched", "–", "–", "0", f"{before.loss:.3f}"]
    control = next(row for row in edited if row.intervention == "random control")
    shown = next(row for row in rows if row[0] == "control")
    assert shown[1:4] == [control.side, "initial", "3"]
    assert shown[7] == f"{control.measures.peak_ratio:,.0f}\xa0±\xa0{control.spread.peak_ratio:,.0f}"


def test_texts_are_side_by_side_with_their_line_breaks_and_escaped(causality):
    hard = with_texts(causality, "    return 1\n", "</td><script>\ta</script> \u200b")
    _, [heading, [prompt, untouched, ablated]] = Cells(str(removal(hard))).tables
    assert heading == ["prompt", "untouched", "ablated, everywhere"]
    assert (prompt, untouched) == ("<s>def f():↵\n", "    return 1↵\n")
    assert ablated == "</td><script>⇥a</script> \\u200b"


def test_a_page_of_its_own(causality):
    page = render_causality(causality)
    assert 'id="figure-consequences"' in page
    assert 'id="figure-response"' in page
    assert "<dt>Explosion subspace</dt>" in page
    for sentence in causality.sentences():
        assert sentence in page


def test_where_nothing_explodes_there_is_no_section(not_found):
    assert removal(not_found.causality) is None
    assert response(not_found.causality) is None
    page = render_causality(not_found.causality)
    assert "No explosion was found" in page
    assert "<dt>Explosion subspace</dt>" not in page


def test_the_record(causality):
    found = causality.consequences
    record = patch_record(with_texts(causality, "a\n", "b"))
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["schema"] == "sd_lens.patch/1"
    assert (record["block"], record["rank"], record["n_high"], record["missing"]) == (1, 2, 3, {})
    assert len(record["rows"]) == len(found.rows)
    for row, kept in zip(found.rows, record["rows"], strict=True):
        assert (kept["intervention"], kept["side"], kept["where"], kept["n_tokens"]) == (
            row.intervention,
            row.side,
            row.where,
            row.n_tokens,
        )
        assert kept["kl"] == row.measures.kl
        assert kept["sink_attention"] is None
        assert math.isnan(row.measures.sink_attention)
        assert ("loss_std" in kept) == (row.intervention == "random control")
    assert record["texts"][1] == {
        "prompt": "<s>def f():\n",
        "intervention": "ablate",
        "side": "both",
        "where": "everywhere",
        "text": "b",
        "ids": [1, 3],
        "n_same": 1,
    }
    curve = causality.response
    assert record["response"]["answer"] == curve.answers.tolist()
    assert record["response"]["exponent"] == curve.exponent


def test_the_record_where_there_is_no_subspace(not_found):
    record = patch_record(not_found.causality)
    assert record["missing"] == {"consequences": "no explosion was found", "response": "no explosion was found"}
    assert record.keys() == patch_record(not_found.causality).keys() >= {"block", "rank", "rows", "texts", "notes"}
    assert all(record[key] is None for key in ("block", "rank", "rows", "texts", "response"))
