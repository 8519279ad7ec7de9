"""The greedy search against all subsets."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from sd_lens.applications.sparing import smallest_set

FULL = 2.0


def additive(costs):
    """A loss to which every projection that is not spared adds what it costs."""
    return lambda spared: FULL + sum(cost for name, cost in costs.items() if name not in spared)


def search(loss, names, budget, **options):
    return smallest_set(loss, list(names), full=FULL, budget=budget, **{"known": {}, **options})


@given(costs=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=7), budget=st.floats(0.001, 2.0))
def test_no_smaller_set_will_do(costs, budget):
    named = {f"p{i}": cost for i, cost in enumerate(costs)}
    loss = additive(named)
    found = search(loss, named, budget)
    subsets = [subset for size in range(len(named) + 1) for subset in itertools.combinations(named, size)]
    enough = [subset for subset in subsets if loss(subset) <= FULL + math.log1p(budget)]
    size = min(map(len, enough))
    assert found.within
    assert len(found.spared) == size
    assert found.loss == loss(found.spared)
    assert found.loss <= min(loss(subset) for subset in enough if len(subset) == size) + 1e-12


@given(weights=st.lists(st.floats(0.0, 1.0), min_size=30, max_size=30), budget=st.floats(0.001, 3.0))
def test_nothing_can_be_taken_back(weights, budget):
    """Losses that sparing more never raises: some parts go with any projection of a group spared, others need all of the group."""
    groups = [set(group) for size in range(1, 5) for group in itertools.combinations("abcd", size)]

    def loss(spared):
        some = sum(w for w, group in zip(weights[:15], groups, strict=True) if not group & set(spared))
        return FULL + some + sum(w for w, group in zip(weights[15:], groups, strict=True) if not group <= set(spared))

    found = search(loss, "abcd", budget)
    assert found.loss == loss(found.spared)
    assert found.within == (found.loss <= FULL + math.log1p(budget))
    if found.within:
        for name in found.spared:
            assert loss(set(found.spared) - {name}) > FULL + math.log1p(budget)


def test_what_a_later_find_makes_needless_is_taken_back():
    # a is the best alone, but b and c together leave nothing for it to do
    losses = {"": 3.0, "a": 2.4, "b": 2.5, "c": 2.6, "ab": 2.2, "ac": 2.3, "bc": 2.0, "abc": 2.0}
    asked = []

    def loss(spared):
        asked.append(spared)
        return losses["".join(sorted(spared))]

    found = search(loss, "abc", 0.01)
    assert (found.spared, found.loss, found.within) == (("b", "c"), 2.0, True)
    assert [step.spared for step in found.steps] == [("a",), ("a", "b"), ("a", "b", "c")]
    assert found.steps[0].tried == {"a": 2.4, "b": 2.5, "c": 2.6}
    assert found.n_evaluated == len(asked) == len({frozenset(names) for names in asked})


def test_known_losses_are_not_evaluated_again():
    costs = {"a": 0.5, "b": 0.4, "c": 0.01}
    loss, asked = additive(costs), []
    known = {names: loss(names) for names in ((), ("a",), ("b",), ("c",))}
    found = search(lambda spared: (asked.append(spared), loss(spared))[1], costs, 0.02, known=known)
    assert set(found.spared) == {"a", "b"}
    assert [set(names) for names in asked] == [{"a", "b"}, {"a", "c"}]
    assert found.n_evaluated == 2


def test_ends_where_no_projection_helps_any_more():
    costs = {"a": 1.0, "b": 0.02}
    found = search(lambda spared: additive(costs)(spared) + 0.5, costs, 0.01)
    assert (found.spared, found.within) == (("a",), False)  # b would take away 4 % of what is lost
    assert math.isclose(found.loss, FULL + 0.52)


def test_ends_at_the_largest_number_allowed():
    costs = {"a": 0.5, "b": 0.4, "c": 0.3}
    found = search(additive(costs), costs, 0.01, max_spared=2)
    assert (found.spared, found.within, len(found.steps)) == (("a", "b"), False, 2)
    assert search(additive(costs), costs, 0.01, max_spared=0).spared == ()
    assert search(additive(costs), costs, 0.01, max_spared=9).within
    # everything spared is not enough, and more than everything is allowed
    assert search(lambda spared: additive(costs)(spared) + 0.02, costs, 0.01, max_spared=9).spared == ("a", "b", "c")


def test_nothing_to_spare():
    assert search(lambda _: FULL, "ab", 0.0).spared == ()
    found = search(lambda _: 3.0, (), 0.01)
    assert (found.spared, found.within) == ((), False)


def test_why_a_search_ended():
    cost = {"a": 0.5, "b": 0.4, "c": 0.001}

    def loss(spared, base=0.0):
        return base + sum(cost[name] for name in cost if name not in spared)

    def ended(base=0.0, **options):
        found = smallest_set(lambda spared: loss(spared, base), "abc", full=0.0, budget=0.01, known={}, **options)
        return found.because, found.spared, found.within

    assert ended() == ("", ("a", "b"), True)
    assert ended(max_spared=1) == ("limit", ("a",), False)
    assert ended(base=0.1) == ("gain", ("a", "b"), False)
    assert ended(max_spared=0) == ("limit", (), False)
    flat = smallest_set(lambda spared: 1.0 - 0.3 * len(spared), "abc", full=0.0, budget=0.01, known={})
    assert (flat.because, flat.spared) == ("candidates", ("a", "b", "c"))
