"""Figures of responses and coefficients show the numbers that they are given."""

import pytest
import torch

from sd_lens.display.response_figures import coefficient_scatter, response_curve, singular_probe
from sd_lens.interventions.coefficients import Coefficients
from sd_lens.interventions.responses import ResponseCurve, SingularProbe


def test_a_response_curve_is_drawn_in_the_order_of_its_lengths():
    scales = torch.tensor([4.0, 1.0, 2.0])
    curve = ResponseCurve("made", 3, 1, scales, scales**2, scales / 10, 5 * scales, 64)
    figure = response_curve(curve)
    assert [trace.name for trace in figure.data] == ["true FFN, +c v1", "true FFN, −c v1", "linear map, σ c"]
    assert list(figure.data[0].x) == [1, 2, 4]
    assert list(figure.data[0].y) == [1, 4, 16]
    assert list(figure.data[2].y) == [5, 10, 20]
    assert "block 3" in figure.layout.title.text
    assert "power 2.00" in figure.layout.title.subtitle.text
    assert "√d = 8" in figure.layout.title.subtitle.text
    unknown = ResponseCurve("made", 3, 0, scales[:1], scales[:1], scales[:1], scales[:1] * float("nan"), 64)
    figure = unknown.plot()
    assert len(figure.data) == 2
    assert "power" not in figure.layout.title.subtitle.text


def test_a_probe_is_drawn_as_bars_beside_random_directions():
    probe = SingularProbe("made", 2, torch.tensor([3.0, 1.0]), torch.tensor([90.0, 4.0]), torch.tensor([2.0, 3.0]), 1.5, 2.5)
    figure = singular_probe(probe)
    assert list(figure.data[0].y) == [90, 4]
    assert figure.data[0].customdata.tolist() == [[3, 2], [1, 3]]
    assert figure.layout.shapes[0].y0 == 1.5
    assert probe.spike == pytest.approx(22.5)
    assert probe.plot().to_dict() == figure.to_dict()


def test_coefficients_are_drawn_over_positions_with_tokens_as_text():
    coefficients = Coefficients(
        model_name="made",
        block=2,
        side="trigger",
        values=torch.tensor([[8.0, 1.0], [-1.0, 2.0], [0.5, 3.0]]),
        tokens=torch.tensor([0, 7, 9]),
        prompt=torch.tensor([0, 0, 0]),
        position=torch.tensor([0, 1, 2]),
        texts=("<s>", "a\n", "</b>"),
    )
    first, later = coefficient_scatter(coefficients).data
    assert list(first.y) == [8]
    assert list(later.y) == [-1, 0.5]
    assert [row[0] for row in later.customdata] == ["a↵", "&lt;/b&gt;"]
    assert "right singular vector" in coefficients.plot().layout.title.subtitle.text
    assert coefficients.top(1)["token"].item() == "<s>"
    assert list(coefficients.to_dataframe()) == ["prompt", "pos", "token", "id", "c0", "c1"]
    assert repr(coefficients) == "Coefficients(made, trigger of block 2: 3 tokens, largest 8 at '<s>', position 0)"
