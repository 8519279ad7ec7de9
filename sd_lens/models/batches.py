"""Prompts of any lengths in batches of similar ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Prompts padded on the right to one length.

    Attributes:
        tokens: Token ids; padding repeats an arbitrary valid id, which no token before it can see.
        mask: True where a token is the prompt's own.
        flat: Index of each token among all tokens of all prompts, in the prompts' order; 0 at padding.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    flat: Int[Tensor, "batch pos"]


def batches(sequences: Sequence[Int[Tensor, "_"]], *, batch_tokens: int) -> list[Batch]:
    """Batches of prompts sorted by length, longest first, so that padding is small and memory peaks at the beginning.

    Args:
        sequences: One tensor of token ids per prompt.
        batch_tokens: Largest number of tokens in a batch, padding included; a longer prompt makes a batch of its own.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens: got {batch_tokens}; allowed: at least 1")
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    starts = (lengths.cumsum(0) - lengths).tolist()
    order = torch.argsort(lengths, descending=True, stable=True).tolist()
    result = []
    while order:
        longest = len(sequences[order[0]])
        size = max(1, batch_tokens // longest)
        chosen, order = order[:size], order[size:]
        batch = padded([sequences[prompt] for prompt in chosen])
        first = torch.tensor([starts[prompt] for prompt in chosen]).unsqueeze(1)
        result.append(replace(batch, flat=(first + torch.arange(longest)) * batch.mask))
    return result


def padded(sequences: Sequence[Int[Tensor, "_"]]) -> Batch:
    """Prompts in one batch, in their order.

    Args:
        sequences: One tensor of token ids per prompt.
    """
    lengths = torch.tensor([len(sequence) for sequence in sequences]).unsqueeze(1)
    tokens = torch.nn.utils.rnn.pad_sequence([sequence.long() for sequence in sequences], batch_first=True)
    position = torch.arange(tokens.shape[1])
    mask = position < lengths
    return Batch(tokens, mask, (lengths.cumsum(0) - lengths + position) * mask)


def equally_long(sequences: Int[Tensor, "prompt pos"], *, batch_tokens: int) -> list[Batch]:
    """Batches of prompts of one length, in their order; views, which makes them cheap for as many as a vocabulary has ids.

    Args:
        sequences: Token ids.
        batch_tokens: Largest number of tokens in a batch; a longer prompt makes a batch of its own.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens: got {batch_tokens}; allowed: at least 1")
    flat = torch.arange(sequences.numel()).view_as(sequences)
    real = torch.ones(1, 1, dtype=torch.bool).expand_as(sequences)
    rows = max(1, batch_tokens // sequences.shape[1])
    return [Batch(*parts) for parts in zip(*(tensor.split(rows) for tensor in (sequences, real, flat)), strict=True)]
