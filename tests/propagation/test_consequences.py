"""Collapse and sensitivity without the explosion subspace: each run is what the single analyses give with that edit."""

from __future__ import annotations

import pytest
import torch
import zoo

from sd_lens.interventions.subspace import ExplosionSubspace
from sd_lens.models.planted import planted
from sd_lens.propagation import consequences
from sd_lens.propagation.collapse import collapse_curve
from sd_lens.propagation.consequences import propagation_consequences
from sd_lens.propagation.probes import probe
from sd_lens.propagation.sensitivity import sensitivity

LENGTHS = [1, 4, 9]


def test_runs_are_those_of_the_single_analyses():
    truth = planted("llama")
    model = truth.model
    one = probe(model, "count-ones", symbols={"one": 12}, prepend_bos=False)
    subspace = ExplosionSubspace.at(model, truth.explosion_block)
    prompt = torch.tensor([[5, 6, 7, 8, 9]])
    found = propagation_consequences(model, one, LENGTHS, prompt=prompt, subspace=subspace, dtypes=["float32"], controls=2)
    assert list(found.curves) == ["untouched", "ablated", "random control 0", "random control 1"]
    edits = {
        "untouched": None,
        "ablated": subspace.ablate(side="both"),
        "random control 1": subspace.ablate(side="both").control(1),
    }
    frame = found.to_dataframe().set_index("run")
    for run, edit in edits.items():
        curve = collapse_curve(model, one, LENGTHS, metrics="linf", dtypes="float32", intervention=edit)
        wanted = curve.values["float32", "final", "linf"]
        assert torch.equal(found.curves[run].values["float32", "final", "linf"], wanted)
        assert frame.loc[run, "longest"] == pytest.approx(wanted[0, -1, 0].item())
        felt = sensitivity(model, prompt, intervention=edit)
        torch.testing.assert_close(found.sensitivities[run].frobenius, felt.frobenius)
        assert frame.loc[run, "high_norm_share"] == pytest.approx(felt.share[0][felt.high_norm].sum().item())
        assert frame.loc[run, "first_norm"] == pytest.approx(felt.frobenius[0, 0].item())
    assert found.sensitivities["untouched"].high_norm[0]
    # A norm divides by the length of what it reads: the first token, which has a high norm, is felt more once it has none.
    assert frame.loc["ablated", "first_norm"] > 2 * frame.loc["untouched", "first_norm"]


def test_estimated_sensitivities():
    truth = planted("llama")
    one = probe(truth.model, "count-ones", symbols={"one": 12}, prepend_bos=False)
    prompt = torch.tensor([[5, 6, 7, 8, 9]])
    found = propagation_consequences(truth.model, one, [1, 2], prompt=prompt, dtypes=["float32"], controls=0, method="hutchinson")
    exact = sensitivity(truth.model, prompt, intervention=None)
    rough = found.sensitivities["untouched"]
    assert ((rough.frobenius - exact.frobenius).abs() <= 4 * rough.standard_error).all()
    assert (rough.standard_error > 0).all()


def test_without_a_prompt():
    truth = planted("gpt2")
    one = probe(truth.model, "count-ones", symbols={"one": 12}, prepend_bos=False)
    found = propagation_consequences(truth.model, one, LENGTHS, dtypes=["bfloat16"], controls=0)
    assert found.block == truth.explosion_block
    assert found.sensitivities == {}
    assert found.to_dataframe()["first_norm"].isna().all()


def test_bad_input(as_users_run_it):
    truth, other = planted("llama"), planted("gpt2")
    for arguments, message in [
        ({"metric": "kl"}, "^metric: got 'kl'"),
        ({"rank": 0}, "^rank: got 0"),
        ({"controls": -1}, "^controls: got -1"),
        ({"seed": -1}, "^seed: got -1"),
        ({"subspace": ExplosionSubspace.at(other.model, 1)}, "^subspace: got one of another model"),
    ]:
        with pytest.raises(ValueError, match=message):
            propagation_consequences(truth.model, "count-ones", LENGTHS, **arguments)


def test_bad_input_is_refused_before_any_pass(as_users_run_it, monkeypatch):
    model = planted("gpt2").model
    one = probe(model, "count-ones", symbols={"one": 12}, prepend_bos=False)

    def run(*_, **__):
        raise AssertionError("a pass")

    monkeypatch.setattr(consequences, "find_defects", run)
    monkeypatch.setattr(consequences, "collapse_curve", run)
    for lengths, prompt, message in [
        (LENGTHS, torch.ones(2, 3, dtype=torch.long), "^prompt: got 2; allowed: one"),
        (LENGTHS, torch.tensor([[10**6]]), "1000000"),
        ([10**6], None, "^lengths: got 1000000"),
    ]:
        with pytest.raises(ValueError, match=message):
            propagation_consequences(model, one, lengths, prompt=prompt)


def test_where_no_block_explodes_a_subspace_must_be_given():
    model = zoo.cached("llama")
    one = probe(model, "count-ones", symbols={"one": 12})
    with pytest.raises(ValueError, match=r"^subspace: got None, and no block explodes; allowed: an ExplosionSubspace"):
        propagation_consequences(model, one, LENGTHS)
