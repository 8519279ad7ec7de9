import contextlib
import inspect
import json
import os
import re
import socket
import sys
import warnings

import pytest
import torch
import transformers
import zoo
from recording import relative_error, same_state, state
from safetensors.torch import load_file, save_file
from tokenizer import save_folder, tiny_tokenizer
from transformer_lens.model_bridge import TransformerBridge

from sd_lens.linear.linearize import linearize
from sd_lens.models import loading
from sd_lens.models.completeness import Contents, draw
from sd_lens.models.loading import ModelStateWarning, inference, load, weights_of
from sd_lens.models.shards import find_shards

HOOKED = zoo.HookedTransformer is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder("llama", tmp_path_factory.mktemp("checkpoints") / "a llama")


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_ready_model_is_passed_through(family):
    model = zoo.cached(family)
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(model) is model
    assert same_state(before, state(model))


@pytest.mark.parametrize("family", [name for name in ("gpt2", "hooked_gpt2") if name in zoo.FAMILIES])
def test_a_model_in_training_mode_is_put_into_eval_mode_and_it_is_said(family):
    model = zoo.build(family).train()
    with pytest.warns(ModelStateWarning, match="training mode") as caught:
        # Without the wrappers that the type checks of the test run put around it, whose frames would be counted.
        assert inspect.unwrap(load)(model) is model
    assert not any(module.training for module in model.modules())
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(model)


@pytest.mark.parametrize("spell", [str, lambda path: path, lambda path: os.path.relpath(path)], ids=["str", "Path", "relative"])
def test_a_folder_loads_without_a_network(folder, monkeypatch, spell):
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("the network was used"))
    model = load(spell(folder))
    wanted, tokens = zoo.cached("llama"), zoo.tokens(zoo.cached("llama"))
    assert not any(module.training for module in model.modules())
    assert isinstance(model, TransformerBridge)
    assert model.cfg.model_name == "a llama"
    with torch.no_grad():
        assert relative_error(model(tokens), wanted(tokens)) < 1e-6
    for field, tensor in weights_of(model)[1].named_tensors():
        assert torch.equal(tensor, dict(weights_of(wanted)[1].named_tensors())[field]), field
    assert model.to_tokens("ab").tolist() == [[zoo.BOS, 4, 5]]


def test_options_reach_the_boot(folder):
    assert weights_of(load(folder, dtype=torch.bfloat16))[0].ffn.W_in.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"model: 'a llama' could not be loaded .*no_such_option"):
        load(folder, no_such_option=1)


def _write(folder, config):
    folder.mkdir()
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


BERT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}
T5 = {"model_type": "t5", "is_encoder_decoder": True, "architectures": ["T5ForConditionalGeneration"]}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({**BERT, "architectures": ["BertForMaskedLM"]}, "holds BertForMaskedLM; allowed: causal decoders"),
        ({**BERT, "architectures": ["BertModel"]}, "holds BertModel; allowed: causal decoders"),
        (T5, "holds T5ForConditionalGeneration; allowed: causal decoders"),
        ("{not json", "is not valid JSON .*; allowed: a Hugging Face config.json"),
        ("[1, 2]", "allowed: a Hugging Face config.json"),
        ({"architectures": [3]}, "could not be loaded"),
        ("null", "allowed: a Hugging Face config.json"),
        ({}, "could not be loaded"),
        ({"architectures": "LlamaForCausalLM"}, "could not be loaded"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "could not be loaded"),
    ],
)
def test_a_folder_that_holds_no_decoder_is_refused(tmp_path, config, reason):
    with pytest.raises(ValueError, match=f"^model: .*{reason}"):
        load(_write(tmp_path / "checkpoint", config))


def test_places_without_a_checkpoint_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^model: folder .* has no config\.json"):
        load(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"^model: .*model\.safetensors is a file; allowed: .*a folder"):
        load(file)
    for missing in (tmp_path / "nothing here", "./nothing-here", "~/nothing-here", "~no-such-user/x", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=r"^model: no folder .*; allowed: "):
            load(missing)
    with pytest.raises(FileNotFoundError, match=r"^model: got an empty name; allowed: "):
        load("")


def test_an_unknown_hub_name_is_refused():
    with pytest.raises(ValueError, match=r"^model: 'no-such-owner/no-such-model' could not be loaded .*; allowed: "):
        load("no-such-owner/no-such-model")


def test_a_revision_on_the_hub_stands_behind_the_name(folder, tmp_path, monkeypatch):
    asked = []

    def boot(source, **options):
        asked.append((source, options["revision"]))
        return zoo.build("llama")

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision))
        return str(folder)

    monkeypatch.setattr(TransformerBridge, "boot_transformers", boot)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load("owner/name@step1000").cfg.model_name == "owner/name@step1000"
    weights = weights_of("owner/name@step1000")
    assert weights.name == "owner/name@step1000"
    assert asked == [("owner/name", "step1000")] * 3
    weights_of("owner/name")
    assert asked[3:] == [("owner/name", None)] * 2
    with pytest.raises(ValueError, match=r"^revision: got 'main' with 'owner/name@step1000', .*; allowed: "):
        load("owner/name@step1000", revision="main")
    for take in (load, weights_of):
        with pytest.raises(ValueError, match=r"^model: got 'owner/name@'; allowed: a hub name and a revision"):
            take("owner/name@")
    assert len(asked) == 5
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name@step1000").symlink_to(folder)
    assert len(weights_of("owner/name@step1000")) == zoo.BLOCKS
    assert len(asked) == 5


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("thing", [None, 7, torch.nn.Linear(2, 2), zoo.hf_model("gpt2")], ids=lambda x: type(x).__name__)
def test_what_is_no_model_is_refused(thing):
    for take in (load, weights_of):
        with pytest.raises(ValueError, match=f"^model: got {type(thing).__name__}; allowed: a TransformerLens model"):
            take(thing)


def test_boot_options_are_for_models_that_are_booted():
    with pytest.raises(ValueError, match="with a ready model; allowed: none") as refusal:
        load(zoo.cached("llama"), device="cpu", trust_remote_code=True)
    assert all(name in str(refusal.value) for name in ("model", "device", "trust_remote_code"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox_parallel", "phi"])
def test_a_bridge_with_processed_weights_is_refused(family):
    model = zoo.build(family)
    model.enable_compatibility_mode()
    for take in (load, weights_of):
        with pytest.raises(ValueError, match=r"^model: its weights are .*; allowed: unprocessed weights"):
            take(model)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox_parallel"])
@pytest.mark.parametrize("step", ["center_writing_weights", "fold_ln"])
def test_any_step_of_the_processing_is_refused(family, step):
    model = zoo.build(family)
    steps = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices")
    model.process_weights(**{name: name == step for name in steps})
    with pytest.raises(ValueError, match=r"^model: its weights are .*; allowed: unprocessed weights"):
        load(model)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox_parallel"])
def test_weights_that_were_centred_by_hand_are_noticed(family):
    model = zoo.build(family)
    for block in weights_of(model):
        block.ffn.W_out.sub_(block.ffn.W_out.mean(-1, keepdim=True))
    with pytest.raises(ValueError, match=r"^model: its weights are centred"):
        load(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox_parallel"])
def test_compatibility_without_processing_is_accepted(family):
    model = zoo.build(family)
    model.enable_compatibility_mode(no_processing=True)
    assert load(model) is model


@pytest.mark.skipif(not HOOKED, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("kind", ["LNPre", "RMSPre"])
def test_a_hooked_transformer_with_folded_norms_is_refused(kind):
    model = zoo.build("hooked_gpt2" if kind == "LNPre" else "hooked_llama")
    model.process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=False)
    assert model.cfg.normalization_type == kind
    with pytest.raises(ValueError, match=r"^model: its weights are folded"):
        load(model)


@pytest.mark.skipif(not HOOKED, reason="TransformerLens 4 has no HookedTransformer")
def test_a_hooked_transformer_with_centred_weights_is_refused():
    model = zoo.build("hooked_gpt2")
    model.process_weights_(fold_ln=False, center_writing_weights=True, center_unembed=False)
    with pytest.raises(ValueError, match=r"^model: its weights are centred"):
        load(model)


def test_an_encoder_is_refused():
    model = zoo.build("gpt2")
    model.cfg.attention_dir = "bidirectional"
    with pytest.raises(ValueError, match=r"^model: got an encoder .*; allowed: causal decoders"):
        load(model)


def test_a_number_that_is_none_is_named_when_it_would_be_used():
    model = zoo.build("llama")
    weights_of(model)[2].ffn.W_gate[3, 4] = float("nan")
    linearize(weights_of(model)[1])
    with pytest.raises(ValueError, match=r"weights: ffn\.W_gate of block 2 holds 1 NaN"):
        linearize(weights_of(model)[2])


@pytest.mark.parametrize("raising", [False, True])
def test_inference_gives_every_module_its_mode_back(raising):
    model = zoo.build("gpt2")
    model.blocks[1].train()
    before = state(model)
    assert any(before["training"].values())
    try:
        with inference(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            if raising:
                raise KeyError
    except KeyError:
        assert raising
    assert torch.is_grad_enabled()
    assert same_state(before, state(model))


def _lacking(name):
    return lambda tensors: tensors.pop(name)


def _holding(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


UP = "model.layers.1.mlp.up_proj.weight"
EXPERT, ROUTER, VALUE = (
    f"model.layers.1.{part}.weight" for part in ("block_sparse_moe.experts.2.w3", "block_sparse_moe.gate", "self_attn.v_proj")
)
FITTING = torch.zeros(zoo.D_FF, zoo.D_MODEL)
DAMAGED = {
    "no up projection": ("llama", _lacking(UP), rf"model\.safetensors has no {UP};"),
    "no values": ("mixtral", _lacking(VALUE), rf"model\.safetensors has no {VALUE};"),
    "no router": ("mixtral", _lacking(ROUTER), r"model\.safetensors has no model\.layers\.1\.mlp\.gate\.weight;"),
    "no expert": ("mixtral", _lacking(EXPERT), rf"model\.safetensors with 6 more without {EXPERT} cannot be made into"),
    "no embedding": ("llama", _lacking("model.embed_tokens.weight"), r"has no model\.embed_tokens\.weight;"),
    "no tied embedding": ("gpt2", _lacking("transformer.wte.weight"), r"has no transformer\.wte\.weight;"),
    "no positions": ("gpt2", _lacking("transformer.wpe.weight"), r"has no transformer\.wpe\.weight;"),
    "no final norm": ("mixtral", _lacking("model.norm.weight"), r"has no model\.norm\.weight;"),
    "no head": ("llama", _lacking("lm_head.weight"), r"has no lm_head\.weight;"),
    "another shape": ("llama", _holding(UP, torch.zeros(3, zoo.D_MODEL)), rf"{UP} of .* is \(3, 32\); allowed: \(48, 32\)"),
    "int8": ("llama", _holding(UP, FITTING.to(torch.int8)), rf"holds {UP} as I8;"),
    "fp8": ("mixtral", _holding(EXPERT, FITTING.to(torch.float8_e4m3fn)), rf"holds {EXPERT} as F8_E4M3;"),
    "int8 positions": (
        "gpt2",
        _holding("transformer.wpe.weight", torch.zeros(zoo.CONTEXT, zoo.D_MODEL, dtype=torch.int8)),
        r"holds transformer\.wpe\.weight as I8;",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_checkpoint_is_refused_by_file_and_tensor(tmp_path, what):
    """Loading would fill what is missing with random numbers."""
    family, damage, reason = DAMAGED[what]
    folder = save_folder(family, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^model: .*model\.safetensors.*; allowed: ") as refusal:
        load(folder)
    assert re.search(reason, str(refusal.value))


def test_what_weights_of_refuses_for_its_files_load_refuses_in_the_same_words(tmp_path):
    folder = save_folder("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    said = []
    for take in (load, weights_of):
        with pytest.raises(
            ValueError, match=r"model\.safetensors holds .* as F32, quantised \(gptq, says config\.json\)"
        ) as refusal:
            take(folder)
        said.append(str(refusal.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("family", [name for name, family in zoo.FAMILIES.items() if family.generation == "bridge"])
def test_whole_checkpoints_lack_nothing(tmp_path, family):
    folder = save_folder(family, tmp_path / "model")
    Contents(_shards(folder), draw(folder).model).require_whole()


def _shards(folder):
    shards = find_shards(folder)
    assert shards is not None
    return shards


UNREAD = {
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "BitNet": {},
    "Mamba": {"state_size": 4},
}


def _unread(prefix, folder):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{prefix}Config")(**zoo.SIZES, **UNREAD[prefix])
        getattr(transformers, f"{prefix}ForCausalLM")(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prefix", UNREAD)
def test_a_whole_checkpoint_whose_blocks_cannot_be_read_is_loaded(tmp_path, prefix):
    """Its norms can be traced."""
    folder = _unread(prefix, tmp_path / "model")
    with pytest.raises(ValueError, match="allowed: "):
        weights_of(folder)[0]
    model = load(folder)
    assert model(torch.arange(3, 9)[None]).isfinite().all()
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if ".layers.1." in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"^model: .*model\.safetensors has no {lost}; allowed: a checkpoint with every weight"):
        load(folder)


def test_blocks_in_several_stacks_are_checked_and_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "draw", lambda folder: draw(folder)._replace(blocks=None))
    assert load(folder).cfg.n_layers == zoo.BLOCKS
    broken = save_folder("llama", tmp_path / "model")
    tensors = load_file(broken / "model.safetensors")
    tensors.pop(UP)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"has no {UP}"):
        load(broken)


def test_pickled_weights_are_loaded(tmp_path):
    folder = save_folder("llama", tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.equal(weights_of(load(folder))[1].ffn.W_in, weights_of(zoo.cached("llama"))[1].ffn.W_in)


@pytest.fixture
def coded(tmp_path, monkeypatch):
    """Makes folders with code that leaves a trace when it is run, on a machine whose user must not be asked."""
    asked, trace = [], tmp_path / "was run"
    monkeypatch.setattr("builtins.input", lambda *args: asked.append(args) or "y")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))

    def make(changes):
        folder = save_folder("llama", tmp_path / "model")
        code = f"from pathlib import Path\nPath({str(trace)!r}).touch()\nraise RuntimeError('the code was run')\n"
        for name in ("theirs", "modeling_openelm"):
            (folder / f"{name}.py").write_text(code)
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    yield make, trace
    assert asked == []


OWN = [
    {"model_type": "nobodys"},
    {"model_type": "nobodys", "architectures": ["NobodysForCausalLM"]},
    {"model_type": "vit"},  # transformers has the configuration but no decoder of the kind
]


@pytest.mark.parametrize("changes", OWN, ids=str)
@pytest.mark.parametrize("pickled", [False, True])
def test_code_of_a_folder_is_neither_run_nor_asked_for(coded, changes, pickled):
    make, trace = coded
    folder = make(changes)
    if pickled:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"^model: 'model' needs code from its folder \(.*\); allowed: .*trust_remote_code=True"):
        load(folder)
    with pytest.raises(ValueError, match=r"^model: .*; allowed: "):
        weights_of(folder)
    assert not trace.exists()


def test_code_that_is_not_needed_is_left_alone(coded):
    make, trace = coded
    folder = make({})
    assert torch.equal(weights_of(load(folder))[1].ffn.W_in, weights_of(folder)[1].ffn.W_in)
    assert not trace.exists()


def test_no_adapter_imports_code_of_a_folder(coded):
    """OpenELM's asks for its modeling file by name."""
    make, trace = coded
    folder = make({"architectures": ["OpenELMForCausalLM"]})
    with contextlib.suppress(ValueError):
        weights_of(folder)
    assert not trace.exists()


def test_code_that_is_trusted_is_run(coded):
    make, trace = coded
    folder = make({"model_type": "nobodys"})
    with pytest.raises(ValueError, match=r"^model: 'model' could not be loaded \(the code was run\)"):
        load(folder, trust_remote_code=True)
    assert trace.exists()


def test_a_truncated_file_is_refused(tmp_path):
    folder = tmp_path / "model"
    save_folder("llama", folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"^model: .*model\.safetensors cannot be read"):
        load(folder)


def test_a_shard_that_the_index_names_must_be_there(tmp_path):
    folder = tmp_path / "model"
    save_folder("llama", folder)
    (folder / "model.safetensors").unlink()  # which would be taken instead
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lacks model-00001-of-00002\.safetensors"):
        load(folder)


def test_centred_half_precision_weights_are_noticed():
    model = zoo.build("gpt2", dtype=torch.bfloat16)
    with torch.no_grad():
        for block in model.blocks:
            weight = block.mlp.out.weight  # (d_mlp, d_model), as GPT-2's modules hold it
            weight.copy_((weight.double() - weight.double().mean(-1, keepdim=True)).to(weight.dtype))
    with pytest.raises(ValueError, match="centred"):
        load(model)
    load(zoo.build("gpt2", dtype=torch.bfloat16))
