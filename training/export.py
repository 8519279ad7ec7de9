"""Writing a trained model down as the package ships it: half precision, with its tokenizer, loadable offline."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from training.tokenizer import save_tokenizer


def to_half(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy of a model in half precision.

    Args:
        model: The model.

    Returns:
        The copy.

    Raises:
        ValueError: If a weight does not fit into half precision.
    """
    half = copy.deepcopy(model).half()
    if not all(bool(torch.isfinite(parameter).all()) for parameter in half.parameters()):
        raise ValueError("a weight is too large for half precision")
    return half


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write model and tokenizer in the form ``from_pretrained`` reads.

    Args:
        model: The trained model.
        tokenizer: Its tokenizer.
        folder: Folder to write to; it is created if it is not there, and a model card in it is left alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    half = to_half(model)
    half.config.use_cache = True
    half.generation_config.use_cache = True
    half.save_pretrained(folder)
    save_tokenizer(tokenizer, folder, model.config.max_position_embeddings)
