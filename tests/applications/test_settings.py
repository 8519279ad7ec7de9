"""Settings that are printed do what they say: executed, not read."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from sd_lens.applications.settings import compressor_ignore, compressor_settings, filter_fn, torchao_settings
from sd_lens.models.hugging_face import plain_copy
from sd_lens.models.loading import load

SPARED = ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]


def linear_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_filter_fn_takes_all_linear_layers_but_those_named():
    model = plain_copy(load("tiny"))
    chosen = filter_fn(SPARED, ["lm_head"])
    taken = {name for name, module in model.named_modules() if chosen(module, name)}
    assert taken == linear_names(model) - {*SPARED, "lm_head"}
    assert len(taken) == 7 * 6 - 2


@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
def test_printed_torchao_source_quantises_the_same_layers(granularity):
    pytest.importorskip("torchao", reason="needs sd-lens[quantization]")
    model = plain_copy(load("tiny"))
    names, before = linear_names(model), {name: value.clone() for name, value in model.state_dict().items()}
    defined = {"model": model}
    exec(torchao_settings(SPARED, ["lm_head"], granularity), defined)
    assert defined["spared"] == [*SPARED, "lm_head"]
    left = {name for name in names if type(model.get_submodule(name).weight) is nn.Parameter}
    assert left == {*SPARED, "lm_head"}
    for name in left:
        assert torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"])
    weight = model.get_submodule("model.layers.3.mlp.down_proj").weight
    assert weight.qdata.dtype == torch.int8
    assert weight.scale.numel() == (1 if granularity == "per_tensor" else 128)
    exact = before["model.layers.3.mlp.down_proj.weight"]
    torch.testing.assert_close(weight.dequantize(), exact, rtol=0, atol=0.51 * float(weight.scale.max()))
    keep = filter_fn(SPARED, ["lm_head"])
    assert {name for name in names if not keep(nn.Linear(1, 1), name)} == left
    assert torch.isfinite(model(torch.tensor([[1, 50, 60]])).logits).all()


@pytest.fixture
def compressor(monkeypatch):
    """Modules that stand for llm-compressor's and keep what they are called with."""

    def modifier(kind):
        return lambda **options: (kind, options)

    for path, name in (("quantization", "QuantizationModifier"), ("smoothquant", "SmoothQuantModifier")):
        module = ModuleType(path)
        setattr(module, name, modifier(name))
        monkeypatch.setitem(sys.modules, f"llmcompressor.modifiers.{path}", module)
    for parent in ("llmcompressor", "llmcompressor.modifiers"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))


def recipe(*options):
    defined = {}
    exec(compressor_settings(*options), defined)
    return defined["recipe"]


@pytest.mark.usefixtures("compressor")
def test_llm_compressor_recipes():
    ignore = ["lm_head", *SPARED]
    plain = ("QuantizationModifier", {"targets": "Linear", "scheme": "W8A8", "ignore": ignore})
    assert recipe(SPARED, ["lm_head"], "per_token", None) == [plain]
    assert recipe(SPARED, ["lm_head"], "per_token", 0.8) == [("SmoothQuantModifier", {"smoothing_strength": 0.8}), plain]
    assert recipe([], [], "per_token", None)[0][1]["ignore"] == []
    ((kind, options),) = recipe(SPARED, ["lm_head"], "per_tensor", None)
    assert (kind, options["ignore"]) == ("QuantizationModifier", ignore)
    (group,) = options["config_groups"].values()
    assert group["targets"] == ["Linear"]
    for side in ("weights", "input_activations"):
        assert group[side] == {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor"}


def test_names_stand_in_the_ignore_list_once():
    assert compressor_ignore([*SPARED, "lm_head"], ["lm_head"]) == ["lm_head", *SPARED]
