"""Candidate answers as tokens, and how probable a model finds each of them.

An answer may be written in several ways (with and without a space before it) and in several tokens, and what one is written with may begin
another: "1" begins "12" where every digit is a token. The probability of a text that begins with "1" would then be that of all of
these. So a candidate is answered by a text that begins with it and with no longer candidate: these events exclude each other, and what
their probabilities need are the same runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.models.protocol import TransformerLensModel
from sd_lens.propagation.probes import DIGITS, Probe
from sd_lens.propagation.symbols import Ids, encode_after, has_tokenizer, require_ids

Candidates = Sequence[int] | Mapping[int, int | Ids]
"""Numbers, written by the tokenizer; or each with the token, or tokens, that say it."""

SMALL = 64
"""All numbers up to this one are candidates by default."""
NEAR = 5
"""Beyond, those are that are no further than this from a right answer, besides round ones."""


@dataclass
class Node:
    """A beginning of candidates.

    Attributes:
        ids: Its tokens, none for the root.
        answer: The candidate that ends here, if one does.
        branches: How it goes on, by token.
    """

    ids: tuple[int, ...] = ()
    answer: int | None = None
    branches: dict[int, Node] = field(default_factory=dict)

    def inner(self) -> list[Node]:
        """This node and those below that go on: after each of them a model has to be asked for the next token."""
        below = [node for branch in self.branches.values() for node in branch.inner()]
        return [self, *below] if self.branches else []

    def log_probabilities(self, after: Callable[[Node], Float[Tensor, "branch"]]) -> dict[int, float]:
        """Logarithm of each candidate's probability, that of all its spellings together.

        Args:
            after: Gives, for a node, the log-probabilities of the tokens that its branches begin with.
        """
        found: dict[int, list[float]] = {}
        todo = [(self, 0.0)]
        while todo:
            node, reached = todo.pop()
            rest = 0.0
            if node.branches:
                following = after(node).double()
                steps = following.tolist()
                todo += [(branch, reached + step) for branch, step in zip(node.branches.values(), steps, strict=True)]
                rest = float(torch.log1p(-following.exp().sum().clamp(max=1.0)))
            if node.answer is not None:
                found.setdefault(node.answer, []).append(reached + rest)
        return {answer: float(torch.tensor(each, dtype=torch.double).logsumexp(0)) for answer, each in found.items()}


def candidate_tree(model: TransformerLensModel, probe: Probe, candidates: Candidates | None, expected: Sequence[int]) -> Node:
    """Candidates as a tree of tokens.

    Args:
        model: A TransformerLens model.
        probe: The probe asked.
        candidates: The candidates; None for the two digits, or for numbers as `answer_probes` says.
        expected: The right answers.

    Raises:
        ValueError: A candidate is negative, cannot be written with the vocabulary or is written as another is; a right answer is missing; or
            numbers are to be written for a model without tokenizer.
    """
    spelled = _spellings(model, probe, candidates, expected)
    missing = sorted(set(expected) - set(spelled))
    if missing:
        raise ValueError(
            f"candidates: got none for {missing[0]}, a right answer; allowed: candidates with all right answers among them"
        )
    root = Node()
    for answer, spellings in spelled.items():
        for ids in spellings:
            node = root
            for place, token in enumerate(ids):
                node = node.branches.setdefault(token, Node(ids[: place + 1]))
            if node.answer not in (None, answer):
                raise ValueError(
                    f"candidates: got the tokens {list(ids)} for {node.answer} and {answer}; allowed: different tokens for each"
                )
            node.answer = answer
    return root


def _spellings(
    model: Any, probe: Probe, candidates: Candidates | None, expected: Sequence[int]
) -> dict[int, list[tuple[int, ...]]]:
    if isinstance(candidates, Mapping):
        return {
            answer: [require_ids(model, "candidates", [ids] if isinstance(ids, int) else ids)] for answer, ids in candidates.items()
        }
    if probe.name in DIGITS:
        return {digit: _digit(model, probe, digit) for digit in ((0, 1) if candidates is None else candidates)}
    if not has_tokenizer(model):
        raise ValueError(
            "candidates: got no token ids for a model without tokenizer; allowed: a dictionary of numbers and the ids that say them"
        )
    numbers = _default_numbers(expected) if candidates is None else candidates
    spelled = {number: _written(model, str(number)) for number in numbers if number >= 0}
    wrong = [number for number in numbers if not spelled.get(number)]
    if wrong:
        raise ValueError(f"candidates: got {wrong[0]}; allowed: numbers from 0 on that the vocabulary can write")
    return spelled


def _default_numbers(expected: Sequence[int]) -> list[int]:
    """All small numbers, and of larger ones those that a model is likely to say: every further candidate costs passes."""
    largest = max(expected)
    most = largest + max(NEAR, largest // 10)
    numbers = set(range(min(most, SMALL) + 1))
    if most > SMALL:
        numbers |= {10**power for power in range(len(str(most)))} | {2**power for power in range(most.bit_length())}
        for right in set(expected):
            numbers |= {*range(right - NEAR, right + NEAR + 1), right // 2, 2 * right, most}
    return sorted(number for number in numbers if 0 <= number <= most)


def _digit(model: Any, probe: Probe, digit: int) -> list[tuple[int, ...]]:
    if digit not in (0, 1):
        raise ValueError(f"candidates: got {digit} with {probe.name!r}; allowed: 0 and 1")
    token = probe.symbols["one" if digit else "zero"]
    written = _written(model, probe.texts[token].strip()) if has_tokenizer(model) else []
    return list(dict.fromkeys([(token,), *written]))


def _written(model: Any, text: str) -> list[tuple[int, ...]]:
    """A text's tokens without and with a space before it."""
    found = [tuple(encode_after(model, space + text)) for space in ("", " ")]
    return [ids for ids in dict.fromkeys(found) if ids and str(model.tokenizer.decode(list(ids))).strip() == text]
