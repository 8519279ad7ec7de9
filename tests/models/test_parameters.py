"""Names of single weights: whoever looks there, in TransformerLens or in the plain Hugging Face model, must find the weight."""

import re

import pytest
import torch
import zoo
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from sd_lens.models.loading import weights_of
from sd_lens.models.parameters import EntryNames, entry_names
from sd_lens.models.weights import FFNWeights

families = pytest.mark.parametrize("family", zoo.FAMILIES.values(), ids=lambda family: family.name)


def layers(ffn):
    """Every layer of a block by the name of its expert, at most three experts of a mixture."""
    if isinstance(ffn, FFNWeights):
        return {None: ffn}
    return {0: ffn.experts[0], 1: ffn.experts[1], 3: ffn.experts[3]} | ({} if ffn.shared is None else {"shared": ffn.shared})


def taken_apart(name):
    """``"a.b[3, 4]"`` as ``("a.b", (3, 4))``."""
    path, index = re.fullmatch(r"([\w.]+)\[([\d, ]+)\]", name).groups()
    return path, tuple(int(number) for number in index.split(", "))


def follow(owner, path):
    """What attributes and numbers lead to, without sd_lens."""
    for step in path.split("."):
        owner = owner[int(step)] if step.isdigit() else getattr(owner, step)
    return owner


@families
def test_a_name_leads_to_the_weight(family):
    model = zoo.cached(family.name)
    plain = zoo.hf_model(family.name).state_dict() if family.generation == "bridge" else None
    for block in weights_of(model):
        seen = set()
        for expert, layer in layers(block.ffn).items():
            d_mlp, d_model = layer.W_out.shape
            # Square-looking indices would hide a transposition, the last ones an axis that was left out.
            for neuron, dim in ((0, 0), (5, 3), (3, 5), (d_mlp - 1, 1), (1, d_model - 1), (d_mlp - 1, d_model - 1)):
                names = entry_names(model, block.block, neuron, dim, expert=expert)
                wanted = layer.W_out[neuron, dim].item()
                path, index = taken_apart(names.tl)
                assert path.startswith(f"blocks.{block.block}.mlp.")
                assert follow(model, path)[index].item() == wanted
                if plain is None:
                    assert names.hf is None
                else:
                    path, index = taken_apart(names.hf)
                    assert plain[path][index].item() == wanted
                seen.add(names)
        assert len(seen) == 6 * len(layers(block.ffn))


@pytest.mark.parametrize(
    ("name", "expert", "wanted"),
    [
        ("llama", None, ("blocks.1.mlp.W_out[40, 7]", "model.layers.1.mlp.down_proj.weight[7, 40]")),
        ("gpt2", None, ("blocks.1.mlp.W_out[40, 7]", "transformer.h.1.mlp.c_proj.weight[40, 7]")),
        ("opt", None, ("blocks.1.mlp.W_out[40, 7]", "model.decoder.layers.1.fc2.weight[7, 40]")),
        ("mixtral", 2, ("blocks.1.mlp.experts.down_proj[2, 7, 40]", "model.layers.1.mlp.experts.down_proj[2, 7, 40]")),
        (
            "qwen2_moe",
            "shared",
            ("blocks.1.mlp.shared_expert.W_out[40, 7]", "model.layers.1.mlp.shared_expert.down_proj.weight[7, 40]"),
        ),
    ],
)
def test_names_known_by_heart(name, expert, wanted):
    assert entry_names(zoo.cached(name), 1, 40, 7, expert=expert) == EntryNames(*wanted)
    assert entry_names(zoo.cached(name), -2, 40, 7, expert=expert) == EntryNames(*wanted)


@pytest.mark.skipif("hooked_mixtral" not in zoo.FAMILIES, reason="TransformerLens 4 has no HookedTransformer")
def test_hooked_transformers_have_no_hugging_face_name():
    assert entry_names(zoo.cached("hooked_llama"), 1, 40, 7) == ("blocks.1.mlp.W_out[40, 7]", None)
    assert entry_names(zoo.cached("hooked_mixtral"), 1, 40, 7, expert=2) == ("blocks.1.mlp.experts.2.W_out.weight[7, 40]", None)


def test_a_native_model_has_no_hugging_face_name():
    config = TransformerBridgeConfig(
        d_model=8,
        d_head=4,
        n_heads=2,
        n_layers=1,
        d_mlp=6,
        n_ctx=8,
        d_vocab=9,
        act_fn="gelu",
        normalization_type="LN",
        device="cpu",
    )
    with torch.random.fork_rng(devices=[]):
        model = TransformerBridge.boot_native(config).eval()
    assert entry_names(model, 0, 5, 7) == ("blocks.0.mlp.W_out[5, 7]", None)


def test_a_weight_that_is_no_parameter_of_the_model_has_no_name_there():
    model = zoo.build("llama")
    linear = model.original_model.model.layers[1].mlp.down_proj.original_component
    weight = linear.weight.detach().clone()
    del linear.weight
    linear.weight = weight  # a plain tensor, which no state_dict has
    assert entry_names(model, 1, 40, 7) == ("blocks.1.mlp.W_out[40, 7]", None)


def test_parameters_that_share_one_storage_are_told_apart():
    """As libraries do that flatten all weights into one buffer."""
    model = zoo.build("llama")
    parameters = dict(model.original_model.named_parameters())
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
    start = 0
    for parameter in parameters.values():
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    for block in range(zoo.BLOCKS):
        wanted = f"model.layers.{block}.mlp.down_proj.weight[7, 40]"
        assert entry_names(model, block, 40, 7) == (f"blocks.{block}.mlp.W_out[40, 7]", wanted)


def test_parameters_whose_entries_alternate_in_memory_are_told_apart():
    model = zoo.build("llama")
    layers = [layer.mlp.down_proj.original_component for layer in model.original_model.model.layers]
    both = torch.stack([layer.weight.detach() for layer in layers[:2]], dim=-1)
    for number, layer in enumerate(layers[:2]):
        layer.weight.data = both[..., number]
        assert not layer.weight.is_contiguous()
    for block in range(2):
        assert entry_names(model, block, 40, 7).hf == f"model.layers.{block}.mlp.down_proj.weight[7, 40]"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("llama", {"block": 3}, r"^block: got 3; allowed: 0 to 2"),
        ("llama", {"neuron": zoo.D_FF}, rf"^neuron: got {zoo.D_FF}; allowed: 0 to {zoo.D_FF - 1}$"),
        ("llama", {"dim": -1}, rf"^dim: got -1; allowed: 0 to {zoo.D_MODEL - 1}$"),
        ("llama", {"expert": 0}, r"^expert: got 0 of a block that is no mixture of experts; allowed: None$"),
        ("mixtral", {}, rf"^expert: got None; allowed: 0 to {zoo.EXPERTS - 1}$"),
        ("mixtral", {"expert": "shared"}, rf"^expert: got 'shared'; allowed: 0 to {zoo.EXPERTS - 1}$"),
        ("qwen2_moe", {"expert": zoo.EXPERTS}, rf"^expert: got {zoo.EXPERTS}; allowed: 0 to {zoo.EXPERTS - 1}, or 'shared'$"),
    ],
)
def test_what_does_not_exist_is_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        entry_names(zoo.cached(name), **({"block": 1, "neuron": 4, "dim": 5} | arguments))
