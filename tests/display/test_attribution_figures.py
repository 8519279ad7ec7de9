"""Bars of an attribution are its numbers: the largest parts, the sum of the rest, and the whole."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sd_lens.display.attribution_figures import KIND_NAMES, attribution_bars, attribution_groups
from sd_lens.tracing.components import Component
from sd_lens.tracing.shares import Attribution, Inside, Row

COMPONENTS = (
    Component("embed"),
    Component("pos_embed"),
    *(Component("head", 0, head) for head in range(4)),
    Component("bias", 0),
    Component("ffn", 0),
    *(Component("head", 1, head, keys) for head in range(4) for keys in ("itself", "others")),
    Component("bias", 1),
    Component("ffn", 1),
)
GROUP_ROWS = (Row("initial", "initial", 4), Row("delimiter", "delimiter", 2), Row("other", "other", 90))


def made(values, rows=GROUP_ROWS, *, quantity="norm", model_name="made", residual=0.0, units=None):
    values = torch.as_tensor(values, dtype=torch.float64)
    inside = {}
    if units is not None:
        units = torch.as_tensor(units, dtype=torch.float64)
        neurons = (*(Component("neuron", 1, n) for n in range(units.shape[1] - 1)), Component("ffn_bias", 1))
        inside[1] = Inside(1, neurons, units, units.sum(1))
    return Attribution(
        model_name=model_name,
        quantity=quantity,
        block=1,
        components=COMPONENTS[: values.shape[1]],
        rows=rows[: len(values)],
        values=values,
        total=values.sum(1) + residual,
        inside=inside,
        vector=torch.zeros(4),
        min_ratio=6.0,
    )


@pytest.fixture
def attribution():
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(3, len(COMPONENTS), generator=generator) * torch.tensor([[20.0], [5.0], [0.1]])
    return made(values, units=torch.randn(3, 30, generator=generator))


def bars(figure):
    """Value of each bar by name."""
    return {name: value for trace in figure.data if trace.type == "bar" for name, value in zip(trace.y, trace.x, strict=True)}


def line(figure):
    return next(trace for trace in figure.data if trace.type == "scatter")


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=len(COMPONENTS)), st.integers(1, 20))
def test_the_largest_parts_and_the_rest_add_up_to_all_parts(values, k):
    figure = attribution_bars(made([values]), k=k)
    shown = bars(figure)
    assert sum(shown.values()) == pytest.approx(sum(values), abs=1e-9)
    assert len(shown) <= k + 1
    assert line(figure).x == pytest.approx([sum(values)] * 2, abs=1e-9)


@pytest.mark.parametrize("row", ["initial", "delimiter", "other", None])
def test_bars_are_the_first_of_the_ranking(attribution, row):
    figure = attribution_bars(attribution, row, k=6)
    top = attribution.top(6, row=row)
    assert list(figure.layout.yaxis.categoryarray) == [*top.name, f"{len(COMPONENTS) - 6} others"]
    for name, value in zip(top.name, top.value, strict=True):
        assert bars(figure)[name] == pytest.approx(value)
    shares = {name: share for trace in figure.data[:-1] for name, share in zip(trace.y, trace.customdata, strict=True)}
    for name, share in zip(top.name, top["share"], strict=True):
        assert float(shares[name].removesuffix(" %").replace("−", "-")) == pytest.approx(100 * share, rel=5e-3)
    assert list(line(figure).x) == [pytest.approx(float(attribution.total[attribution.row(row)]))] * 2


def test_bars_are_coloured_and_named_by_kind(attribution):
    kinds = {component.name: component.kind for component in COMPONENTS}
    figure = attribution_bars(attribution, k=len(COMPONENTS))
    for trace in figure.data[:-1]:
        assert {KIND_NAMES[kinds[name]] for name in trace.y} == {trace.name}
    colours = [trace.marker.color for trace in figure.data[:-1]]
    assert len(set(colours)) == len(colours) == 5


def test_a_rest_of_one_part_has_its_own_name(attribution):
    every = {component.name for component in COMPONENTS}
    assert set(bars(attribution_bars(attribution, k=len(COMPONENTS) - 1))) == every
    assert set(bars(attribution_bars(attribution, k=len(COMPONENTS) - 2))) - every == {"2 others"}


def test_bars_too_short_to_be_seen_have_no_number():
    figure = attribution_bars(made([[1000.0, 250.0, -0.2]]))
    texts = {name: text for trace in figure.data[:-1] for name, text in zip(trace.y, trace.text, strict=True)}
    assert texts == {"embedding": "1000 (80.0 %)", "positions": "250 (20.0 %)", "L0H0": ""}


def test_titles_say_what_of_which_tokens_where(attribution):
    assert attribution_bars(attribution).layout.title.text == "What writes the norm of initial tokens in made after block 1"
    trigger = made([[1.0, 2.0]], quantity="trigger")
    assert attribution_bars(trigger).layout.title.text == "What sets off the FFN of block 1 at initial tokens in made"
    assert "units of norm" in attribution_bars(attribution).layout.xaxis.title.text
    assert "no unit" in attribution_bars(trigger).layout.xaxis.title.text
    about = attribution_bars(attribution, k=5).layout.title.subtitle.text
    assert about.startswith(f"mean of 4 tokens; the 5 largest of {len(COMPONENTS)} parts; left unexplained: ")


def test_what_is_left_unexplained_is_said():
    assert attribution_bars(made([[3.0, 1.0]], residual=0.25)).layout.title.subtitle.text.endswith("left unexplained: 0.2")


def test_single_tokens_are_named_as_written():
    figure = attribution_bars(made([[3.0, 1.0]], (Row("<b>$x$\n", "delimiter", 1, 2, 7),), model_name="a <b>& c"))
    expected = "What writes the norm of “&lt;b&gt;&#36;x&#36;↵” (position 7 of prompt 2) in a &lt;b&gt;&amp; c after block 1"
    assert figure.layout.title.text == expected
    assert figure.layout.title.subtitle.text.startswith("all 2 parts")


def test_neurons_are_ranked_inside_of_their_ffn(attribution):
    figure = attribution_bars(attribution, "delimiter", inside=1, k=4)
    top = attribution.top(4, row="delimiter", inside=1)
    shown = bars(figure)
    assert list(figure.layout.yaxis.categoryarray) == [*top.name, "26 others"]
    assert [shown[name] for name in top.name] == pytest.approx(top.value.tolist())
    assert sum(shown.values()) == pytest.approx(float(attribution.inside[1].total[1]))
    assert line(figure).x[0] == pytest.approx(float(attribution.inside[1].total[1]))
    assert figure.layout.title.text == "Which neurons of block 1 write the norm of delimiter tokens in made after block 1"
    assert figure.layout.title.subtitle.text.startswith("neuron ranking; ")


def test_groups_stand_side_by_side_below_their_totals(attribution):
    figure = attribution_groups(attribution, k=5)
    names = list(figure.data[0].y)
    assert names[0] == "all together"
    assert names[-1] == f"{len(COMPONENTS) - 5} others"
    assert names[1 : 1 + 5] == list(figure.layout.yaxis.categoryarray)[1:-1]
    for row, trace in enumerate(figure.data):
        assert trace.name == f"{GROUP_ROWS[row].group} tokens ({GROUP_ROWS[row].n_tokens})"
        assert trace.x[0] == pytest.approx(float(attribution.total[row]))
        assert sum(trace.x[1:]) == pytest.approx(float(attribution.values[row].sum()))
        for name, value in zip(names[1:-1], trace.x[1:-1], strict=True):
            column = next(i for i, component in enumerate(COMPONENTS) if component.name == name)
            assert value == pytest.approx(float(attribution.values[row, column]))
    assert figure.layout.title.text == "What writes the norm of initial, delimiter and other tokens in made after block 1"


def test_tokens_are_averaged_by_group():
    values = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    groups = ("initial", "other", "other", "initial", "other")
    by_token = made(values, tuple(Row("t", group, 1, 0, pos) for pos, group in enumerate(groups)))
    figure = attribution_groups(by_token)
    assert [trace.name for trace in figure.data] == ["initial tokens (2)", "other tokens (3)"]
    means = [values[[0, 3]].mean(0), values[[1, 2, 4]].mean(0)]
    for trace, mean in zip(figure.data, means, strict=True):
        assert sorted(trace.x[1:]) == pytest.approx(sorted(mean.tolist()), rel=1e-5)
        assert trace.x[0] == pytest.approx(float(mean.sum()), rel=1e-5)


def test_nothing_at_all_can_be_drawn():
    nothing = made(np.zeros((2, 4)))
    for figure in (attribution_bars(nothing), attribution_groups(nothing)):
        json.loads(figure.to_json())
        assert set(np.concatenate([trace.customdata for trace in figure.data if trace.type == "bar"])) == {"–"}


def test_what_is_not_there_is_refused(attribution):
    with pytest.raises(ValueError, match="k: got 0; allowed: at least 1"):
        attribution_bars(attribution, k=0)
    with pytest.raises(ValueError, match="k: got 0; allowed: at least 1"):
        attribution_groups(attribution, k=0)
    with pytest.raises(ValueError, match="row: got 'third'; allowed: 0 to 2"):
        attribution_bars(attribution, "third")
    with pytest.raises(ValueError, match="inside: got 0; allowed: 1"):
        attribution_bars(attribution, inside=0)


def test_the_result_draws_itself(attribution):
    assert bars(attribution.plot("other", inside=1)) == bars(attribution_bars(attribution, "other", inside=1))
    assert "What writes the norm" in attribution._repr_html_()
