from dataclasses import replace

import pytest
import torch
import zoo
from layers import random_mixture
from recording import same_state, state

from sd_lens.models import check as check_module
from sd_lens.models.check import check
from sd_lens.models.ffn_input import FFNInput
from sd_lens.models.live import LiveWeights
from sd_lens.models.weights import ModelWeights

FAMILIES = list(zoo.FAMILIES.values())
PRE = "FFN pre-activations"
ALL = (
    "residual hooks",
    "block identity",
    "causality",
    "value vectors",
    "attention output",
    "attention alone",
    PRE,
    "FFN output",
    "FFN input",
)


def _named(keep):
    return pytest.mark.parametrize("family", [family for family in FAMILIES if keep(family)], ids=lambda f: f.name)


def _rows(outcome):
    return {row.check: row for row in outcome.rows}


@_named(lambda family: not family.moe)
def test_a_dense_model_passes_everything(family):
    outcome = check(zoo.cached(family.name))
    if family.name == "hooked_olmo2":  # nothing there shows what the FFN alone reads
        assert not outcome.applies("patch_sweep")
        assert "set_use_hook_mlp_in(True)" in _rows(outcome)["FFN input"].detail
        assert {name for name, row in _rows(outcome).items() if not row.passed} == {"FFN input"}
        return
    assert {name: row.passed for name, row in _rows(outcome).items()} == dict.fromkeys(ALL, True)
    assert all(row.error < 1e-5 for row in outcome.rows if row.error is not None)
    assert outcome.analyses()["applies"].all()
    assert set(outcome.analyses()["because"]) == {""}
    assert outcome.applies("trace_norms")
    assert outcome.applies("linearize")


@_named(lambda family: family.moe)
def test_a_mixture_of_experts_passes_what_it_has_anything_to_show_of(family):
    outcome = check(zoo.cached(family.name))
    assert {name: row.passed for name, row in _rows(outcome).items()} == {**dict.fromkeys(ALL, True), PRE: None}
    assert all(row.error < 1e-5 for row in outcome.rows if row.error is not None)
    assert _rows(outcome)[PRE].detail == "a mixture of experts shows none"
    assert outcome.analyses()["applies"].all()


def test_the_dense_blocks_among_mixtures_show_their_pre_activations():
    sizes = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    outcome = check(zoo.boot("Qwen2Moe", **zoo.SIZES, **sizes, mlp_only_layers=[1]))
    assert {row.check: row.passed for row in outcome.rows} == dict.fromkeys(ALL, True)
    assert _rows(outcome)[PRE].block == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox_parallel", "mixtral", "qwen2_moe"])
def test_other_dtypes_pass_too(name, dtype):
    outcome = check(zoo.build(name, dtype=dtype))
    passed = {**dict.fromkeys(ALL, True), PRE: None} if zoo.FAMILIES[name].moe else dict.fromkeys(ALL, True)
    assert {row.check: row.passed for row in outcome.rows} == passed


def test_tokens_on_the_border_between_two_experts_are_not_compared():
    layer = random_mixture(experts=4, top_k=1, biases=False)
    x = torch.randn(50, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    twins = layer.W_router.clone()
    twins[:, 1] = twins[:, 0] + 1e-7
    settled = check_module._settled(replace(layer, W_router=twins), x)
    assert settled.tolist() == [int(expert) > 1 for expert in (x @ twins).argmax(-1)]
    assert 5 < settled.sum() < 45
    # Where all experts are equal for all tokens, no token is worse than the others.
    assert check_module._settled(replace(layer, W_router=0 * twins), x).all()
    assert check_module._settled(replace(layer, top_k=4), x).all()


def test_a_mixture_that_decides_near_ties_otherwise_passes(monkeypatch):
    model = zoo.build("mixtral")
    with torch.no_grad():
        router = model.blocks[1].mlp.gate.weight
        router[1] = (1 + 1e-6) * router[0]

    class Swapped(Perturbed):
        def _read(self, block):
            weights = self._live[block]
            other = weights.ffn.W_router[:, [1, 0, 2, 3]] if block == 1 else weights.ffn.W_router
            return replace(weights, ffn=replace(weights.ffn, W_router=other))

    monkeypatch.setattr(check_module, "weights_of", lambda model: Swapped(model, "", ""))
    assert _rows(check(model))["FFN output"].passed
    monkeypatch.setattr(check_module, "_settled", lambda ffn, x: torch.ones_like(x[..., 0], dtype=torch.bool))
    assert not _rows(check(model))["FFN output"].passed


# A permanent hook on this point of block 1 breaks this identity: what the model computed is no longer what its weights say.
TAMPERED = {
    "blocks.1.hook_mlp_out": "FFN output",
    "blocks.1.hook_attn_out": "attention output",
    "blocks.1.attn.hook_v": "value vectors",
    "blocks.1.mlp.hook_pre": "FFN pre-activations",
    "blocks.1.hook_resid_post": "block identity",
}


@pytest.mark.parametrize("name", [name for name in zoo.FAMILIES if name.endswith(("llama", "gpt2", "mixtral"))])
def test_an_edit_that_does_not_reach_the_ffn_is_noticed(name, monkeypatch):
    there = check_module.ffn_input
    # An edit of the stream instead changes what the FFN reads by another amount than what it is meant to.
    elsewhere = lambda model, weights: replace(there(model, weights), name=f"blocks.{weights.block}.hook_resid_pre")  # noqa: E731
    monkeypatch.setattr(check_module, "ffn_input", elsewhere)
    outcome = check(zoo.build(name))
    assert _rows(outcome)["FFN input"].passed is False
    assert not outcome.applies("ExplosionSubspace")
    assert outcome.applies("linearize")


@pytest.mark.parametrize("name", [name for name in zoo.FAMILIES if name in ("hooked_llama", "hooked_gpt2")])
def test_a_hook_point_that_is_never_run_is_noticed(name, monkeypatch):
    monkeypatch.setattr(check_module, "ffn_input", lambda model, weights: FFNInput(f"blocks.{weights.block}.hook_mlp_in"))
    assert _rows(check(zoo.build(name)))["FFN input"].detail == "never run: blocks.0.hook_mlp_in"


@pytest.mark.parametrize("point", TAMPERED)
@pytest.mark.parametrize("name", [name for name in zoo.FAMILIES if name.endswith(("llama", "gpt2"))])
def test_a_hook_that_changes_the_model_is_noticed_where_it_does(name, point):
    model = zoo.build(name)
    model.add_hook(point, lambda value, hook: 1.01 * value)
    outcome = check(model)
    broken = TAMPERED[point]
    row = _rows(outcome)[broken]
    assert row.passed is False
    assert row.block == 1
    assert 1e-3 < row.error < 0.1
    assert {row.check for row in outcome.rows if not row.passed} <= {broken, "FFN output", "attention alone", "FFN input"}
    assert not outcome.applies("trace_norms" if broken == "block identity" else "weights_of")


@pytest.mark.parametrize("name", [name for name in zoo.FAMILIES if name.endswith(("llama", "gpt2", "mixtral"))])
def test_what_happens_to_values_on_their_way_out_is_noticed(name):
    model = zoo.build(name)
    model.add_hook("blocks.1.attn.hook_z", lambda value, hook: 1.01 * value)
    outcome = check(model)
    assert {row.check: row.block for row in outcome.rows if row.passed is False} == {"attention alone": 1}
    assert outcome.applies("weights_of")
    assert not outcome.applies("linearize")


@pytest.mark.parametrize("name", [name for name in zoo.FAMILIES if name.endswith(("llama", "gpt2"))])
def test_a_token_that_sees_later_ones_is_noticed(name):
    model = zoo.build(name)
    model.add_hook("blocks.0.hook_resid_pre", lambda value, hook: value + 0.1 * value.mean(1, keepdim=True))
    outcome = check(model)
    assert {row.check for row in outcome.rows if not row.passed} == {"causality"}
    assert not outcome.applies("trace_norms")


class Perturbed(ModelWeights):
    """A model's weights with one tensor of block 1 off by one per cent."""

    def __init__(self, model, part, field):
        self._live, self._part, self._field = LiveWeights(model), part, field

    d_model = property(lambda self: self._live.d_model)

    def __len__(self):
        return len(self._live)

    def _read(self, block):
        weights = self._live[block]
        if block != 1:
            return weights
        layer = getattr(weights, self._part)
        value = getattr(layer, self._field)
        wrong = {
            "norm": lambda: replace(value, gain=1.01 * value.gain),
            "shared": lambda: replace(value, W_out=1.01 * value.W_out),
            "experts": lambda: tuple(replace(expert, W_out=1.01 * expert.W_out) for expert in value),
            "top_k": lambda: value + 1,
            "renormalized": lambda: not value,
        }.get(self._field, lambda: 1.01 * value)()
        return replace(weights, **{self._part: replace(layer, **{self._field: wrong})})


@pytest.mark.parametrize(
    ("part", "field", "broken"),
    [
        ("attention", "norm", {"value vectors", "attention alone"}),
        ("attention", "W_V", {"value vectors", "attention alone"}),
        ("attention", "W_O", {"attention output", "attention alone"}),
        ("ffn", "norm", {"FFN pre-activations", "FFN output"}),
        ("ffn", "W_gate", {"FFN pre-activations", "FFN output"}),
        ("ffn", "W_in", {"FFN pre-activations", "FFN output"}),
        ("ffn", "W_out", {"FFN output"}),
    ],
)
def test_weights_that_are_not_the_models_are_noticed(monkeypatch, part, field, broken):
    monkeypatch.setattr(check_module, "weights_of", lambda model: Perturbed(model, part, field))
    failed = {row.check: row.block for row in check(zoo.cached("llama")).rows if row.passed is False}
    assert failed == dict.fromkeys(broken, 1)


@pytest.mark.parametrize("field", ["W_router", "norm", "W_shared_gate", "shared", "experts", "top_k", "renormalized"])
def test_a_mixture_that_is_not_the_models_is_noticed(monkeypatch, field):
    monkeypatch.setattr(check_module, "weights_of", lambda model: Perturbed(model, "ffn", field))
    failed = {row.check: row.block for row in check(zoo.cached("qwen2_moe")).rows if row.passed is False}
    assert failed == {"FFN output": 1}


@pytest.mark.parametrize("name", [name for name in zoo.FAMILIES if name.endswith(("llama", "gpt2", "mixtral"))])
@pytest.mark.parametrize("raising", [False, True])
def test_a_check_leaves_the_model_as_it_was(name, raising):
    model = zoo.build(name)
    model.blocks[1].train()  # one block in another mode than the rest
    next(model.parameters()).requires_grad_(False)
    kept = []
    model.add_hook("blocks.0.hook_resid_pre", lambda value, hook: kept.append(hook) if not raising else 1 / 0)
    before = state(model)
    if raising:
        with pytest.raises(ZeroDivisionError):
            check(model)
    else:
        check(model)
        assert kept
    assert same_state(before, state(model))


def test_missing_hooks_are_named(monkeypatch):
    monkeypatch.setattr(check_module, "_has_hook", lambda model, name: name != "blocks.1.hook_mlp_out")
    outcome = check(zoo.cached("llama"))
    assert [(row.check, row.passed, row.detail) for row in outcome.rows] == [
        ("residual hooks", False, "missing: blocks.1.hook_mlp_out")
    ]
    assert not outcome.applies("linearize")


def test_the_outcome_as_tables():
    outcome = check(zoo.cached("llama"), seed=1)
    table = outcome.to_dataframe()
    assert table["check"].tolist() == list(ALL)
    assert table["error"].tolist()[1:] == [row.error for row in outcome.rows[1:]]
    assert repr(outcome).endswith("9 of 9 checks passed)")
    assert all(name in outcome._repr_html_() for name in ("FFN output", "block_directions"))
    with pytest.raises(ValueError, match=r"analysis: got 'nonsense'; allowed: one of trace_norms, .*"):
        outcome.applies("nonsense")


@pytest.mark.usefixtures("as_users_run_it")
def test_only_models_are_checked():
    with pytest.raises(ValueError, match="model: got Linear"):
        check(torch.nn.Linear(2, 2))
