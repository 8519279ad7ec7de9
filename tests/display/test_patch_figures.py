"""What patching changes, as a pair of heat maps."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sd_lens.display.patch_figures import MAX_TICKS, patch_heatmap
from sd_lens.interventions.sweep import PatchSweep


@pytest.fixture
def sweep():
    generator = torch.Generator().manual_seed(0)
    values = 5 + torch.rand(3, 4, generator=generator, dtype=torch.float64)
    values[1, 2] = 1.5
    return PatchSweep(
        model_name="made",
        metric="loss",
        side="trigger",
        over="position",
        blocks=(0, 2, 5),
        indices=(0, 1, 3, 4),
        tokens=("<b>", " the", None, "\n"),
        clean_tokens=("<s>", " the", " cat", "\n"),
        clean=1.0,
        corrupted=5.0,
        values=values,
        control_mean=5 + 0.1 * torch.rand(3, 4, generator=generator, dtype=torch.float64),
        control_std=torch.full((3, 4), 0.25, dtype=torch.float64),
        n_controls=3,
        n_prompts=2,
        rank=1,
        subspace_block=None,
    )


def test_effects_stand_above_those_of_the_controls_in_the_same_colours(sweep):
    figure = patch_heatmap(sweep)
    above, below = figure.data
    np.testing.assert_array_equal(above.z, sweep.effect.numpy())
    np.testing.assert_array_equal(below.z, sweep.control_effect.numpy())
    assert above.zmax == -above.zmin == below.zmax == -below.zmin == 3.5
    assert (above.yaxis, below.yaxis) == (None, "y2")
    assert figure.layout.yaxis.domain[0] > figure.layout.yaxis2.domain[1]
    assert (above.showscale, below.showscale) == (None, False)
    assert list(above.y) == ["0", "2", "5"]
    assert [annotation.text for annotation in figure.layout.annotations] == [
        "the subspace",
        "mean of 3 random displacements of the same length",
    ]
    assert figure.layout.title.text == "Patching the explosion subspace in made"
    wanted = "change of loss (nats per token) (corrupted 5, clean 1), in what the FFN reads, rank 1, each block's own"
    assert figure.layout.title.subtitle.text == wanted
    json.loads(figure.to_json())


def test_cells_say_what_they_are(sweep):
    figure = patch_heatmap(sweep)
    place, what, against = figure.data[0].customdata[1][2]
    assert place == "3 at position 3"  # prompts differ in the token
    assert what == "1.5 (-3.5, 88 % of the way to the clean run)"
    control = float(sweep.control_effect[1, 2])
    assert against == f"random: {control:+.3g} ± 0.25, {abs(-3.5 - control) / 0.25:.1f} standard deviations away"
    assert figure.data[0].customdata[0][0][0] == "&lt;b&gt; ← &lt;s&gt; at position 0"
    assert list(figure.layout.xaxis.ticktext) == ["&lt;b&gt; ← &lt;s&gt;", "·the", "3", "↵"]
    assert list(figure.layout.xaxis.tickvals) == [0, 1, 2, 3]


def test_without_controls_or_a_way_to_go(sweep):
    nan = torch.full((3, 4), math.nan, dtype=torch.float64)
    figure = patch_heatmap(replace(sweep, n_controls=0, control_mean=nan, control_std=nan, clean=5.0))
    assert len(figure.data) == 1
    assert not figure.layout.annotations
    _, what, against = figure.data[0].customdata[1][2]
    assert (what, against) == ("1.5 (-3.5)", "no controls")
    one = patch_heatmap(replace(sweep, n_controls=1, control_std=nan))
    assert one.data[1].customdata[1][2][2] == f"random: {float(sweep.control_effect[1, 2]):+.3g}"
    assert one.layout.annotations[1].text == "mean of 1 random displacement of the same length"
    still = patch_heatmap(replace(sweep, values=torch.full_like(nan, 5.0), control_mean=torch.full_like(nan, 5.0)))
    assert (still.data[0].zmin, still.data[0].zmax) == (-1, 1)
    nothing = patch_heatmap(replace(sweep, values=nan, control_mean=nan))
    assert "the metric is not a number" in [annotation.text for annotation in nothing.layout.annotations]


def test_heads(sweep):
    none = (None,) * 4
    heads = replace(sweep, over="head", side="direction", metric="mine", tokens=none, clean_tokens=none, subspace_block=2, rank=3)
    figure = heads.plot()
    assert figure.layout.xaxis.title.text == "head"
    assert list(figure.layout.xaxis.ticktext) == ["0", "1", "3", "4"]
    assert figure.data[0].customdata[0][3][0] == "head 4"
    about = figure.layout.title.subtitle.text
    assert about.startswith("change of mine (")
    assert about.endswith("heads along left singular vectors, rank 3, that of block 2")


def test_of_many_positions_some_are_named(sweep):
    n = 3 * MAX_TICKS
    wide = replace(
        sweep,
        indices=tuple(range(n)),
        tokens=("a",) * n,
        clean_tokens=("a",) * n,
        values=sweep.values[:, :1].expand(3, n),
        control_mean=sweep.control_mean[:, :1].expand(3, n),
        control_std=sweep.control_std[:, :1].expand(3, n),
    )
    figure = patch_heatmap(wide)
    assert list(figure.layout.xaxis.tickvals) == list(range(0, n, 3))
    assert figure.data[0].z.shape == (3, n)
