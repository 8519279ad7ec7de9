"""Clean and corrupted prompts that pair up, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sd_lens.models.batches import Batch, padded
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import Prompts, decode_each, tokenize


@dataclass(frozen=True, eq=False)
class PromptPairs:
    """Pairs of prompts of the same number of tokens, all padded on the right to one length.

    Attributes:
        clean: The clean ones.
        corrupted: The corrupted ones.
    """

    clean: Batch
    corrupted: Batch

    @classmethod
    def of(cls, model: TransformerLensModel, clean: Prompts, corrupted: Prompts, *, prepend_bos: bool | None = None) -> PromptPairs:
        """The pairs.

        Args:
            model: A TransformerLens model.
            clean: The clean prompts.
            corrupted: The corrupted ones, in the same order.
            prepend_bos: Passed to the tokenisation of strings.

        Raises:
            ValueError: Prompts are unusable, or there are not as many of the same numbers of tokens.
        """
        first, second = (tokenize(model, prompts, prepend_bos=prepend_bos) for prompts in (clean, corrupted))
        if len(first) != len(second):
            raise ValueError(f"corrupted: got {len(second)} prompts; allowed: {len(first)}, as many as clean ones")
        for number, (one, other) in enumerate(zip(first, second, strict=True)):
            if len(one) != len(other):
                raise ValueError(
                    f"corrupted: got {len(other)} tokens in prompt {number}; allowed: {len(one)}, as many as its clean prompt has"
                )
        return cls(padded(first), padded(second))

    @property
    def n_prompts(self) -> int:
        """How many pairs there are."""
        return len(self.clean.tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return self.clean.tokens.shape[1]

    @property
    def differ_from(self) -> int:
        """The first position at which a pair differs; beyond the longest prompt's end where none does."""
        differ = (self.clean.tokens != self.corrupted.tokens).any(0)
        return int(differ.long().argmax()) if bool(differ.any()) else self.longest

    def texts(self, model: TransformerLensModel, position: int) -> tuple[str | None, str | None]:
        """The clean and the corrupted token at a position as text, each where all prompts that have one have the same, else None."""
        there = self.clean.mask[:, position]
        clean, corrupted = (batch.tokens[there, position].unique().tolist() for batch in (self.clean, self.corrupted))
        return _text(model, clean), _text(model, corrupted)


def _text(model: TransformerLensModel, ids: Sequence[int]) -> str | None:
    return decode_each(model, ids)[0] if len(ids) == 1 else None
