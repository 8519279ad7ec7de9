"""Attention views hold the patterns as given, and refuse what are none."""

import json
import math
import re

import pytest
import torch

from sd_lens.display.attention import attention_patterns


def props(view):
    """What CircuitsVis is called with."""
    return json.loads(re.search(r"AttentionHeads,\s*(\{.*\})\s*\)\s*</script>", view.body, re.DOTALL)[1])


def causal(heads, tokens):
    scores = torch.randn(heads, tokens, tokens, generator=torch.Generator().manual_seed(0))
    return scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf).softmax(-1)


def test_patterns_tokens_and_names_are_passed_on_as_written():
    patterns = causal(2, 5)
    tokens = ["<s>", "</script>", " \"q\" & 'x'", "\n", ""]
    shown = props(attention_patterns(patterns, tokens, ["L0H1", "<b>"]))
    assert torch.allclose(torch.tensor(shown["attention"]), patterns, atol=5.1e-5)
    assert shown["tokens"] == ["<s>", "</script>", "·\"q\"·&·'x'", "↵", "∅"]  # drawn on a canvas: no HTML
    assert shown["attentionHeadNames"] == ["L0H1", "<b>"]
    assert (shown["minValue"], shown["maxValue"]) == (-1, 1)


def test_rounding_errors_of_half_precision_are_no_reason_to_refuse():
    patterns = causal(1, 3).to(torch.bfloat16).float() + 2e-4
    assert max(map(max, props(attention_patterns(patterns, list("abc"), ["x"]))["attention"][0])) == 1.0


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (causal(2, 4), r"got shape \(2, 4, 4\) for 1 names and 3 tokens; allowed: \(head, query, key\)"),
        (causal(2, 3), r"got shape \(2, 3, 3\) for 1 names and 3 tokens"),
        (causal(1, 3)[:, :2], r"got shape \(1, 2, 3\) for 1 names and 3 tokens"),
        (causal(1, 3).transpose(1, 2), "got attention to later tokens; allowed: causal patterns"),
        (causal(1, 3).log(), "got values from -inf to 0; allowed: attention after the softmax, 0 to 1"),
        (causal(1, 3) * 2, "got values from 0 to 2; allowed"),
        (causal(1, 3) * math.nan, "got values from nan to nan; allowed"),
    ],
)
def test_what_is_no_pattern_of_these_tokens_is_refused(patterns, message):
    with pytest.raises(ValueError, match=f"patterns: {message}"):
        attention_patterns(patterns, list("abc"), ["L0H0"])


def test_no_head_at_all_is_refused():
    with pytest.raises(ValueError, match="at least one of each"):
        attention_patterns(torch.zeros(0, 3, 3), list("abc"), [])
