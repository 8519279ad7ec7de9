"""The layers that run, their names and weights, against the Hugging Face model as transformers builds it."""

from __future__ import annotations

import pytest
import torch
import zoo
from recording import record, same_state, state
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from sd_lens.models.hugging_face import as_linear, plain_copy
from sd_lens.models.loading import load
from sd_lens.models.projections import projections, replaced

# Biases; fused layers of three layouts; a norm shared by parallel sublayers, and one for each; norms behind sublayers only; experts.
NAMES = ["llama_bias", "phi3", "olmo2", "qwen2_moe", "gpt2", "gpt_neox_parallel", "gptj", "falcon_new", "opt"]
FUSED = {
    "phi3": {"qkv_proj", "gate_up_proj"},
    "gpt2": {"c_attn"},
    "gpt_neox_parallel": {"query_key_value"},
    "falcon_new": {"query_key_value"},
}
DOWN = {"gpt2": "c_proj", "gpt_neox_parallel": "dense_4h_to_h", "gptj": "fc_out", "falcon_new": "dense_4h_to_h", "opt": "fc2"}
HOOKED = [name for name, family in zoo.FAMILIES.items() if family.generation == "hooked"]


@pytest.fixture(scope="module", params=NAMES)
def family(request):
    """Its name, its bridge, and a Hugging Face model with the same weights that never saw a bridge."""
    return request.param, zoo.cached(request.param), zoo.hf_model(request.param)


def linear_layers(hf):
    """Weight, one row per output, and bias of every linear layer, by name."""
    return {
        name: (module.weight.T if isinstance(module, Conv1D) else module.weight, module.bias)
        for name, module in hf.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def numbers(one):
    """A projection's rows, each with its bias, in a fixed order: fused layers keep theirs in many."""
    bias = torch.zeros(len(one[0])) if one[1] is None else one[1]
    return sorted(map(tuple, torch.cat([one[0], bias.unsqueeze(1)], 1).tolist()))


def seen(model, chosen, tokens):
    """What every projection reads and answers in one pass, by label."""
    kept = {}

    def keep(label):
        return lambda _, args, output: kept.update({label: (args[0].clone(), output.clone())})

    handles = [one.module.register_forward_hook(keep(one.label)) for one in chosen]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return kept


def test_every_linear_layer_with_its_own_name_and_weights(family):
    name, model, hf = family
    found = {}
    for one in projections(model):
        found.setdefault(one.name, []).append(one)
    wanted = linear_layers(hf)
    assert found.keys() == wanted.keys()
    for layer, parts in found.items():
        whole = torch.cat([one.weight for one in parts])
        bias = None if parts[0].bias is None else torch.cat([one.bias for one in parts])
        assert numbers((whole, bias)) == numbers(wanted[layer])
        if len(parts) == 1 or name == "gpt2":  # GPT-2 puts queries, keys and values one after the other
            torch.testing.assert_close(whole, wanted[layer][0], rtol=0, atol=0)
    assert {layer.rpartition(".")[2] for layer, parts in found.items() if len(parts) > 1} == FUSED.get(name, set())


def test_labels_blocks_and_roles(family):
    name, model, _ = family
    found = projections(model)
    assert len({one.label for one in found}) == len(found)
    blocks = [one.block for one in found]
    assert blocks == [*sorted(blocks[:-1]), None]
    assert all(f".{one.block}." in one.name for one in found[:-1])
    assert (found[-1].role, found[-1].name, found[-1].norm) == ("unembed", "lm_head", "")
    down = [one.name.rpartition(".")[2] for one in found if one.is_down]
    assert down == ([] if name == "qwen2_moe" else [DOWN.get(name, "down_proj")] * model.cfg.n_layers)


def test_the_modules_compute_with_these_weights(family):
    _, model, _ = family
    chosen = projections(model)
    before, tokens = state(model), zoo.tokens(model)
    for one, (read, answer) in zip(chosen, seen(model, chosen, tokens).values(), strict=True):
        torch.testing.assert_close(answer, functional.linear(read, one.weight, one.bias), rtol=1e-5, atol=1e-5)
    assert same_state(before, state(model))


def test_projections_behind_one_norm_read_the_same(family):
    name, model, _ = family
    chosen = projections(model)
    read = {label: x.flatten(0, -2) for label, (x, _) in seen(model, chosen, zoo.tokens(model)).items()}
    stream = record(model, zoo.tokens(model), ["blocks.1.hook_resid_pre"])["blocks.1.hook_resid_pre"].flatten(0, 1)
    groups = {}
    for one in chosen:
        if one.block == 1 and one.norm:
            groups.setdefault(one.norm, []).append(one)
        elif one.block == 1 and one.role == "q":
            assert name == "olmo2"
            assert torch.equal(read[one.label], stream)
    for members in groups.values():
        for one in members:
            assert torch.equal(read[one.label], read[members[0].label])
    sizes = {"olmo2": [], "gptj": [4], "qwen2_moe": [3, 3], "opt": [1, 3], "gpt2": [1, 3], "phi3": [2, 3], "llama_bias": [2, 3]}
    assert sorted(map(len, groups.values())) == sizes.get(name, [1, 3])


def test_a_plain_copy_computes_the_same(family):
    _, model, hf = family
    tokens = zoo.tokens(model)
    copied = plain_copy(model)
    with torch.no_grad():
        assert torch.equal(copied(tokens).logits, hf(tokens).logits)
    assert not copied.training
    assert {id(parameter) for parameter in copied.parameters()}.isdisjoint(map(id, model.original_model.parameters()))


def test_a_plain_copy_in_half_precision_keeps_what_is_more_precise():
    model = load("tiny", dtype=torch.bfloat16)
    tokens = torch.randint(3, 1000, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(plain_copy(model)(tokens).logits, model(tokens))


@pytest.mark.usefixtures("as_users_run_it")
def test_drawing_a_copy_leaves_random_numbers_alone():
    before = torch.get_rng_state()
    projections(zoo.cached("gpt2"))
    plain_copy(zoo.cached("gpt2"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", HOOKED[:2])
def test_models_that_are_no_bridges_are_refused(name):
    for ask in (projections, plain_copy):
        with pytest.raises(ValueError, match="got HookedTransformer, whose projections are no layers of a Hugging Face model"):
            ask(zoo.cached(name))


@pytest.mark.usefixtures("as_users_run_it")
def test_hugging_face_models_are_refused():
    with pytest.raises(ValueError, match="model: got LlamaForCausalLM; allowed: a TransformerLens model"):
        projections(zoo.hf_model("llama"))


def test_conv1d_as_linear():
    conv = Conv1D(5, 3)
    nn.init.normal_(conv.bias)
    x = torch.randn(2, 3)
    torch.testing.assert_close(as_linear(conv)(x), conv(x))
    linear = nn.Linear(2, 2)
    assert as_linear(linear) is linear


def test_replaced_layers_come_back_also_after_an_error():
    model, tokens = zoo.cached("llama"), zoo.tokens(zoo.cached("llama"))
    chosen = [one for one in projections(model) if one.is_down]
    with torch.no_grad():
        plain = model(tokens)

    def silent(x):
        return torch.zeros(*x.shape[:-1], zoo.D_MODEL)

    with replaced(chosen, [silent] * len(chosen)), torch.no_grad():
        outer = model(tokens)
        with replaced(chosen[:1], [lambda x: silent(x) + 1]):
            assert not torch.equal(model(tokens), outer)
        assert torch.equal(model(tokens), outer)
    assert not torch.equal(outer, plain)
    for error in (ZeroDivisionError, KeyboardInterrupt):
        with pytest.raises(error), replaced(chosen, [silent] * len(chosen)):
            raise error
    with torch.no_grad():
        assert torch.equal(model(tokens), plain)
    assert not any("forward" in one.module.__dict__ for one in chosen)
