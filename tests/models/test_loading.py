import inspect
import json
import os
import socket
import warnings

import pytest
import torch
import zoo
from recording import relative_error, same_state, state
from safetensors.torch import load_file, save_file
from tokenizer import save_folder
from transformer_lens.model_bridge import TransformerBridge

from sd_lens.linear.linearize import linearize
from sd_lens.models.completeness import missing_tensors
from sd_lens.models.loading import ModelStateWarning, inference, load, weights_of

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


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    """Loading would fill them with random numbers."""
    folder = tmp_path / "model"
    save_folder("llama", folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1.mlp" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^model: the files in .* lack model\.layers\.1\.mlp\.\w+\.weight, .*; allowed"):
        load(folder)


@pytest.mark.parametrize("family", [name for name, family in zoo.FAMILIES.items() if family.generation == "bridge"])
def test_whole_checkpoints_lack_nothing(tmp_path, family):
    save_folder(family, tmp_path / "model")
    assert missing_tensors(tmp_path / "model") == []


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
