"""Findings to draw: a planted explosion whose tokens are hard to write on a page, a model without, traces made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import zoo

HARD = ("<s>", "</script>", " \"quoted\" & 'more'", "🙂", "\n", "\tif", " the", "", "<b>bold</b>", "$x$", "{{ 7 * 7 }}", "\u200b")
"""Token texts that a page may swallow, break on, or show as something else."""


@pytest.fixture(scope="session")
def planted_findings():
    """An explosion in block 1 and a decay in block 4, with the tokens' own names."""
    from shared import planted

    from sd_lens.findings import analyse

    tokens = torch.stack([torch.arange(start, start + 24) for start in (0, 30, 60)])
    return analyse(planted().model, tokens, progress=False)


@pytest.fixture(scope="session")
def findings(planted_findings):
    """The same with token texts that are hard to show."""
    defects = planted_findings.defects
    trace = replace(defects.trace, texts=tuple(HARD[i % len(HARD)] for i in range(len(defects.trace.texts))))
    tokens = tuple(replace(token, token=trace.texts_of(token.prompt)[token.pos]) for token in defects.tokens)
    return replace(planted_findings, defects=replace(defects, trace=trace, tokens=tokens))


@pytest.fixture(scope="session")
def not_found():
    """A random model: no high-norm token, but linear maps."""
    from sd_lens.findings import analyse

    model = zoo.FAMILIES["gpt2"].build()
    return analyse(model, zoo.tokens(model, 3), progress=False)


@pytest.fixture
def make_trace():
    """A trace of one prompt with given norms."""
    from sd_lens.tracing.trace import NormTrace

    def make(norms, texts=None):
        count = norms.shape[1]
        return NormTrace(
            norms=norms,
            tokens=torch.arange(count),
            prompt=torch.zeros(count, dtype=torch.long),
            position=torch.arange(count),
            texts=tuple(texts or (f"t{i}" for i in range(count))),
            model_name="made",
            d_model=8,
            n_blocks=len(norms) - 1,
        )

    return make
