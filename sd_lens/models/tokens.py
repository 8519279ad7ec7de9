"""Prompts as token ids, and token ids as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sd_lens.models.protocol import TransformerLensModel

Prompts = str | Sequence[str] | Int[Tensor, "batch pos"] | Sequence[Int[Tensor, "_"]]
"""One prompt, several, or token ids: a (batch, pos) tensor, or one-dimensional tensors of any lengths."""

_ALLOWED = "a string, a list of strings, a (batch, pos) tensor of token ids, or a list of one-dimensional ones"


def tokenize(model: TransformerLensModel, prompts: Prompts, *, prepend_bos: bool | None = None) -> list[Int[Tensor, "_"]]:
    """Token ids of prompts, one tensor each, without padding.

    Strings are tokenised by the model's own `to_tokens` with its conventions about BOS. Token ids are taken as they are; of a
    (batch, pos) tensor, such as `to_tokens` returns for a list of strings, trailing padding is cut off.

    Args:
        model: A TransformerLens model.
        prompts: The prompts.
        prepend_bos: Passed to `to_tokens`; None is the model's default.

    Returns:
        One tensor per prompt, on the CPU.

    Raises:
        ValueError: There is no prompt, one is empty or longer than the model's context, ids are outside of the vocabulary, padding
            stands on the left, or strings are given for a model without tokenizer.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, Tensor):
        sequences = _rows(model, prompts)
    elif not isinstance(prompts, Sequence) or len(prompts) == 0:
        got = "no prompt" if isinstance(prompts, Sequence) else type(prompts).__name__
        raise ValueError(f"prompts: got {got}; allowed: {_ALLOWED}")
    elif all(isinstance(prompt, str) for prompt in prompts):
        sequences = [_encode(model, str(prompt), prepend_bos) for prompt in prompts]
    elif all(isinstance(prompt, Tensor) and prompt.ndim == 1 for prompt in prompts):
        sequences = [torch.as_tensor(prompt) for prompt in prompts]
    else:
        raise ValueError(f"prompts: got a list of {', '.join(sorted({type(p).__name__ for p in prompts}))}; allowed: {_ALLOWED}")
    sequences = [sequence.detach().cpu() for sequence in sequences]
    for number, sequence in enumerate(sequences):
        _require_valid(model, number, sequence)
    return [sequence.long() for sequence in sequences]


def _encode(model: TransformerLensModel, prompt: str, prepend_bos: bool | None) -> Tensor:
    if getattr(model, "tokenizer", None) is None:
        raise ValueError("prompts: got text for a model without tokenizer; allowed: token ids")
    if not prompt:
        raise ValueError("prompts: got an empty prompt; allowed: prompts of at least one character")
    if not _is_text(prompt):
        raise ValueError(f"prompts: got {prompt[:20]!r}, which is not valid Unicode; allowed: text")
    return model.to_tokens(prompt, prepend_bos=prepend_bos, truncate=False)[0]


def _is_text(prompt: str) -> bool:
    try:
        prompt.encode()
    except UnicodeEncodeError:  # lone surrogates, which is how bytes that are no UTF-8 arrive from a command line
        return False
    return True


def _rows(model: Any, tokens: Tensor) -> list[Tensor]:
    if tokens.ndim == 1:
        tokens = tokens.unsqueeze(0)
    if tokens.ndim != 2 or tokens.shape[0] == 0:
        raise ValueError(f"prompts: got a tensor of shape {tuple(tokens.shape)}; allowed: {_ALLOWED}")
    return [row[: int(length)] for row, length in zip(tokens, unpadded_lengths(model, tokens), strict=True)]


def unpadded_lengths(model: Any, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch"]:
    """How many of each row's tokens are left when trailing padding is cut off; all of them where the model has no padding id.

    Args:
        model: The model, for its tokenizer; None where it is not known.
        tokens: Token ids.

    Raises:
        ValueError: Padding stands on the left.
    """
    whole = torch.full((len(tokens),), tokens.shape[1])
    tokenizer = getattr(model, "tokenizer", None)
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None or len(tokens) == 1 or tokens.shape[1] == 0:
        return whole
    begins_with_pad = (tokens[:, 0] == pad) & (tokens != pad).any(dim=1)
    if pad != getattr(tokenizer, "bos_token_id", None) and bool(begins_with_pad.any()):
        raise ValueError("prompts: got token ids padded on the left; allowed: padding on the right, or a list of unpadded tensors")
    # The last token that is no padding ends the prompt; the first stays in any case, it may be a BOS with the padding's id.
    kept = (tokens != pad).long() * torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    return kept.amax(dim=1).clamp(min=1).cpu()


def _require_valid(model: TransformerLensModel, number: int, sequence: Tensor) -> None:
    if sequence.is_floating_point() or sequence.is_complex() or sequence.dtype == torch.bool:
        raise ValueError(f"prompts: prompt {number} has dtype {sequence.dtype}; allowed: integer token ids")
    if sequence.numel() == 0:
        raise ValueError(f"prompts: prompt {number} is empty; allowed: prompts of at least one token")
    context = getattr(model.cfg, "n_ctx", None)
    if context and len(sequence) > context:
        raise ValueError(f"prompts: prompt {number} has {len(sequence)} tokens; allowed: at most {context}, the model's context")
    low, high = int(sequence.min()), int(sequence.max())
    vocabulary = model.cfg.d_vocab
    if low < 0 or high >= vocabulary:
        raise ValueError(f"prompts: prompt {number} has token ids {low} to {high}; allowed: 0 to {vocabulary - 1}")


def decode_each(model: Any, ids: Iterable[int]) -> list[str]:
    """Every token id as text on its own, with the spaces it has in a text.

    As ``<id>`` where the model has no tokenizer, and as ``?`` where the id is negative, which stands for one that is not known.
    """
    tokenizer = getattr(model, "tokenizer", None)
    known: dict[int, str] = {}
    texts = []
    for token in ids:
        if token not in known:
            if token < 0:
                known[token] = "?"
            else:
                known[token] = f"<{token}>" if tokenizer is None else _decode(tokenizer, token)
        texts.append(known[token])
    return texts


def _decode(tokenizer: Any, token: int) -> str:
    # SentencePiece decoders drop the space that a text begins with, so a token is read where it stands second.
    once = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    twice = str(tokenizer.decode([token, token], clean_up_tokenization_spaces=False))
    second = twice[len(once) :]
    return second if twice.startswith(once) and second.endswith(once) else once
