"""Blocks read from files are those of the live model, to the bit, and reading one touches nothing else."""

import dataclasses
import gc
import json
import re
import warnings

import huggingface_hub
import pytest
import torch
import transformers
import zoo
from safetensors.torch import load_file, save_file
from tokenizer import save_folder
from torch import nn
from transformer_lens.model_bridge.sources import build_bridge_from_module

from sd_lens.models import checkpoint, shards
from sd_lens.models.activations import Activation
from sd_lens.models.checkpoint import CheckpointWeights
from sd_lens.models.completeness import draw
from sd_lens.models.loading import load, weights_of
from sd_lens.models.weights import ModelWeights

BRIDGES = [name for name, family in zoo.FAMILIES.items() if family.generation == "bridge"]


def _save(model, folder, *, shard="5GB"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, max_shard_size=shard)
    return folder


def _bridge(model):
    with torch.random.fork_rng(devices=[]):
        return build_bridge_from_module(model, architecture=type(model).__name__, hf_config=model.config).eval()


def _assert_same(got, wanted, where="block"):
    """Two blocks agree in every field: tensors to the bit and in their type, the rest by value."""
    assert type(got) is type(wanted), where
    if isinstance(wanted, torch.Tensor):
        assert got.dtype == wanted.dtype, where
        assert torch.equal(got, wanted), where
    elif isinstance(wanted, Activation):
        assert got.name == wanted.name, where
    elif dataclasses.is_dataclass(wanted):
        for field in dataclasses.fields(wanted):
            _assert_same(getattr(got, field.name), getattr(wanted, field.name), f"{where}.{field.name}")
    elif isinstance(wanted, tuple):
        for number, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
            _assert_same(mine, theirs, f"{where}[{number}]")
    else:
        assert got == wanted, where


def _assert_all_same(got: ModelWeights, wanted: ModelWeights):
    assert len(got) == len(wanted) > 0
    assert got.d_model == wanted.d_model
    for mine, theirs in zip(got, wanted, strict=True):
        assert len(list(theirs.named_tensors())) >= 5
        _assert_same(mine, theirs)


@pytest.mark.parametrize("family", BRIDGES)
def test_a_sharded_checkpoint_holds_the_live_models_blocks(tmp_path, family):
    folder = _save(zoo.hf_model(family, dtype=torch.bfloat16), tmp_path, shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    _assert_all_same(weights_of(folder), weights_of(zoo.build(family, dtype=torch.bfloat16)))


@pytest.mark.parametrize(("family", "stored"), [("llama", torch.float16), ("gpt2", torch.float32), ("mixtral", torch.bfloat16)])
def test_a_single_file_in_any_type_is_what_loading_it_gives(tmp_path, family, stored):
    folder = save_folder(family, tmp_path)
    _save(zoo.hf_model(family, dtype=stored), folder)
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    _assert_all_same(weights_of(folder), weights_of(load(folder, dtype=stored)))
    other = torch.bfloat16 if stored == torch.float32 else torch.float32
    _assert_all_same(weights_of(folder, dtype=other), weights_of(load(folder, dtype=other)))


def test_the_model_that_ships_is_read_as_it_is_stored():
    assert weights_of("tiny")[0].ffn.norm.gain.dtype == torch.float16
    _assert_all_same(weights_of("tiny", dtype=torch.float32), weights_of(load("tiny")))
    _assert_all_same(weights_of("tiny"), weights_of(load("tiny", dtype=torch.float16)))


def test_types_may_differ_from_tensor_to_tensor(tmp_path):
    folder = _save(zoo.hf_model("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor if "norm" in name else tensor.half() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    block = weights_of(folder)[1]
    assert block.ffn.norm.gain.dtype == torch.float32
    assert block.ffn.W_in.dtype == torch.float16
    assert torch.equal(block.ffn.W_in, tensors["model.layers.1.mlp.up_proj.weight"].T)


@pytest.mark.parametrize("family", ["gemma2", "nemotron"])
def test_an_offset_gain_of_half_precision_is_not_rounded(tmp_path, family):
    """What is stored is w: ``1 + w`` has more digits than its type, and is what the float32 model multiplies by."""
    weights = weights_of(_save(zoo.hf_model(family, dtype=torch.bfloat16), tmp_path))
    _assert_all_same(weights, weights_of(zoo.build(family, dtype=torch.bfloat16)))
    rounded = 0
    for got, wanted in zip(weights, weights_of(_bridge(zoo.hf_model(family, dtype=torch.bfloat16).float())), strict=True):
        exact, gains = dict(wanted.named_tensors()), [name for name, _ in got.named_tensors() if name.endswith(".gain")]
        assert len(gains) == (4 if family == "gemma2" else 2)
        for name, tensor in got.named_tensors():
            assert tensor.dtype == (torch.float32 if name in gains else torch.bfloat16), name
            assert torch.equal(tensor.float(), exact[name]), name
            rounded += int((tensor.bfloat16() != tensor).sum()) if name in gains else 0
    assert rounded > 50


def test_names_of_old_checkpoints_are_known(tmp_path):
    """GPT-2's own files leave out ``transformer.`` and hold masks that no model has any more."""
    folder = _save(zoo.hf_model("gpt2"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert "h.0.attn.c_attn.weight" in tensors
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _assert_all_same(weights_of(folder), weights_of(zoo.cached("gpt2")))


def test_experts_keep_their_order_where_there_are_more_than_ten(tmp_path):
    config = zoo.hf_model("mixtral").config
    config.num_local_experts, config.num_hidden_layers = 12, 1
    with torch.random.fork_rng(devices=[]):
        model = transformers.MixtralForCausalLM(config).eval()
    folder = _save(model, tmp_path)
    assert "model.layers.0.block_sparse_moe.experts.11.w2.weight" in load_file(folder / "model.safetensors")
    _assert_all_same(weights_of(folder), weights_of(_bridge(model)))


def test_blocks_may_differ_from_one_to_the_next(tmp_path):
    config = zoo.hf_model("qwen3_moe").config
    config.mlp_only_layers = [1]
    with torch.random.fork_rng(devices=[]):
        model = transformers.Qwen3MoeForCausalLM(config).eval()
    weights = weights_of(_save(model, tmp_path))
    wanted = weights_of(_bridge(model))
    assert type(wanted[1].ffn) is not type(wanted[0].ffn)
    _assert_all_same(weights, wanted)


def test_it_is_a_sequence_with_a_name(tmp_path):
    weights = weights_of(_save(zoo.hf_model("gemma2"), tmp_path / "a gemma"))
    assert isinstance(weights, CheckpointWeights)
    assert (weights.name, len(weights), weights.d_model) == ("a gemma", 4, zoo.D_MODEL)
    assert weights_of("tiny").name == "tiny"
    assert [block.block for block in weights] == [0, 1, 2, 3]
    assert weights[-1].block == 3
    for outside in (4, -5):
        with pytest.raises(ValueError, match=rf"^block: got {outside}; allowed: 0 to 3"):
            weights[outside]


# --- what is read, and what stays ------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """The names of the tensors that are taken from files, as they are taken."""
    names, real = [], shards.safe_open

    class Recording:
        def __init__(self, *args, **kwargs):
            self._file = real(*args, **kwargs)

        def __enter__(self):
            self._file.__enter__()
            return self

        def __exit__(self, *error):
            return self._file.__exit__(*error)

        def get_tensor(self, name):
            names.append(name)
            return self._file.get_tensor(name)

        def __getattr__(self, name):
            return getattr(self._file, name)

    monkeypatch.setattr(shards, "safe_open", Recording)
    return names


@pytest.mark.parametrize("family", ["llama", "mixtral", "phi3"])
def test_only_the_blocks_own_tensors_are_read(tmp_path, reads, family):
    folder = _save(zoo.hf_model(family), tmp_path, shard="20KB")
    weights = weights_of(folder)
    assert reads == []
    for block in (2, 0):
        reads.clear()
        weights[block]
        stored = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
        assert sorted(reads) == sorted(name for name in stored if f".layers.{block}." in name)


def _alive():
    """The memory that tensors with numbers occupy, by its address."""
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter) and not thing.is_meta]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors if tensor.numel()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral"])
def test_nothing_of_a_block_stays(tmp_path, family):
    """Without the help of the garbage collector, which may come much later."""
    weights = weights_of(_save(zoo.hf_model(family), tmp_path), dtype=torch.float64)
    _ = weights[1]  # what the libraries build once
    del _
    gc.collect()
    gc.disable()
    try:
        before = _alive().keys()
        block = weights[0]
        held = _alive().keys() - before
        assert held >= {block.attention.W_O.untyped_storage().data_ptr()}
        del block
        assert not _alive().keys() - before
    finally:
        gc.enable()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_reading_is_silent_and_leaves_the_random_state(tmp_path, capfd, family):
    folder = _save(zoo.hf_model(family), tmp_path)
    capfd.readouterr()
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(weights_of(folder))
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")


# --- what is refused -------------------------------------------------------------------------------------------------


def _edit(folder, change):
    """Rewrites a folder's only file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _refused(folder, reason):
    with pytest.raises(ValueError, match=reason) as refusal:
        weights_of(folder)
    message = str(refusal.value)
    assert re.match(r"^model: .*; allowed: .+", message)
    assert "\n" not in message


@pytest.fixture
def llama(tmp_path):
    return _save(zoo.hf_model("llama"), tmp_path / "a model")


def test_a_missing_tensor_is_named(llama):
    name = "model.layers.2.mlp.up_proj.weight"
    _edit(llama, lambda tensors: tensors.pop(name))
    _refused(llama, rf"a model/model\.safetensors has no {re.escape(name)};")


def test_the_embedding_and_the_head_are_not_needed(llama):
    _edit(
        llama, lambda tensors: [tensors.pop(name) for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight")]
    )
    _assert_all_same(weights_of(llama), weights_of(zoo.cached("llama")))


def test_a_missing_expert_is_named(tmp_path):
    folder = _save(zoo.hf_model("mixtral"), tmp_path)
    lost = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    _edit(folder, lambda tensors: tensors.pop(lost))
    _refused(
        folder,
        rf"model\.safetensors with 6 more without {re.escape(lost)} cannot be made into model\.layers\.1\.mlp\.experts\.gate_up_proj",
    )


def test_a_tensor_of_another_shape_is_named(llama):
    name = "model.layers.1.mlp.up_proj.weight"
    _edit(llama, lambda tensors: tensors.update({name: torch.zeros(3, zoo.D_MODEL)}))
    _refused(llama, rf"{re.escape(name)} of .*model\.safetensors is \(3, 32\); allowed: \(48, 32\), by config\.json")


@pytest.mark.parametrize(("kind", "shown"), [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_a_tensor_that_holds_no_plain_numbers_is_named(llama, kind, shown):
    name = "model.layers.1.mlp.up_proj.weight"
    _edit(llama, lambda tensors: tensors.update({name: torch.zeros(zoo.D_FF, zoo.D_MODEL).to(kind)}))
    _refused(llama, rf"model\.safetensors holds {re.escape(name)} as {shown}; allowed: weights in float32, .*not quantised")


def test_a_quantised_checkpoint_is_named(llama):
    def quantise(tensors):
        tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(4, 4, dtype=torch.int32)
        tensors.pop("model.layers.0.mlp.up_proj.weight")

    _edit(llama, quantise)
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    _refused(
        llama, r"model\.safetensors holds model\.layers\.0\.mlp\.up_proj\.qweight as I32, quantised \(gptq, says config\.json\);"
    )


def test_a_truncated_file_and_the_tensor_cut_off_are_named(llama):
    path = llama / "model.safetensors"
    whole = path.read_bytes()
    with shards.safe_open(path, framework="pt") as file:
        last = file.offset_keys()[-1]
    path.write_bytes(whole[:-7])
    _refused(llama, rf"model\.safetensors cannot be read \(it ends 7 bytes before the end of {re.escape(last)}\)")
    for length in (0, 5, 100):
        path.write_bytes(whole[:length])
        _refused(llama, r"a model/model\.safetensors cannot be read \(")
    path.write_bytes(b"no safetensors file, but something else " * 20)
    _refused(llama, r"a model/model\.safetensors cannot be read \(")


def test_an_absent_shard_and_what_it_should_hold_are_named(tmp_path):
    folder = _save(zoo.hf_model("llama"), tmp_path, shard="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = index["model.layers.1.mlp.up_proj.weight"]
    (folder / file).unlink()
    first = next(name for name in index if index[name] == file)
    _refused(folder, rf"lacks {re.escape(file)}, which its index names for {re.escape(first)};")


def test_a_shard_without_what_the_index_says_is_named(tmp_path):
    folder = _save(zoo.hf_model("llama"), tmp_path, shard="20KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    other = next(file for file in index["weight_map"].values() if file != index["weight_map"]["lm_head.weight"])
    index["weight_map"]["lm_head.weight"] = other
    path.write_text(json.dumps(index))
    _refused(folder, rf"{re.escape(other)} lacks lm_head\.weight, which model\.safetensors\.index\.json says it holds")


@pytest.mark.parametrize("text", ["{not json", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_named(tmp_path, text):
    folder = _save(zoo.hf_model("llama"), tmp_path, shard="20KB")
    (folder / "model.safetensors.index.json").write_text(text)
    _refused(folder, r"model\.safetensors\.index\.json (is not valid JSON|has no weight_map)")


def test_pickled_weights_are_not_read(llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    _refused(llama, r"has pytorch_model\.bin but no model\.safetensors .*allowed: weights as safetensors")
    (llama / "pytorch_model.bin").unlink()
    _refused(llama, r"has no model\.safetensors")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (None, "has no config.json"),
        ("{not json", "is not valid JSON"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "holds BertForMaskedLM; allowed: causal decoders"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "holds an encoder; allowed: causal decoders"),
        ({"architectures": ["LlamaForCausalLM"]}, "'a model' could not be built from its config.json"),
        ({"model_type": "nobodys", "architectures": ["NobodysForCausalLM"]}, "'a model' could not be built from its config.json"),
    ],
)
def test_a_folder_that_holds_no_decoder_is_refused(llama, config, reason):
    path = llama / "config.json"
    path.unlink() if config is None else path.write_text(config if isinstance(config, str) else json.dumps(config))
    _refused(llama, reason)


def test_blocks_in_several_stacks_are_refused(llama, monkeypatch):
    monkeypatch.setattr(checkpoint, "draw", lambda folder: draw(folder)._replace(blocks=None))
    _refused(llama, r"could not be built from its config\.json \(LlamaForCausalLM has no single stack of blocks\)")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_centred_weights_are_refused(tmp_path, dtype):
    model = zoo.hf_model("gpt2")
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_proj.weight -= block.mlp.c_proj.weight.mean(-1, keepdim=True)
    _refused(_save(model.to(dtype), tmp_path), "its weights are centred")


def test_a_ready_model_keeps_its_type():
    with pytest.raises(ValueError, match=r"^dtype: got torch\.float32 with a ready model; allowed: none"):
        weights_of(zoo.cached("llama"), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^dtype: got torch\.int8; allowed: torch\.float64, .*torch\.bfloat16"):
        weights_of("tiny", dtype=torch.int8)


def test_names_on_the_hub(tmp_path, monkeypatch):
    """Without a network they are looked for in the cache."""
    cache = tmp_path / "models--owner--name"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    _save(zoo.hf_model("llama"), cache / "snapshots" / ("0" * 40), shard="20KB")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    weights = weights_of("owner/name")
    assert weights.name == "owner/name"
    _assert_all_same(weights, weights_of(zoo.cached("llama")))
    with pytest.raises(ValueError, match=r"^model: 'owner/other' could not be loaded \(.*\); allowed: 'tiny', a checkpoint folder"):
        weights_of("owner/other")
    with pytest.raises(FileNotFoundError, match=r"^model: no folder './nothing'"):
        weights_of("./nothing")
