"""The over-squashing bound over depth, as a heat map with the first token's share beside it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from sd_lens.display.squashing_figures import squashing_heatmap
from sd_lens.propagation.squashing_result import BlockConstants, SquashingBound


@pytest.fixture
def bound():
    """Two blocks, five tokens, of which the fourth is meant; one position that no path starts from."""
    shares = torch.tensor([[0, 0, 0, 1, 0], [0.2, 0.5, 1e-7, 0.3 - 1e-7, 0], [0.6, 0.3, 0.0, 0.1, 0]], dtype=torch.float64)
    return SquashingBound(
        model_name="made",
        heads="max",
        position=3,
        tokens=torch.arange(5),
        texts=("<s>", "</script>", "$x$", "\n", "after"),
        constants=tuple(BlockConstants(block, 0.5, 1.0, 2.0, 1.0, 1.0, 3.0, 3.0) for block in range(2)),
        beta3=2.0,
        given=(),
        intervention=None,
        shares=shares,
        log10_weight=torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64),
        log10_constant=torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64),
        token_shares=shares.flip(1).roll(-1, 1),
        log10_token_bound=torch.tensor([0.0, 1.0, 1.5], dtype=torch.float64),
    )


def test_cells_are_shares_and_lines_those_of_the_first_token(bound):
    figure = squashing_heatmap(bound)
    heatmap, by_token, theorem = figure.data
    assert list(heatmap.y) == [2, 1, 0]  # no block, one, both
    wanted = np.log10(np.clip(bound.shares[:, :4].numpy(), 1e-4, None))
    np.testing.assert_allclose(heatmap.z, wanted)
    np.testing.assert_allclose(heatmap.customdata[..., 2], bound.log10_bound[:, :4])
    np.testing.assert_allclose(theorem.x, [0.0, 0.2, 0.6])
    np.testing.assert_allclose(by_token.x, [bound.first_column(depth, which="token") for depth in range(3)])
    assert list(theorem.y) == [2, 1, 0]
    assert "60 %" in figure.layout.title.subtitle.text
    assert "constants measured" in figure.layout.title.subtitle.text


def test_tokens_are_names_on_the_axis_and_are_escaped(bound):
    figure = squashing_heatmap(replace(bound, given=("beta1", "sigma_psi"), intervention="ablate"))
    assert list(figure.layout.xaxis.ticktext) == ["&lt;s&gt;", "&lt;/script&gt;", "&#36;x&#36;", "↵"]
    assert figure.layout.title.subtitle.text.endswith("; ablate")
    assert "beta1, sigma_psi given" in figure.layout.title.subtitle.text
    json.loads(figure.to_json())


def test_a_long_prompt_has_numbers_on_the_axis(bound):
    n = 60
    shares = torch.full((3, n), 1 / n, dtype=torch.float64)
    figure = squashing_heatmap(
        replace(bound, position=n - 1, tokens=torch.arange(n), texts=("t",) * n, shares=shares, token_shares=shares)
    )
    assert figure.layout.xaxis.ticktext is None
    assert figure.layout.xaxis.title.text == "position"


def test_plot_is_that_figure(bound):
    assert bound.plot().to_dict().keys() == squashing_heatmap(bound).to_dict().keys()
    np.testing.assert_array_equal(bound.plot().data[0].z, squashing_heatmap(bound).data[0].z)
