"""Tokens appear as written, coloured by their values."""

import json
import math
import re

import pytest
import torch

from sd_lens.display.labels import visible
from sd_lens.display.tokens import colored_tokens, peak_block, token_view
from sd_lens.tracing.trace import MIN_RATIO


def props(view):
    """What CircuitsVis is called with."""
    return json.loads(re.search(r"ColoredTokens,\s*(\{.*\})\s*\)\s*</script>", view.body, re.DOTALL)[1])


@pytest.mark.parametrize(
    ("token", "shown"),
    [(" the", "·the"), ("\n", "↵"), ("\t", "⇥"), ("\r", "␍"), ("", "∅"), ("\x07", "\\x07"), ("\u200b", "\\u200b"), ("é🙂", "é🙂")],
)
def test_what_cannot_be_seen_is_shown(token, shown):
    assert visible(token) == shown


def test_tokens_are_escaped_and_line_breaks_kept():
    view = token_view(["<s>", "</script>", "a\n", "\"&'", "↵"], [0.0, 1.0, 2.0, 3.0, 4.0])
    assert props(view)["tokens"] == ["&lt;s&gt;", "&lt;/script&gt;", "a↵\n", "&quot;&amp;&#x27;", "↵"]
    assert view.body.count("</script>") == 1


def test_a_token_that_looks_like_the_call_is_not_taken_for_it():
    view = token_view(["CircuitsVis.render(", '<div id="x">'], [0.0, 1.0])
    assert props(view)["tokens"][0] == "CircuitsVis.render("
    assert view.body.startswith('<div class="token-view"><div id="circuits-vis-')


@pytest.mark.parametrize(("tokens", "values"), [(["a", "b"], [1.0]), (["a"], [1.0, 2.0]), ([], [])])
def test_lengths_are_compared(tokens, values):
    with pytest.raises(ValueError, match=f"values: got {len(values)} for {len(tokens)} tokens; allowed: one value per token"):
        token_view(tokens, values)


def test_infinite_values_are_refused():
    with pytest.raises(ValueError, match="values: got an infinite one; allowed: finite values and NaN"):
        token_view(["a", "b"], [math.inf, 1.0])


def test_missing_values_are_white():
    assert props(token_view(["a", "b"], [math.nan, 2.0]))["values"] == [0.0, 2.0]


def test_colours_are_logarithms_relative_to_the_median(findings):
    trace = findings.defects.trace
    shown = props(colored_tokens(trace, 1))
    point = findings.defects.tokens[0].peak_block + 1
    expected = (trace.norms[point] / trace.reference[point]).log10()[trace.prompt == 1]
    assert shown["values"] == pytest.approx(expected.tolist(), abs=1e-3)
    assert shown["maxValue"] == -shown["minValue"] == pytest.approx(float(trace.ratios[point].max().log10()))


def test_views_to_be_compared_share_a_scale(findings):
    trace = findings.defects.trace
    views = [props(colored_tokens(trace, 0, block, max_ratio=100.0)) for block in (0, 2)]
    assert [shown["maxValue"] for shown in views] == [2.0, 2.0]
    assert views[0]["values"] == props(colored_tokens(trace, 0, 0))["values"]


def test_ordinary_tokens_stay_pale_where_nothing_explodes(not_found):
    shown = props(colored_tokens(not_found.defects.trace))
    assert shown["maxValue"] == pytest.approx(math.log10(MIN_RATIO))
    assert max(map(abs, shown["values"])) < math.log10(5)


def test_the_default_block_is_where_a_norm_stands_out_most(findings):
    trace = findings.defects.trace
    assert peak_block(trace) == max(findings.defects.tokens, key=lambda token: token.ratio).peak_block
    assert props(colored_tokens(trace, 0))["values"] == props(colored_tokens(trace, 0, peak_block(trace)))["values"]
    assert props(colored_tokens(trace, 0))["values"] != props(colored_tokens(trace, 0, 5))["values"]


@pytest.mark.parametrize("norms", [torch.ones(3, 1), torch.zeros(3, 4), torch.full((3, 4), math.nan)])
def test_traces_without_a_median_can_be_shown(make_trace, norms):
    assert set(props(colored_tokens(make_trace(norms)))["values"]) == {0.0}


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"block": 6}, "block"),
        ({"block": -1}, "block"),
        ({"prompt": 3}, "prompt"),
        ({"max_ratio": 1.0}, "max_ratio"),
        ({"max_ratio": math.nan}, "max_ratio"),
    ],
)
def test_blocks_and_prompts_that_are_not_there_are_refused(findings, arguments, name):
    with pytest.raises(ValueError, match=f"{name}: got"):
        colored_tokens(findings.defects.trace, **arguments)
