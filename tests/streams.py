"""Residual streams of one unpadded prompt at a time, from TransformerLens' own cache: what traces must agree with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def points(n_blocks: int) -> list[str]:
    """The hook points of the stream after the embedding and after every block."""
    return ["blocks.0.hook_resid_pre", *(f"blocks.{block}.hook_resid_post" for block in range(n_blocks))]


def streams_alone(model: Any, prompts: Sequence[Tensor]) -> list[Tensor]:
    """Per prompt, the stream (point, pos, d_model) in float64."""
    names, result = points(model.cfg.n_layers), []
    for prompt in prompts:
        with torch.no_grad():
            _, cache = model.run_with_cache(prompt.unsqueeze(0), names_filter=lambda name: name in names)
        result.append(torch.stack([cache[name][0].double().cpu() for name in names]))
    return result


def norms_alone(model: Any, prompts: Sequence[Tensor]) -> Tensor:
    """Norms (point, token), the prompts' tokens one after the other."""
    return torch.cat([stream.norm(dim=-1) for stream in streams_alone(model, prompts)], dim=1)


def ragged(vocabulary: int, lengths: Sequence[int], *, first: int = 3, seed: int = 0) -> list[Tensor]:
    """Prompts of these lengths, of random token ids from ``first`` on."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(first, vocabulary, (length,), generator=generator) for length in lengths]


def worst(got: Tensor, wanted: Tensor) -> float:
    """Largest deviation relative to the entry wanted; NaN where there is any."""
    assert got.shape == wanted.shape
    return float(((got.double() - wanted.double()) / wanted.double()).abs().max())
