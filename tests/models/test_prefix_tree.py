"""Sequences as a tree: every token of the tree is run once, and every sequence comes out as it went in."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sd_lens.models.prefix_tree import prefix_trees, walk

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=8)


def replayed(sequences, segment):
    """What a machine that follows the steps has read when it reaches the end of each sequence, and the tokens it ran."""
    state, kept, ends, passes = (), {}, {}, []
    for step in walk(prefix_trees([torch.tensor(one) for one in sequences]), segment):
        if step.resume is not None:
            state = kept.pop(step.resume) if step.release else kept[step.resume]
        elif step.start == 0:
            state = ()
        assert len(state) == step.start
        state += tuple(step.tokens.tolist())
        passes.append((state, len(step.tokens), step.ends))
        ends |= dict.fromkeys(step.ends, state)
        if step.keep is not None:
            kept[step.keep] = state
    assert not kept  # nothing is held to the end
    return ends, passes


@given(SEQUENCES, st.integers(1, 4))
def test_every_sequence_is_read_and_every_shared_token_once(sequences, segment):
    ends, passes = replayed(sequences, segment)
    assert ends == {number: tuple(one) for number, one in enumerate(sequences)}
    beginnings = {tuple(one[:length]) for one in sequences for length in range(1, len(one) + 1)}
    run = [state[: len(state) - back] for state, length, _ in passes for back in range(length)]
    assert sorted(run) == sorted(beginnings)
    assert max(length for _, length, _ in passes) <= segment


@given(SEQUENCES)
def test_last_tokens_are_passes_of_their_own(sequences):
    assert all(length == 1 for _, length, ends in replayed(sequences, 100)[1] if ends)


def test_a_family_of_growing_prefixes_keeps_one_state():
    sequences = [[1] * n + tail for n in range(1, 9) for tail in ([0], [0, 0])]
    kept, most = set(), 0
    for step in walk(prefix_trees([torch.tensor(one) for one in sequences]), 100):
        kept -= {step.resume} if step.release else set()
        kept |= {step.keep} if step.keep is not None else set()
        most = max(most, len(kept))
    assert most == 1


def test_thousands_of_lengths():
    sequences = [torch.ones(n, dtype=torch.long) for n in range(1, 3000)]
    assert sum(len(step.tokens) for step in walk(prefix_trees(sequences), 512)) == 2999
