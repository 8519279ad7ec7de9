"""Figures, page and record of the quantisation study show the numbers that they are given."""

from __future__ import annotations

import html
import itertools
import json
import math
from dataclasses import replace

import pytest

from sd_lens.applications.calibration import ProjectionRange
from sd_lens.applications.quantization_result import QuantizationStudy, QuantizedRow, Recommendation
from sd_lens.applications.sparing import Search
from sd_lens.display.quantization_figures import quantization_bars
from sd_lens.display.quantization_range_figures import quantization_ranges
from sd_lens.display.quantization_records import quantize_record
from sd_lens.display.quantization_sections import quantization_section, render_quantization
from sd_lens.display.quantization_words import block_of, excess, perplexity, scheme_name

SCHEMES = (("rtn", "per_tensor"), ("smoothquant", "per_tensor"))
ROLES = ("q", "o", "gate", "in", "out")


def down(block):
    return f"model.layers.{block}.mlp.down_proj"


def made(n_blocks=4, explosion=(1,), decay=(3,), *, cost=0.3, full=4.0, schemes=SCHEMES, alone=True, given=None):
    """A study in which rounding each explosion and decay block's down-projection costs so many nats, SmoothQuant half as much."""
    special = tuple(down(block) for block in (*explosion, *decay))
    sets = {"none": (), "explosion and decay": special}
    if alone:
        sets |= {f"block {block}": (down(block),) for block in range(n_blocks)}
    sets |= given or {}
    rows = [QuantizedRow("full precision", "", "none", (), full)]
    for method, granularity in schemes:
        each = cost * (0.5 if method == "smoothquant" else 1.0) * (0.01 if granularity == "per_token" else 1.0)
        for name, names in sets.items():
            left = sum(one not in names for one in special)
            rows.append(QuantizedRow(method, granularity, name, names, full + each * left))
    rows.append(QuantizedRow(*schemes[0], "recommended", special, full))
    search = Search(special, full, True, "", (), 3)
    return QuantizationStudy(
        model_name="made",
        d_model=16,
        n_blocks=n_blocks,
        rows=tuple(rows),
        ranges=tuple(ranged(block, role, schemes, block in (*explosion, *decay)) for block in range(n_blocks) for role in ROLES),
        explosion_blocks=explosion,
        decay_blocks=decay,
        recommendation=Recommendation(*schemes[0], 0.02, search, ("lm_head",), None, full),
        backend="fake",
        window=128,
        stride=127,
        bos=True,
        n_tokens=1270,
        n_calibrated=1270,
        excluded=("lm_head",),
        alpha=0.5,
        notes=("a note of <b>its</b> own",),
    )


def test_without_a_search_the_page_gives_settings_for_the_detected_blocks(study):
    page = render_quantization(replace(study, recommendation=None, rows=study.rows[:-1]))
    assert "was not tried here" in page
    assert (
        page.count("model.layers.1.mlp.down_proj&#34;") == page.count("model.layers.3.mlp.down_proj&#34;") == 2
    )  # torchao's and llm-compressor's


def ranged(block, role, schemes, special):
    outlier = 100.0 if role == "out" and special else 1.0
    decibels = {", ".join(scheme): (5.0 if outlier > 1 else 30.0) + block + number for number, scheme in enumerate(schemes)}
    return ProjectionRange(
        name=down(block) if role == "out" else f"model.layers.{block}.{role}",
        part="",
        block=block,
        role=role,
        input_max=(8.0 + block) * outlier,
        input_typical=4.0,
        weight_max=0.5 * math.sqrt(outlier),
        weight_typical=0.2,
        sqnr_db={name: value + 10.0 for name, value in decibels.items()},
        token_sqnr_db=decibels,
    )


@pytest.fixture
def study():
    return made()


def drawn(figure, kind, **where):
    return [
        trace for trace in figure.data if trace.type == kind and all(getattr(trace, key) == value for key, value in where.items())
    ]


def test_bars_go_from_full_precision_to_each_rows_perplexity(study):
    figure = quantization_bars(study)
    bars = drawn(figure, "bar")
    assert [bar.name for bar in bars] == ["RTN per-tensor", "SmoothQuant per-tensor"]
    assert all(bar.base == pytest.approx(math.exp(4.0)) for bar in bars)
    ends = [[bar.base + x for x in bar.x] for bar in bars]
    assert ends[0] == pytest.approx([math.exp(4.6), math.exp(4.0), math.exp(4.0)])
    assert ends[1] == pytest.approx([math.exp(4.3), math.exp(4.0)])  # recommended for RTN only
    assert [round(y) for y in bars[0].y] == [0, 1, 2]
    assert list(figure.layout.yaxis.ticktext) == [
        "nothing spared",
        "explosion and<br>decay blocks<br>(2 projections)",
        "recommended<br>(2 projections)",
    ]
    beside = [(round(note.y), note.text) for note in figure.layout.annotations]
    assert (0, "99.48 (+82.2 %)") in beside
    assert (0, "73.70 (+35.0 %)") in beside
    assert (1, "54.60 (±0.0 %)") in beside
    assert study.plot().to_dict() == figure.to_dict()


def test_blocks_spared_alone_stand_in_their_rows_with_what_they_bring_back(study):
    figure = quantization_bars(study)
    rtn, smooth = drawn(figure, "scatter", yaxis="y2")
    assert list(rtn.x) == pytest.approx([math.exp(4.6), math.exp(4.3), math.exp(4.6), math.exp(4.3)])
    assert [round(y) for y in rtn.y] == [0, 1, 2, 3]
    gains = [math.exp(4.6) - x for x in rtn.x]
    assert list(rtn.error_x.array) == pytest.approx(gains)
    assert set(rtn.error_x.arrayminus) == {0.0}
    assert list(smooth.x) == pytest.approx([math.exp(4.3), math.exp(4.15), math.exp(4.3), math.exp(4.15)])
    shaded = [(shape.y0, shape.y1) for shape in figure.layout.shapes if shape.type == "rect"]
    assert shaded == [(0.5, 1.5), (2.5, 3.5)]
    lines = sorted({shape.x0 for shape in figure.layout.shapes if shape.type == "line"})
    assert lines == pytest.approx([math.exp(4.0), 1.02 * math.exp(4.0), math.exp(4.3), math.exp(4.6)])
    assert [trace.name for trace in figure.data][-2:] == ["full precision", "budget (+2 %)"]


def test_a_block_that_makes_it_worse_reaches_to_the_other_side(study):
    rows = tuple(replace(row, loss=5.0) if row.spared == "block 0" else row for row in study.rows)
    dots = drawn(quantization_bars(replace(study, rows=rows)), "scatter", yaxis="y2")[0]
    assert (dots.error_x.array[0], dots.error_x.arrayminus[0]) == (0.0, pytest.approx(math.exp(5.0) - math.exp(4.6)))


@pytest.mark.parametrize(("cost", "kind"), [(0.1, "linear"), (3.0, "log")])
def test_every_perplexity_is_within_the_axis_linear_or_logarithmic(cost, kind):
    study = made(cost=cost)
    figure = quantization_bars(study)
    assert figure.layout.xaxis.type == kind
    low, high = figure.layout.xaxis.range
    values = [row.perplexity for row in study.rows]
    values = [math.log10(value) for value in values] if kind == "log" else values
    assert low < min(values)
    # The number beside the longest bar has a quarter of the width.
    assert high - max(values) > 0.25 * (high - low)
    longest = max(note.x for note in figure.layout.annotations if note.xref is None)
    assert longest == pytest.approx(max(values))


def test_without_single_blocks_there_is_one_panel():
    figure = quantization_bars(made(alone=False, given={"my <b>list</b>": (down(0),)}))
    assert not drawn(figure, "scatter", yaxis="y2")
    assert "yaxis2" not in figure.layout.to_plotly_json()
    assert "my &lt;b&gt;list&lt;/b&gt;<br>(1 projection)" in figure.layout.yaxis.ticktext
    assert not [shape for shape in figure.layout.shapes if shape.yref == "y2 domain"]


def test_ranges_and_errors_stand_at_their_blocks(study):
    figure = quantization_ranges(study)
    assert study.plot_ranges().to_dict() == figure.to_dict()
    inputs = {trace.name: trace for trace in drawn(figure, "scatter", yaxis="y")}
    assert list(inputs) == ["down-projection", "queries", "attention output", "gate", "up-projection"]
    thick = inputs["down-projection"]
    assert [math.floor(x + 0.5) for x in thick.x] == [0, 1, 2, 3]
    assert list(thick.y) == [8, 900, 10, 1100]
    assert list(thick.error_y.arrayminus) == [4, 896, 6, 1096]  # down to the typical token's
    assert thick.error_y.thickness > 2 * inputs["gate"].error_y.thickness
    weights = {trace.name: trace for trace in drawn(figure, "scatter", yaxis="y2")}
    assert list(weights["down-projection"].y) == pytest.approx([0.5, 5.0, 0.5, 5.0])
    assert list(weights["queries"].error_y.arrayminus) == pytest.approx([0.3] * 4)
    errors = {trace.name: trace for trace in drawn(figure, "scatter", yaxis="y3")}
    assert list(errors["down-projection, RTN per-tensor"].y) == [30, 6, 32, 8]
    assert list(errors["down-projection, SmoothQuant per-tensor"].y) == [31, 7, 33, 9]
    assert [figure.layout[name].type for name in ("yaxis", "yaxis2", "yaxis3")] == ["log", "log", None]
    assert [(shape.x0, shape.x1, shape.yref) for shape in figure.layout.shapes] == [(0.5, 1.5, "paper"), (2.5, 3.5, "paper")]


def test_each_granularity_has_a_panel_of_its_own():
    both = (("rtn", "per_tensor"), ("rtn", "per_token"))
    figure = quantization_ranges(made(schemes=both))
    panels = [{trace.name for trace in drawn(figure, "scatter", yaxis=f"y{number}")} for number in (3, 4)]
    assert [{"per-token" in name for name in names} for names in panels] == [{False}, {True}]
    domains = [figure.layout[name].domain for name in ("yaxis", "yaxis2", "yaxis3", "yaxis4")]
    assert all(below[1] < above[0] for above, below in itertools.pairwise(domains))
    assert (domains[0][1], domains[-1][0]) == (1, pytest.approx(0, abs=1e-9))


def test_an_unembedding_and_unknown_roles_have_a_place(study):
    first = study.ranges[0]
    more = (replace(first, block=None, role="unembed", name="lm_head"), replace(first, role="<router>", part="p"))
    figure = quantization_ranges(replace(study, ranges=(*study.ranges, *more)))
    inputs = {trace.name: trace for trace in drawn(figure, "scatter", yaxis="y")}
    assert 3.5 < inputs["unembedding"].x[0] < 4.5
    assert figure.layout.xaxis.ticktext[-1] == "un-<br>embed"
    assert "(p)</b>" in inputs["&lt;router&gt;"].customdata[0]


def test_what_was_not_measured_is_not_drawn(study):
    bare = replace(study, ranges=(), recommendation=None, notes=())
    figure = quantization_ranges(bare)
    assert figure.layout.annotations[0].text == "ranges were not measured"
    assert "budget" not in str(quantization_bars(bare).to_dict())
    page = str(quantization_section(bare))
    assert "searches for the smallest set" in page
    assert "Ranges and errors" not in page
    record = json.loads(json.dumps(quantize_record(bare), allow_nan=False))
    assert record["ranges"] == []
    assert all(record[name] is None for name in ("recommended", "within_budget", "budget", "ignore"))


def test_the_page_holds_the_table_the_settings_and_the_notes(study):
    page = render_quantization(study)
    for sentence in study.sentences():
        assert html.escape(sentence).replace("&#x27;", "&#39;") in page
    row = page[page.index("<td>RTN per-tensor</td>") :]
    cells = [cell.split(">")[1] for cell in row[: row.index("</tr>")].split("</td>")[1:-1]]
    assert cells == ["54.60", "99.48", "54.60", "54.60"]
    blocks = page.split('<pre class="scroll"><code>')[1:]
    copied = [html.unescape(block[: block.index("</code>")]) for block in blocks]
    assert copied == [study.recommendation.torchao().rstrip("\n"), study.recommendation.llm_compressor().rstrip("\n")]
    for source in copied:
        compile(source, "settings", "exec")
    assert "A note of &lt;b&gt;its&lt;/b&gt; own." in page
    assert "1,270" in page


def test_the_record_holds_the_studys_numbers(study):
    nan = replace(study.ranges[0], input_typical=float("nan"))
    study = replace(study, ranges=(nan, *study.ranges[1:]))
    record = json.loads(json.dumps(quantize_record(study), allow_nan=False))
    assert (record["schema"], record["model"], record["n_blocks"]) == ("sd_lens.quantize/1", "made", 4)
    assert [row["loss"] for row in record["rows"]] == [row.loss for row in study.rows]
    assert record["rows"][2] == {
        "method": "rtn",
        "granularity": "per_tensor",
        "spared": "explosion and decay",
        "names": [down(1), down(3)],
        "perplexity": pytest.approx(math.exp(4.0)),
        "loss": 4.0,
    }
    assert record["recommended"] == [down(1), down(3)]
    assert record["recommended_for"] == {"method": "rtn", "granularity": "per_tensor"}
    assert (record["within_budget"], record["budget"]) == (True, 0.02)
    assert record["ignore"] == ["lm_head", down(1), down(3)]
    assert (record["explosion_blocks"], record["decay_blocks"]) == ([1], [3])
    assert (record["window"], record["stride"], record["bos"], record["n_tokens"]) == (128, 127, True, 1270)
    assert record["ranges"][0]["input_typical"] is None
    assert record["ranges"][9]["token_sqnr_db"] == [
        {"method": "rtn", "granularity": "per_tensor", "value": 6.0},
        {"method": "smoothquant", "granularity": "per_tensor", "value": 7.0},
    ]
    assert record["notes"] == ["a note of <b>its</b> own"]


def test_names_and_numbers_as_they_are_read(study):
    assert [block_of(name) for name in ("block 12", "none", "block x", "my block 1")] == [12, None, None, None]
    assert scheme_name("smoothquant", "per_token") == "SmoothQuant per-token"

    def at(lost):
        return replace(study.rows[1], loss=study.full.loss + lost)

    shown = [excess(study, at(lost)) for lost in (0.0, -1e-6, -0.0101, 0.1, math.log(9.99), math.log(250.0))]
    assert shown == ["±0.0 %", "±0.0 %", "−1.0 %", "+10.5 %", "+899.0 %", "× 250"]
    assert perplexity(replace(study.rows[1], loss=math.log(12345.678))) == "12,345.68"
    assert perplexity(replace(study.rows[1], loss=100.0)) == "2.69e+43"
