"""Figures, page and record of training dynamics show the numbers that they are given."""

from __future__ import annotations

import json
import math

import pytest
import torch

from sd_lens.applications.stability import CheckpointState, DirectionStability
from sd_lens.display.dynamics_figures import direction_stability
from sd_lens.display.dynamics_records import dynamics_record
from sd_lens.display.dynamics_sections import dynamics_section, render_dynamics

NAN = float("nan")


def made(steps, ratios, angles, *, labels=None):
    """A result with these ratios and angles to the last; an explosion is found from a ratio of 6 on."""
    states = tuple(
        CheckpointState(
            label=labels[place] if labels else f"step-{step}",
            step=step,
            found=ratio >= 6,
            explosion_block=2 if ratio >= 6 else None,
            explosion_blocks=(2,) if ratio >= 6 else (),
            max_ratio=ratio,
            n_high=3,
            n_same=1,
            norm=10.0 * ratio,
            ratio=ratio / 2,
            mean_pairwise_angle_deg=5.0,
            angle_to_last_deg=angle,
            angle_to_previous_deg=NAN if place == 0 else angle / 2,
            others_angle_to_last_deg=angle + 1,
            own_angle_to_last_deg=NAN,
        )
        for place, (step, ratio, angle) in enumerate(zip(steps, ratios, angles, strict=True))
    )
    followed = not all(map(math.isnan, angles))
    return DirectionStability(
        model_name=states[-1].label,
        d_model=16,
        n_blocks=4,
        states=states,
        directions=torch.zeros(len(states), 16),
        n_prompts=2,
        n_tokens=40,
        n_vectors=12 if followed else 0,
        min_ratio=6.0,
    )


@pytest.fixture
def found():
    return made([0, 10, 20], [2.0, 7.0, 12.0], [80.0, 30.0, 0.0])


def test_ratios_and_angles_stand_at_their_steps(found):
    figure = direction_stability(found)
    lines = {trace.name: trace for trace in figure.data}
    assert list(lines) == [
        "largest norm",
        "norm of the tokens followed",
        "other tokens’ angle to the last",
        "angle to the previous",
        "angle to the last",
    ]
    assert all(list(trace.x) == [0, 10, 20] for trace in figure.data)
    assert list(lines["largest norm"].y) == [2, 7, 12]
    assert list(lines["norm of the tokens followed"].y) == [1, 3.5, 6]
    assert list(lines["angle to the last"].y) == [80, 30, 0]
    assert list(lines["angle to the previous"].y) == [None, 15, 0]
    assert list(lines["other tokens’ angle to the last"].y) == [81, 31, 1]
    assert [lines[name].yaxis for name in ("largest norm", "angle to the last")] == [None, "y2"]
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.xaxis.type == "linear"
    shaded = [shape for shape in figure.layout.shapes if shape.type == "rect"]
    assert [(shape.x0, shape.x1) for shape in shaded] == [(10, 20)]
    assert "from the emergence on (step 10)" in figure.layout.title.subtitle.text
    assert found.plot().to_dict() == figure.to_dict()
    levels = [shape.y0 for shape in figure.layout.shapes if shape.type == "line"]
    assert levels == [6.0, 90.0]


def test_steps_that_span_orders_of_magnitude_are_on_a_log_scale():
    ratios, angles = [2.0, 7.0, 12.0], [80.0, 30.0, 0.0]
    figure = direction_stability(made([1, 100, 10000], ratios, angles))
    assert figure.layout.xaxis.type == "log"
    shaded = next(shape for shape in figure.layout.shapes if shape.type == "rect")
    assert (shaded.x0, shaded.x1) == (100, 10000)  # in data units, as shapes have them on a log axis
    figure = direction_stability(made([0, 100, 10000], ratios, angles))  # of which 0 has no logarithm
    assert figure.layout.xaxis.type == "category"
    assert list(figure.data[0].x) == ["step 0", "step 100", "step 10000"]


def test_checkpoints_without_steps_stand_under_their_names():
    labels = ["<b>", "$x$", "last"]
    found = made([None, None, None], [2.0, 7.0, 12.0], [80.0, 30.0, 0.0], labels=labels)
    figure = direction_stability(found)
    assert list(figure.data[0].x) == ["&lt;b&gt;", "&#36;x&#36;", "last"]
    shaded = next(shape for shape in figure.layout.shapes if shape.type == "rect")
    assert (shaded.x0, shaded.x1) == (1, 2)
    page = str(dynamics_section(found))
    assert "<td>&lt;b&gt;</td>" in page
    assert "<th>step</th>" not in page


def test_where_nothing_explodes_the_figure_says_so():
    found = made([1, 2], [2.0, 3.0], [NAN, NAN])
    figure = direction_stability(found)
    assert [trace.name for trace in figure.data] == ["largest norm"]
    assert "no high-norm token in the last checkpoint" in figure.layout.title.subtitle.text
    assert not [shape for shape in figure.layout.shapes if shape.type == "rect"]
    assert "The last checkpoint, step 2, has no explosion" in render_dynamics(found)
    record = dynamics_record(found)
    assert (record["found"], record["emergence"], record["settled"]) == (False, None, None)
    assert record["checkpoints"][0]["angle_to_last_deg"] is None


def test_an_emergence_at_the_end_is_a_line():
    figure = direction_stability(made([1, 2], [2.0, 7.0], [50.0, 0.0]))
    lines = [shape for shape in figure.layout.shapes if shape.type == "line" and shape.yref == "paper"]
    assert [(line.x0, line.x1) for line in lines] == [(2, 2)]


def test_angles_above_90_degrees_have_room():
    assert direction_stability(made([1, 2], [2.0, 7.0], [130.0, 0.0])).layout.yaxis2.range[1] > 130


def test_the_page_and_the_record_hold_every_checkpoint(found):
    page = render_dynamics(found)
    for sentence in found.sentences():
        assert sentence[:30].replace("'", "&#39;") in page
    assert "<td>step-10</td>" in page
    assert "How to read this" in page
    record = json.loads(json.dumps(dynamics_record(found), allow_nan=False))
    assert record["schema"] == "sd_lens.dynamics/1"
    assert record["emergence"] == {"label": "step-10", "step": 10}
    assert record["settled"] is None
    assert [row["angle_to_last_deg"] for row in record["checkpoints"]] == [80, 30, 0]
    assert record["checkpoints"][0]["angle_to_previous_deg"] is None
    assert record["checkpoints"][2]["explosion_blocks"] == [2]


def test_high_norm_tokens_that_no_block_makes_have_a_direction_but_no_emergence():
    found = made([1, 2], [3.0, 5.0], [50.0, 0.0])
    none, angles = found.sentences()
    assert none == "The last checkpoint, step 2, has no explosion: it has 3 tokens of high norm, but no block that makes them."
    assert "is 50° at step 1 from where it ends" in angles
    assert [trace.name for trace in direction_stability(found).data][-1] == "angle to the last"
    assert dynamics_record(found)["emergence"] is None
