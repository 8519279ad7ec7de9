"""What a probe is: pairs of sequences of growing length whose last tokens a model is to tell apart.

Representational collapse (Barbero et al., Transformers need glasses!, 2024, theorem 4.2) is about a sequence and the same sequence with its
last token repeated once more. A probe gives such pairs for any length, from tokens rather than text, so that no tokenizer can merge what
is to be counted. Lengths count content elements: digits, summands or words.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

PROBES: dict[str, str] = {
    "repeat-last": "ones and a zero at the end (1...10), as in the theorem; the answer is the digit at the end",
    "count-ones": "ones (1...1), to be counted",
    "bernoulli": "random digits, each a one with probability p; the ones are to be counted",
    "copy-first": "a zero, then ones (01...1); the answer is the digit at the beginning",
    "copy-last": "ones, then a zero (1...10); the answer is the digit at the end",
    "sum": "1+1+...+1, to be added up",
    "count-word": "one word over and over, to be counted",
}
"""The probes, and what they are made of."""

DIGITS = {"repeat-last", "copy-first", "copy-last"}
"""Probes that ask for a digit; the others ask for a number."""

SYMBOLS: dict[str, tuple[str, ...]] = {
    "repeat-last": ("zero", "one"),
    "count-ones": ("one",),
    "bernoulli": ("zero", "one"),
    "copy-first": ("zero", "one"),
    "copy-last": ("zero", "one"),
    "sum": ("one", "plus"),
    "count-word": (),
}
"""The symbols that each is made of."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A family of pairs of token sequences.

    Attributes:
        name: One of `PROBES`.
        contrast: What the second of a pair is: ``"repeated"``, the first with its last element once more, or ``"changed"``, as long as the
            first, but with a one for the zero that is to be copied.
        level: ``"tokens"`` where sequences are put together from ids, ``"text"`` where they are tokenised as a whole.
        samples: Pairs per length.
        separator_every: After how many elements a separator stands; None for none.
        symbols: Ids of the symbols used: ``"zero"``, ``"one"``, ``"plus"``, ``"separator"``.
        word: Ids of the word that is counted; empty for other probes.
        before: Ids before the content, BOS included where there is one.
        after: Ids after it.
        p: Probability of a one among random digits.
        seed: Seeds random digits.
        texts: Every id above as text.
        model_name: The model whose vocabulary the ids are of.
    """

    name: str
    contrast: str
    level: str
    samples: int
    separator_every: int | None
    symbols: Mapping[str, int]
    word: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    p: float
    seed: int
    texts: Mapping[int, str]
    model_name: str
    _as_text: Callable[[list[int]], list[int]] | None = field(default=None, repr=False)

    def sequence(self, length: int, sample: int = 0) -> Int[Tensor, "pos"]:
        """The first sequence of a pair.

        Args:
            length: How many elements it has.
            sample: Which of the samples.

        Raises:
            ValueError: The length is below 1, or there is no such sample.
        """
        return self._tokens(self._elements(length, sample))

    def pair(self, length: int, sample: int = 0) -> tuple[Int[Tensor, "_"], Int[Tensor, "_"]]:
        """A sequence, and the one that it is to be told from.

        Args:
            length: How many elements the first has.
            sample: Which of the samples.

        Raises:
            ValueError: The length is below 1, or there is no such sample.
        """
        elements = self._elements(length, sample)
        return self._tokens(elements), self._tokens(self._contrasted(elements))

    def answer(self, length: int, sample: int = 0) -> int:
        """What is to be answered to a pair's first sequence: the number counted or summed up, or the digit copied.

        Args:
            length: How many elements it has.
            sample: Which of the samples.

        Raises:
            ValueError: The length is below 1, or there is no such sample.
        """
        return self.answers(length, sample)[0]

    def answers(self, length: int, sample: int = 0) -> tuple[int, int]:
        """What is to be answered to both sequences of a pair.

        Args:
            length: How many elements the first has.
            sample: Which of the samples.

        Raises:
            ValueError: The length is below 1, or there is no such sample.
        """
        elements = self._elements(length, sample)
        return self._answer(elements), self._answer(self._contrasted(elements))

    def longest(self, lengths: Sequence[int]) -> int:
        """Tokens of the longest sequence among the pairs of some lengths.

        Args:
            lengths: Numbers of elements.

        Raises:
            ValueError: There is no length, or one is below 1.
        """
        if not lengths:
            raise ValueError("lengths: got none; allowed: at least one")
        if self._as_text is None:
            for length in lengths:
                _require_length(length)
            return self._n_tokens(max(lengths) + (self.contrast == "repeated"))
        return max(len(ids) for length in lengths for sample in range(self.samples) for ids in self.pair(length, sample))

    def records(self) -> dict[str, Any]:
        """All that the probe is made of, machine-readable: symbols by name, and ids with their texts."""
        random_digits = self.name == "bernoulli"
        return {
            "name": self.name,
            "contrast": self.contrast,
            "level": self.level,
            "samples": self.samples,
            "separator_every": self.separator_every,
            "symbols": {symbol: self._record(token) for symbol, token in self.symbols.items()},
            "word": [self._record(token) for token in self.word],
            "before": [self._record(token) for token in self.before],
            "after": [self._record(token) for token in self.after],
            "p": self.p if random_digits else None,
            "seed": self.seed if random_digits else None,
        }

    def __repr__(self) -> str:
        ids = self.sequence(4).tolist() if self._as_text is None else []
        shown = "".join(self.texts[token] for token in ids) if ids else "as text"
        about = f"{self.contrast}, separator every {self.separator_every}" if self.separator_every else self.contrast
        return f"Probe({self.name}, {about}: {shown!r})"

    def _record(self, token: int) -> dict[str, Any]:
        return {"id": token, "token": self.texts[token]}

    def _elements(self, length: int, sample: int) -> list[tuple[int, ...]]:
        _require_length(length)
        if not 0 <= sample < self.samples:
            raise ValueError(f"sample: got {sample}; allowed: 0 to {self.samples - 1}")
        if self.name == "count-word":
            return [self.word] * length
        ones = [(self.symbols["one"],)] * length
        if self.name == "bernoulli":
            zero = (self.symbols["zero"],)
            # One number after the other from one stream per sample: a shorter sequence begins every longer one.
            stream = random.Random(f"{self.seed}/{sample}")
            return [one if stream.random() < self.p else zero for one in ones]
        if self.name in DIGITS:
            ones[self._asked] = (self.symbols["zero"],)
        return ones

    @property
    def _asked(self) -> int:
        """Where the digit stands that is to be copied."""
        return 0 if self.name == "copy-first" else -1

    def _contrasted(self, elements: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        if self.contrast == "repeated":
            return [*elements, elements[-1]]
        changed = list(elements)
        changed[self._asked] = (self.symbols["one"],)
        return changed

    def _answer(self, elements: list[tuple[int, ...]]) -> int:
        if self.name == "count-word":
            return len(elements)
        one = (self.symbols["one"],)
        return int(elements[self._asked] == one) if self.name in DIGITS else elements.count(one)

    def _tokens(self, elements: list[tuple[int, ...]]) -> Int[Tensor, "pos"]:
        content, plus = list[int](), self.symbols.get("plus")
        for place, element in enumerate(elements):
            if place and self.separator_every and place % self.separator_every == 0:
                content.append(self.symbols["separator"])
            if place and plus is not None:
                content.append(plus)
            content.extend(element)
        ids = [*self.before, *content, *self.after] if self._as_text is None else self._as_text(content)
        return torch.tensor(ids, dtype=torch.long)

    def _n_tokens(self, length: int) -> int:
        separators = (length - 1) // self.separator_every if self.separator_every else 0
        pluses = length - 1 if "plus" in self.symbols else 0
        return len(self.before) + length * max(1, len(self.word)) + pluses + separators + len(self.after)


def _require_length(length: int) -> None:
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"length: got {length!r}; allowed: whole numbers of elements, at least 1")
