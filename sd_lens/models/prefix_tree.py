"""Token sequences as a tree of what they share, walked so that every shared beginning is run once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(eq=False)
class Node:
    """A run of tokens that the same sequences share.

    Attributes:
        start: Position of its first token.
        tokens: Its token ids.
        ends: Which sequences end with its last token.
        branches: How they go on.
        depth: Tokens of the longest sequence through it.
    """

    start: int
    tokens: Int[np.ndarray, "_"]
    ends: list[int] = field(default_factory=list)
    branches: list[Node] = field(default_factory=list)
    depth: int = 0


def prefix_trees(sequences: Sequence[Int[Tensor, "_"]]) -> list[Node]:
    """The sequences as trees, one for each first token.

    Args:
        sequences: Token ids, at least one in each. Equal sequences end in the same place.

    Example:
        >>> import torch
        >>> root = prefix_trees([torch.tensor([1, 1, 0]), torch.tensor([1, 1, 0, 0]), torch.tensor([1, 1, 1])])[0]
        >>> root.tokens.tolist(), [(node.tokens.tolist(), node.ends) for node in root.branches]
        ([1, 1], [([0], [0]), ([1], [2])])
    """
    arrays = [sequence.cpu().numpy() for sequence in sequences]
    # Bytes of numbers with the highest byte first are ordered as the numbers are: neighbours share the most.
    order = sorted(range(len(arrays)), key=lambda number: arrays[number].astype(">u4").tobytes())
    roots: list[Node] = []
    path: list[Node] = []  # the nodes of the sequence before
    before = np.empty(0, dtype=np.int64)
    for number in order:
        tokens = arrays[number]
        shared = _shared(before, tokens)
        while path and path[-1].start >= shared:
            path.pop()
        if path and path[-1].start + len(path[-1].tokens) > shared:
            _cut(path[-1], shared)
        if shared == len(tokens):
            path[-1].ends.append(number)
        else:
            node = Node(shared, tokens[shared:], [number])
            (path[-1].branches if path else roots).append(node)
            path.append(node)
        before = tokens
    _measure(roots)
    return roots


def _cut(node: Node, at: int) -> None:
    """Cuts a node in two, where a sequence leaves it."""
    length = at - node.start
    rest = Node(at, node.tokens[length:], node.ends, node.branches)
    node.tokens, node.ends, node.branches = node.tokens[:length], [], [rest]


def _measure(roots: Sequence[Node]) -> None:
    """Sets the nodes' depths."""
    nodes = list(roots)
    for node in nodes:  # grows meanwhile: parents stand before their branches
        nodes += node.branches
    for node in reversed(nodes):
        node.depth = max((branch.depth for branch in node.branches), default=node.start + len(node.tokens))


def _shared(left: Int[np.ndarray, "_"], right: Int[np.ndarray, "_"]) -> int:
    length = min(len(left), len(right))
    differing = np.flatnonzero(left[:length] != right[:length])
    return int(differing[0]) if len(differing) else length


@dataclass(frozen=True)
class Step:
    """One pass over a few tokens.

    Attributes:
        tokens: Its token ids.
        start: Position of the first of them.
        ends: Which sequences end with the last of them.
        resume: Which kept state it goes on from; None for the one the step before left.
        keep: Under which number the state it leaves is to be kept; None where nothing but the next step needs it.
        release: Whether nothing needs the state it resumed from any more.
    """

    tokens: Int[Tensor, "_"]
    start: int
    ends: tuple[int, ...]
    resume: int | None
    keep: int | None
    release: bool


def walk(roots: Sequence[Node], segment: int) -> Iterator[Step]:
    """The passes that run every node of the trees once.

    The last token of every sequence is a pass of its own: what two sequences end in is then computed by the same kernels, on the
    same number of rows. Of a node's branches the deepest comes last, so that few states are kept at a time: one for families of growing
    prefixes, whatever their number.

    Args:
        roots: The trees.
        segment: Most tokens of one pass, which bounds the memory of attention patterns.
    """
    stack: list[tuple[Node, int | None, bool]] = [(root, None, False) for root in reversed(roots)]
    states = 0
    while stack:
        node, resume, release = stack.pop()
        cuts = [*range(0, len(node.tokens), segment), len(node.tokens)]
        if node.ends and len(node.tokens) > 1:
            cuts = sorted({*cuts, len(node.tokens) - 1})
        keep = None
        if len(node.branches) > 1:
            states += 1
            keep = states
        for begin, end in pairwise(cuts):
            last = end == len(node.tokens)
            yield Step(
                torch.from_numpy(node.tokens[begin:end].copy()),
                node.start + begin,
                tuple(node.ends) if last else (),
                resume if begin == 0 else None,
                keep if last else None,
                release and begin == 0,
            )
        # On the stack the one to run last comes first.
        branches = sorted(node.branches, key=lambda branch: -branch.depth)
        stack += [(branch, keep, keep is not None and number == 0) for number, branch in enumerate(branches)]
