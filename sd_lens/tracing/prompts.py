"""What is traced where the caller gives no prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sd_lens.models.protocol import TransformerLensModel

BUILT_IN_PROMPTS = (
    "The quick brown fox jumps over the lazy dog. It was not the first time, and it would not be the last.",
    "Return a new list containing all items from the iterable in ascending order.\n\nA custom key function can be supplied.",
    "In 1969, two people walked on the Moon; a third waited in orbit. They came back with 21.5 kg of rock.",
    'def area(width, height):\n    """Area of a rectangle."""\n    return width * height\n',
    "Once upon a time there was a small boat. Every morning it went out to sea, and every evening it came home.",
    "Water boils at a lower temperature in the mountains, because the air pressure is lower there. How much lower?",
)
"""Prose, numbers and code, with delimiters of all kinds."""


def default_prompts(model: TransformerLensModel, *, prepend_bos: bool | None = None) -> list[Tensor]:
    """Token ids of the built-in prompts, cut to the model's context; random ids, seeded, for a model without a tokenizer.

    Args:
        model: A TransformerLens model.
        prepend_bos: Passed to the tokenisation; None is the model's default.
    """
    loaded: Any = model
    context = int(loaded.cfg.n_ctx)
    if getattr(loaded, "tokenizer", None) is not None:
        return [loaded.to_tokens(prompt, prepend_bos=prepend_bos)[0, :context].cpu() for prompt in BUILT_IN_PROMPTS]
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(int(loaded.cfg.d_vocab), (4, min(32, context)), generator=generator))
