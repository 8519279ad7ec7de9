import math

import pytest
import torch
import zoo
from tokenizer import with_tokenizer

from sd_lens.models.planted import planted
from sd_lens.tracing import pathways
from sd_lens.tracing.pathways import scan_vocabulary


def test_untrained_ids_are_scanned_but_not_ranked():
    truth = planted("gpt2", pathway="embedding")
    with torch.no_grad():
        truth.model.W_E[[10, 11]] = 0.0
        truth.model.W_E[96] *= 0.05  # still all trigger once it is normed
    scan = scan_vocabulary(truth.model, "no_attention", block=1, control=0)
    assert (~scan.trained).nonzero().flatten().tolist() == [10, 11, 96]
    assert float(scan.ratios[96]) > 6
    assert scan.self_exploding().empty
    assert scan.share_exploding == 0
    assert not {10, 11, 96} & set(scan.top(97).id)
    assert len(scan.top(97)) == 94
    assert repr(scan).startswith("VocabularyScan(planted, no_attention: 0 of 94 trained ids")
    frame = scan.to_dataframe()
    assert frame.id.tolist() == list(range(97))
    assert frame.trained.tolist() == scan.trained.tolist()
    only = scan_vocabulary(truth.model, ids=[10, 96], control=0)
    assert only.top().empty
    assert math.isnan(only.share_exploding)


def test_tables():
    model = with_tokenizer("llama")
    scan = scan_vocabulary(model, ids=[40, 10, 5, 99], block=0, control=0)
    order = scan.norms.argsort(descending=True)
    top = scan.top(3)
    assert top.columns.tolist() == ["rank", "id", "token", "norm", "ratio", "coefficient"]
    assert top["rank"].tolist() == [1, 2, 3]
    assert top.id.tolist() == scan.ids[order[:3]].tolist()
    assert top.token.tolist() == [model.tokenizer.decode([token]) for token in top.id]
    assert top.norm.tolist() == scan.norms[order[:3]].tolist()
    assert top.ratio.tolist() == pytest.approx((scan.norms[order[:3]] / scan.reference).tolist())
    by_coefficient = scan.top(1, by="coefficient")
    assert by_coefficient.coefficient.tolist() == [float(scan.coefficients.max())]
    frame = scan.to_dataframe()
    assert frame.id.tolist() == [40, 10, 5, 99]
    assert frame.columns.tolist() == [*top.columns[1:], "trained"]
    least = float(scan.ratios.sort().values[2])
    if least > 1:
        assert len(scan.self_exploding(least - 1e-6)) == 2
    second = scan_vocabulary(model, "second", ids=[40, 10, 5, 99], block=0, control=0)
    row = second.top(1).iloc[0]
    place = second.ids.tolist().index(row.id)
    assert row.after == model.tokenizer.decode([int(second.others[place])])
    assert row.initial_norm == float(second.initial_norms[place])
    assert row.initial_ratio == pytest.approx(float(second.initial_norms[place]) / second.reference)
    assert row.initial_coefficient == float(second.initial_coefficients[place])
    assert "tokenizer" not in repr(scan)
    for k in (0, -3):
        with pytest.raises(ValueError, match=f"^k: got {k}; allowed: at least 1"):
            scan.top(k)
    with pytest.raises(ValueError, match=r"^min_ratio: got 1\.0; allowed: above 1"):
        scan.self_exploding(1.0)


def test_a_block_that_cannot_be_linearised_has_no_coefficients(monkeypatch):
    def refuse(weights):
        raise ValueError("model: it has no such thing; allowed: others")

    monkeypatch.setattr(pathways, "trigger_direction", refuse)
    scan = scan_vocabulary(zoo.cached("llama"), "second", ids=[4, 5], block=1, control=0)
    assert scan.notes == ("no coefficients: model: it has no such thing; allowed: others",)
    assert bool(scan.coefficients.isnan().all())
    assert bool(scan.initial_coefficients.isnan().all())
    assert bool(torch.isfinite(scan.initial_norms).all())
    with pytest.raises(ValueError, match=r"^by: got 'coefficient' of a scan without coefficients"):
        scan.top(by="coefficient")
    assert len(scan.top()) == 2
