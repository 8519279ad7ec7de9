"""Text that a model generates greedily as it is and with the explosion subspace ablated, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from sd_lens.interventions.sites import Side
from sd_lens.interventions.subspace import ExplosionSubspace
from sd_lens.models.generating import greedy
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import decode_each, tokenize

Beginnings = str | Sequence[str] | Int[Tensor, "text place"] | Sequence[Int[Tensor, "_"]]
"""Prompts to go on from: as `Prompts`, but of another shape than those that a table is made of."""

BEGINNINGS = ("Once upon a time there was a small boat.", "def area(width, height):\n")
"""Beginnings of two of the built-in prompts."""


@dataclass(frozen=True)
class Continuation:
    """What a model goes on with after a prompt.

    Attributes:
        prompt: The prompt as text.
        intervention: ``"none"`` or ``"ablate"``.
        side: ``"trigger"``, ``"direction"``, ``"both"``; ``"none"`` for the untouched model.
        where: ``"initial"``, ``"delimiters"``, ``"everywhere"``; ``"none"`` for the untouched model.
        text: The text generated, special tokens as written.
        ids: Its token ids.
        n_same: How many of its first tokens are those of the untouched model.
    """

    prompt: str
    intervention: Literal["none", "ablate"]
    side: str
    where: str
    text: str
    ids: tuple[int, ...]
    n_same: int

    @property
    def column(self) -> str:
        """Its heading where texts stand side by side."""
        return "untouched" if self.intervention == "none" else f"ablated, {self.where}"


def beginnings(model: TransformerLensModel, prompts: Beginnings, *, prepend_bos: bool | None = None) -> list[Int[Tensor, "_"]]:
    """Token ids of prompts to go on from.

    Args:
        model: A TransformerLens model.
        prompts: Strings or token ids.
        prepend_bos: Passed to the tokenisation of strings; None is the model's default.

    Raises:
        ValueError: The prompts are unusable, or one fills the model's context.
    """
    try:
        sequences = tokenize(model, prompts, prepend_bos=prepend_bos)
    except ValueError as error:
        raise ValueError(f"generate: {error}") from None
    context = int(model.cfg.n_ctx)
    for number, sequence in enumerate(sequences):
        if len(sequence) >= context:
            raise ValueError(f"generate: prompt {number} has {len(sequence)} tokens; allowed: at most {context - 1}, to go on from")
    return sequences


def continuations(
    subspace: ExplosionSubspace,
    sequences: Sequence[Int[Tensor, "_"]],
    *,
    side: Side,
    where: Sequence[str],
    max_new_tokens: int,
    cached: bool = True,
) -> list[Continuation]:
    """Greedy continuations of each prompt, by the untouched model first, then with the subspace ablated.

    In generated text delimiters are told by their ids, not by their norm; where the
    subspace knows none, they are left out. The model is as before afterwards, also after an error.

    Args:
        subspace: What is ablated.
        sequences: Token ids, from `beginnings`.
        side: Where it is ablated.
        where: At which tokens: ``"initial"``, ``"delimiters"``, ``"everywhere"``.
        max_new_tokens: How many tokens at most; fewer where a text ends, or the model's context does.
        cached: Whether to keep keys and values, as generation usually does. Where a model shows no attention patterns, hooks cannot tell
            positions in such a run.

    Returns:
        Continuations, those of a prompt one after the other.
    """
    model, found = subspace.model, []
    names = {"initial": "initial", "delimiters": "delimiters", "everywhere": "all"}
    for sequence in sequences:
        prompt = _text(model, sequence.tolist())
        untouched = greedy(model, sequence, max_new_tokens, cached=cached)
        found.append(_continuation(model, prompt, sequence, untouched, untouched, "none", "none"))
        for place in where:
            if place == "delimiters" and not subspace.delimiters:
                continue
            with subspace.ablate(side=side, positions=names[place]).attached():  # pyright: ignore[reportArgumentType]
                edited = greedy(model, sequence, max_new_tokens, cached=cached)
            found.append(_continuation(model, prompt, sequence, edited, untouched, side, place))
    return found


def _continuation(
    model: Any, prompt: str, sequence: Tensor, ids: list[int], untouched: list[int], side: str, where: str
) -> Continuation:
    same = next(
        (n for n, (own, other) in enumerate(zip(ids, untouched, strict=False)) if own != other), min(len(ids), len(untouched))
    )
    whole = _text(model, [*sequence.tolist(), *ids])
    # Decoders may drop the space that a text begins with, so the continuation is read where it stands.
    text = whole[len(prompt) :] if whole.startswith(prompt) else _text(model, ids)
    return Continuation(prompt, "none" if where == "none" else "ablate", side, where, text, tuple(ids), same)


def _text(model: Any, ids: list[int]) -> str:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return " ".join(decode_each(model, ids))
    return str(tokenizer.decode(torch.tensor(ids), clean_up_tokenization_spaces=False))
