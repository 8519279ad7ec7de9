"""What the model reads at each step: windows of text, and windows that give its heads nothing to do.

The synthetic windows follow the bigram-backcopy task of Guo et al. (2024, "Active-dormant attention heads"). Nearly
every token depends on the one before alone; only after one of six trigger tokens an earlier one has to be copied. A
head that copies is idle elsewhere and learns a place to rest, which is where the phenomenon comes from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.recipe import Recipe

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Bigrams:
    """For every id, the places of the corpus that follow it, so that drawing a place draws a successor.

    Attributes:
        stream: The corpus as ids.
        places: Positions of the stream sorted by the id they hold, the last position left out.
        starts: Where the places of an id begin.
        counts: How many places an id has.
    """

    stream: Ids
    places: Ids
    starts: Ids
    counts: Ids

    @classmethod
    def of(cls, stream: Ids, vocab_size: int) -> Bigrams:
        """Index a stream.

        Args:
            stream: The corpus as ids.
            vocab_size: Number of ids.

        Returns:
            The index.
        """
        counts = np.bincount(stream[:-1], minlength=vocab_size)
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        return cls(stream, np.argsort(stream[:-1], kind="stable"), starts, counts)

    def successors(self, previous: Ids, uniform: NDArray[np.float64]) -> Ids:
        """Draw a successor of each id.

        Args:
            previous: The ids.
            uniform: One number in [0, 1) per id, which decides the draw.

        Returns:
            One id per id. An id the corpus never continues is followed by a draw from the corpus at large.
        """
        known = self.places[
            np.minimum(self.starts[previous] + (uniform * self.counts[previous]).astype(np.int64), len(self.places) - 1)
        ]
        anywhere = (uniform * (len(self.stream) - 1)).astype(np.int64)
        return self.stream[np.where(self.counts[previous] > 0, known + 1, anywhere)]


def text_windows(stream: Ids, count: int, length: int, bos: int, rng: np.random.Generator) -> Ids:
    """Windows of text from random places, each behind BOS.

    Args:
        stream: The corpus as ids.
        count: Number of windows.
        length: Ids per window, BOS included.
        bos: Id of BOS.
        rng: Source of randomness.

    Returns:
        Ids of shape (count, length).
    """
    starts = rng.integers(0, len(stream) - length, size=(count, 1))
    windows = stream[starts + np.arange(length) - 1]
    windows[:, 0] = bos
    return windows


def backcopy_windows(
    bigrams: Bigrams, count: int, length: int, bos: int, triggers: Ids, rate: float, rng: np.random.Generator
) -> Ids:
    """Bigram-backcopy windows, each behind BOS.

    Args:
        bigrams: Statistics the ordinary tokens are drawn from.
        count: Number of windows.
        length: Ids per window, BOS included.
        bos: Id of BOS.
        triggers: Ids of the triggers; after number ``j`` the token ``j + 1`` places before it is repeated.
        rate: Probability of a trigger wherever the place is not a copy.
        rng: Source of randomness.

    Returns:
        Ids of shape (count, length).
    """
    windows = np.full((count, length), bos, dtype=np.int64)
    uniform = rng.random((length, count))
    is_trigger = rng.random((length, count)) < rate
    is_trigger[: len(triggers) + 1] = False  # so that every copy has something behind BOS to reach back to
    which = rng.integers(0, len(triggers), size=(length, count))
    copy_from = np.zeros(count, dtype=np.int64)
    rows = np.arange(count)
    for place in range(1, length):
        drawn = bigrams.successors(windows[:, place - 1], uniform[place])
        drawn = np.where(is_trigger[place], triggers[which[place]], drawn)
        windows[:, place] = np.where(copy_from > 0, windows[rows, copy_from], drawn)
        # A trigger that was itself copied is spent: its successor is an ordinary draw.
        fresh = is_trigger[place] & (copy_from == 0)
        copy_from = np.where(fresh, place - 1 - which[place], 0)
    return windows


def make_batch(recipe: Recipe, bigrams: Bigrams, bos: int, triggers: Ids, step: int) -> Tensor:
    """The batch of one step, which depends on the seed and the step alone.

    A run that was interrupted therefore reads on exactly where it stopped.

    Args:
        recipe: The recipe.
        bigrams: The corpus, indexed.
        bos: Id of BOS.
        triggers: Ids of the triggers.
        step: Index of the step.

    Returns:
        Ids of shape (windows, window + 1), text first.
    """
    rng = np.random.default_rng([recipe.seed, step])
    length = recipe.window + 1  # one more than is read: the last id is only a target
    text = text_windows(bigrams.stream, recipe.text_windows, length, bos, rng)
    synthetic = backcopy_windows(bigrams, recipe.synthetic_windows, length, bos, triggers, recipe.trigger_rate, rng)
    return torch.from_numpy(np.concatenate([text, synthetic]))


def make_batches(recipe: Recipe, bigrams: Bigrams, bos: int, triggers: Ids, start: int = 0) -> Iterator[Tensor]:
    """The batches of a run from one step on.

    Args:
        recipe: The recipe.
        bigrams: The corpus, indexed.
        bos: Id of BOS.
        triggers: Ids of the triggers.
        start: First step.

    Yields:
        One batch per step.
    """
    for step in range(start, recipe.steps):
        yield make_batch(recipe, bigrams, bos, triggers, step)
