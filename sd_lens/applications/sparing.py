"""The smallest set of projections that a quantiser must spare, found greedily.

Trying every set of blocks is out of reach, and not needed: what few down-projections cost adds up, so they are found one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Loss = Callable[[tuple[str, ...]], float]
"""Mean loss, in nats, of the model quantised but for some projections."""

MIN_GAIN = 0.05
"""A search ends where the best step takes away less than this share of what is still lost."""


@dataclass(frozen=True)
class Step:
    """One round of the search.

    Attributes:
        spared: What is spared from here on.
        loss: Mean loss then.
        tried: Loss of every set tried in this round, by the name of the projection added.
    """

    spared: tuple[str, ...]
    loss: float
    tried: Mapping[str, float]


@dataclass(frozen=True)
class Search:
    """What the search found.

    Attributes:
        spared: The set.
        loss: Its mean loss.
        within: Whether that is within the budget.
        because: Why the search ended before that: ``"limit"`` (no more may be spared), ``"gain"`` (no candidate takes away enough of what is
            lost), ``"candidates"`` (all are spared); empty where it did not.
        steps: The rounds.
        n_evaluated: How many sets were evaluated.
    """

    spared: tuple[str, ...]
    loss: float
    within: bool
    because: str
    steps: tuple[Step, ...]
    n_evaluated: int


def smallest_set(
    loss: Loss,
    candidates: Sequence[str],
    *,
    full: float,
    budget: float,
    max_spared: int | None = None,
    known: Mapping[tuple[str, ...], float],
) -> Search:
    """Adds the candidate that lowers the loss most until it is within the budget, then takes back what is not needed.

    Args:
        loss: Evaluates a set.
        candidates: Names of the projections that may be spared.
        full: Mean loss in full precision.
        budget: By how much the perplexity may exceed that of full precision, as a share of it.
        max_spared: Largest number of projections spared; default: all candidates.
        known: Losses of sets that were evaluated before.

    Returns:
        The set, within the budget or the best that was found.

    Example:
        >>> cost = {"a": 0.5, "b": 0.01, "c": 0.4}
        >>> found = smallest_set(lambda spared: sum(cost[x] for x in cost if x not in spared), "abc", full=0.0, budget=0.05, known={})
        >>> found.spared, found.within
        (('a', 'c'), True)
    """
    allowed = full + math.log1p(budget)
    losses = {frozenset(spared): value for spared, value in known.items()}
    evaluated = [0]

    def of(spared: tuple[str, ...]) -> float:
        key = frozenset(spared)
        if key not in losses:
            losses[key] = loss(spared)
            evaluated[0] += 1
        return losses[key]

    spared: tuple[str, ...] = ()
    now = of(spared)
    steps: list[Step] = []
    most = len(candidates) if max_spared is None else min(max_spared, len(candidates))
    because = ""
    while now > allowed:
        if len(spared) == most:
            because = "candidates" if most == len(candidates) else "limit"
            break
        tried = {name: of((*spared, name)) for name in candidates if name not in spared}
        best = min(tried, key=lambda name: tried[name])
        if now - tried[best] < MIN_GAIN * (now - full):
            because = "gain"
            break
        spared, now = (*spared, best), tried[best]
        steps.append(Step(spared, now, tried))
    if now <= allowed:
        for name in spared[:-1]:  # the last one was needed
            fewer = tuple(other for other in spared if other != name)
            if of(fewer) <= allowed:
                spared, now = fewer, of(fewer)
    return Search(spared, now, now <= allowed, because, tuple(steps), evaluated[0])
