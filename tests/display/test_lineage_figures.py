"""Angles as a map, trees as brackets, and signatures on a page and as a record."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from sd_lens.applications.lineage import compare
from sd_lens.applications.signature import Signature, with_sign
from sd_lens.display.lineage_figures import MAX_NUMBERS, lineage_map
from sd_lens.display.signature_records import distances_record, signature_record
from sd_lens.display.signature_sections import render_signatures, signature_section


def made(direction, name, d_model=16):
    return Signature(
        direction=direction,
        model_name=name,
        d_model=d_model,
        n_blocks=4,
        method="weights",
        block=None if direction is None else 2,
        because="nothing stands out" if direction is None else "",
        gap=None if direction is None else 3.5,
        notes=("FFN fitted to something",),
    )


@pytest.fixture(scope="module")
def distances():
    """Two families of two, a model of another width, one without a defect; names that a page may swallow."""
    vectors = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    vectors = torch.stack([vectors[0], vectors[1], vectors[0] + 0.1 * vectors[2], vectors[1] + 0.1 * vectors[3]])
    names = ("<b>base</b>", "other $x$", "</script> child", "%{y} child")
    found = [made(with_sign(vector), name) for vector, name in zip(vectors, names, strict=True)]
    wide = made(with_sign(torch.ones(20)), "wide", d_model=20)
    return compare([made(None, "quiet"), *found, wide])


def test_the_map_has_the_angles_in_the_order_of_the_tree(distances):
    figure = lineage_map(distances)
    cells, *branches = figure.data
    order = list(distances.order)
    np.testing.assert_array_equal(cells.z, distances.angles.numpy()[np.ix_(order, order)])
    assert {order.index(1), order.index(3)} in ({0, 1}, {2, 3})  # kin stand side by side
    assert order[4:] == [5, 0]
    assert list(figure.layout.xaxis.ticktext) == list(figure.layout.yaxis.ticktext)
    assert figure.layout.xaxis.ticktext[order.index(1)] == "&lt;b&gt;base&lt;/b&gt;"
    assert figure.layout.xaxis.ticktext[order.index(2)] == "other &#36;x&#36;"
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]  # the first row is on top, so that the diagonal falls
    heights = [max(branch.y) for branch in branches[:3]]
    np.testing.assert_allclose(heights, distances.trees[0].merges[:, 2].numpy())
    last = branches[2]
    assert sorted(last.y) == sorted([*heights[:2], heights[2], heights[2]])
    assert sorted({x for x in last.x}) == [0.5, 2.5]
    assert list(branches[3].x) == [4, 4]  # a model alone
    assert "grey: cannot be compared" in figure.layout.title.subtitle.text
    assert "3 families, 1 model without a defect" in figure.layout.title.subtitle.text
    json.loads(figure.to_json())


def test_what_a_pointer_reads(distances):
    figure = lineage_map(distances)
    order = list(distances.order)
    base, quiet, wide, child = (order.index(i) for i in (1, 0, 5, 3))
    hover = figure.data[0].customdata
    angle = distances.angles[1, 3].item()
    assert hover[base][child].startswith("&lt;b&gt;base&lt;/b&gt;, &lt;/script&gt; child<br>")
    assert f"{angle:.1f}°, same lineage<br>random directions: " in hover[base][child]
    assert hover[base][wide].endswith("cannot be compared: their widths differ (16 and 20)")
    assert hover[quiet][quiet] == "quiet<br>nothing stands out"
    assert figure.data[0].text[base][child] == f"{angle:.0f}°"
    assert figure.data[0].text[base][quiet] == "–"


def test_many_one_and_none():
    vectors = torch.randn(MAX_NUMBERS + 1, 8, generator=torch.Generator().manual_seed(1))
    many = compare([made(with_sign(vector), "m", 8) for vector in vectors])
    assert many.plot().data[0].text is None
    one = compare([made(with_sign(vectors[0]), "m", 8)])
    assert one.plot().data[0].z.tolist() == [[0.0]]
    none = compare([made(None, "a"), made(None, "b")])
    assert "no defect was found in any of them" in [note.text for note in none.plot().layout.annotations]


def test_the_page_says_what_the_comparison_says(distances):
    page = render_signatures(distances)
    assert "3 families among 6 models" in page
    assert "</script> child" not in page
    assert "&lt;/script&gt; child" in page
    text = re.sub(r"<[^>]+>", " ", page[page.rindex("<body>") :])
    for needle in ("same lineage", "unrelated", "cannot be compared", "their widths differ (16 and 20)", "for width 16, "):
        assert needle in text
    alone = compare([distances.signatures[1]])
    single = render_signatures(alone)
    assert alone.signatures[0].content_hash in single
    assert "block 2&#39;s FFN" in single
    fragment = signature_section(distances.signatures[1])
    index, value = distances.signatures[1].largest()[0]
    assert f"+{value:.3f} at {index}" in fragment
    assert "has no signature by weights: nothing stands out." in signature_section(distances.signatures[0])


def test_records_are_json_with_null_for_what_is_missing(distances):
    record = json.loads(json.dumps(distances_record(distances), allow_nan=False))
    assert record["schema"] == "sd_lens.signature_distances/1"
    assert [model["name"] for model in record["models"]] == list(distances.names)
    matrix = np.array(record["distances_deg"], dtype=float)
    np.testing.assert_array_equal(matrix, distances.angles.numpy())
    assert record["distances_deg"][0][0] is None
    assert len(record["verdicts"]) == 15
    assert record["verdicts"][0] == {
        "a": "quiet",
        "b": "<b>base</b>",
        "angle_deg": None,
        "verdict": "cannot be compared",
        "because": "no defect was found in quiet",
        "chance_mean_deg": None,
        "chance_std_deg": None,
        "probability": None,
        "note": "",
    }
    assert [level["d_model"] for level in record["chance_deg"]] == [16, 20]
    tree = record["trees"][0]
    assert len(tree["merges"]) == len(tree["leaves"]) - 1 == 3
    one = signature_record(distances.signatures[1])
    assert one["content_hash"] == distances.signatures[1].content_hash
    assert one["largest"][0]["value"] > 0
