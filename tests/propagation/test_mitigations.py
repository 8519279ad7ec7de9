"""The table of mitigations is made of collapse curves of its settings."""

from __future__ import annotations

import pytest
import torch
import zoo

from sd_lens.models.windows import without_window
from sd_lens.propagation.collapse import collapse_curve
from sd_lens.propagation.mitigations import mitigations
from sd_lens.propagation.probes import probe

OPTIONS = {"symbols": {"zero": 40, "one": 41, "separator": 43}, "prepend_bos": False}
LENGTHS = [2, 7, 20]


def test_every_setting_is_a_curve_of_its_own():
    model = zoo.cached("mistral")
    table = mitigations(model, "repeat-last", LENGTHS, every=[3], dtypes=["float32"], probe_options=OPTIONS)
    frame = table.to_dataframe()
    assert frame["separator_every"].fillna(0).tolist() == [0, 3, 0, 3]
    assert frame["window"].fillna(0).tolist() == [zoo.WINDOW, zoo.WINDOW, 0, 0]
    separated = probe(model, "repeat-last", separator_every=3, **OPTIONS)
    inside = collapse_curve(model, separated, LENGTHS, metrics="linf", dtypes="float32")
    with without_window(model):
        outside = collapse_curve(model, separated, LENGTHS, metrics="linf", dtypes="float32")
    for row, curve in ((1, inside), (3, outside)):
        values = curve.values["float32", "final", "linf"].flatten()
        assert frame.loc[row, ["shortest", "longest", "kept"]].tolist() == pytest.approx(
            [values[0].item(), values[-1].item(), (values[-1] / values[0]).item()]
        )
    assert frame["longest"].nunique() == 4


def test_a_window_stops_dilution():
    """Once a window is full of equal tokens, more of them change nothing: what is left is left at any length."""
    model = zoo.build("mistral")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q.original_component.weight.zero_()
    table = mitigations(model, "repeat-last", [30, 60], every=[], dtypes=["float32"], probe_options=OPTIONS).to_dataframe()
    kept = table.set_index(table["window"].fillna(0))["kept"]
    assert kept[zoo.WINDOW] == pytest.approx(1, abs=1e-3)
    assert kept[0] == pytest.approx(0.5, abs=0.1)


def test_lengths_fit_with_separators():
    model = zoo.cached("llama")
    table = mitigations(model, "count-ones", every=[1], dtypes=["float32"], metric="l2", probe_options=OPTIONS)
    assert table.lengths[-1] <= zoo.CONTEXT // 2
    assert all(setting.curve.lengths == table.lengths for setting in table.settings)


def test_bad_input(as_users_run_it):
    model = zoo.cached("llama")
    for arguments, message in [
        ({"metric": "cosine"}, "^metric: got 'cosine'"),
        ({"every": [0]}, "^every: got 0"),
        ({"probe_options": {"separator_every": 2}}, "^probe_options: got separator_every"),
        ({"dtypes": ["int4"]}, "^dtypes: got 'int4'"),
        ({"lengths": [63]}, "^lengths: got 63"),
    ]:
        with pytest.raises(ValueError, match=message):
            mitigations(model, **({"lengths": LENGTHS, "probe_options": OPTIONS} | arguments))
