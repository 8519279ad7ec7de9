"""A tokenizer in memory for the models of the zoo, and checkpoint folders that load without a network."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import PreTrainedTokenizerFast
from zoo import BOS, EOS, PAD, VOCAB, hf_model

_SPECIAL = {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD}
_CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n\t"


def tiny_tokenizer(vocab_size: int = VOCAB) -> PreTrainedTokenizerFast:
    """A tokenizer of ``vocab_size`` single characters and special tokens, which puts one BOS before every text.

    Letters come first, then digits, punctuation and white space, then whatever follows in Latin-1 and Unicode. A
    character it does not know becomes ``<unk>``.
    """
    vocab = dict(_SPECIAL, **{"<unk>": len(_SPECIAL)})
    others = (chr(code) for code in range(0xA1, 0x110000) if not 0xD800 <= code < 0xE000)
    characters = iter(_CHARACTERS)
    while len(vocab) < vocab_size:
        vocab.setdefault(next(characters, None) or next(others), len(vocab))

    core = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        name_or_path="tiny",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        add_bos_token=True,
        clean_up_tokenization_spaces=False,
    )


def with_tokenizer(name: str, *, seed: int = 0) -> Any:
    """The bridge family ``name`` of the zoo with ``tiny_tokenizer``, so that it accepts text."""
    model = hf_model(name, seed=seed)
    with torch.random.fork_rng(devices=[]):
        bridge = build_bridge_from_module(
            model, architecture=type(model).__name__, hf_config=model.config, tokenizer=tiny_tokenizer()
        )
    return bridge.eval()


def save_folder(name: str, path: str | Path, *, seed: int = 0) -> Path:
    """Write the bridge family ``name`` of the zoo to the folder ``path`` as a Hugging Face checkpoint.

    The folder holds the configuration, the weights as safetensors and the tokenizer;
    ``TransformerBridge.boot_transformers(str(folder), device="cpu")`` loads it without a network.
    """
    folder = Path(path)
    hf_model(name, seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
