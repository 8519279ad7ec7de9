"""Small models with high-norm tokens whose culprit is known: the ground truth of attributions.

In each of them one thing, or a mixture with known shares, writes the norm, and one thing, or a mixture, sets it off. Directions
and triggers stand orthogonal to whatever else is written, so that the shares are known in closed form, while every other head and
neuron goes about business of its own.

A *marker* in the embedding of the trigger token is what planted heads and earlier neurons recognise it by. Such a head attends
to its own token alone: queries and keys read the embedding, sharply, and a vector is most similar to itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from sd_lens.models.planted import _background, _gelu_of, _Layout, _layout
from sd_lens.models.planted_hf import Architecture, Matrices, boot

Kind = Literal[
    "neuron",
    "embedding",
    "embedding_norm",
    "position",
    "head_trigger",
    "attention",
    "two_blocks",
    "opposed",
    "earlier_ffn_trigger",
]
Component = tuple[str, int | None, int | None]
"""What is written by whom: ("embed", None, None), ("pos_embed", None, None), ("head", block, h), ("bias", block, None),
("ffn", block, None), and ("neuron", block, n) for a part of an FFN."""

KINDS: tuple[Kind, ...] = get_args(Kind)
CASES: list[tuple[Kind, Architecture]] = [
    (kind, architecture)
    for kind in KINDS
    for architecture in get_args(Architecture)
    if kind != "position" or architecture == "gpt2"  # the only one whose positions are added to the stream
]
"""Every kind in every architecture that can have it."""

D_MODEL, HEADS, BLOCKS, VOCAB, CONTEXT = 64, 4, 4, 97, 40
TRIGGER_TOKEN = 90
NORM = 1000.0
DECAY_BLOCK = BLOCKS - 1

_HEAD = 2
_NEURON = 7
_SCALE, _THRESHOLD = (
    4.0,
    5.0,
)  # of planted neurons; the threshold lets a plain FFN ignore what is faint, as a gated one's square does
_SHARP = 3.0  # of a planted head's queries and keys
_STRONG, _MARKED = 0.8, 0.5  # what the trigger token's unit embedding has of the trigger, or of the marker
_LISTENS = {"llama": 0.015, "gpt2": 0.01, "gpt_neox": 0.02}  # how loud all other heads and neurons hear the embeddings


@dataclass(frozen=True)
class Culprit:
    """A model and who is to blame.

    Attributes:
        model: The TransformerLens model.
        kind: What was planted.
        architecture: In which architecture.
        explosion_blocks: Blocks that `find_defects` must find; none where the embedding has the norm from the start.
        direction: Unit vector along which the norm goes.
        trigger: Unit vector that the FFN of the first explosion block answers to, in its input before the norm's gain; None where
            attention writes the norm, or no block does. (Where a second block takes part, its FFN answers to the direction.)
        trigger_token: The token that explodes; None where it is whatever token stands at position 0.
        norm: Projection of an exploding token's stream on the direction after `block`.
        block: The block after which `norm_parts` hold: the last that takes part.
        norm_parts: Shares in that projection by component; the components not named have none. Neurons are parts of their FFN.
        trigger_parts: Shares in the projection on the trigger of the FFN's input at the first explosion block.
    """

    model: Any
    kind: Kind
    architecture: Architecture
    explosion_blocks: tuple[int, ...]
    direction: Tensor
    trigger: Tensor | None
    trigger_token: int | None
    norm: float
    block: int
    norm_parts: Mapping[Component, float]
    trigger_parts: Mapping[Component, float]

    @property
    def parallel(self) -> bool:
        """Whether attention and FFN of a block read the same stream."""
        return self.architecture == "gpt_neox"

    def prompts(self, *, seed: int = 0) -> Tensor:
        """Token ids (batch, pos) of distinct tokens, among which the trigger token stands once, twice, or not at all."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.stack([torch.randperm(TRIGGER_TOKEN - 1, generator=generator)[:12] + 1 for _ in range(5)])
        for row, pos in ((0, 0), (1, 5), (2, 3), (2, 8), (3, 11)):
            tokens[row, pos] = TRIGGER_TOKEN
        return tokens

    def explodes(self, tokens: Tensor) -> Tensor:
        """Which of the tokens must have a high norm."""
        if self.trigger_token is not None:
            return tokens == self.trigger_token
        return (torch.zeros_like(tokens) + torch.arange(tokens.shape[1])) == 0


class _Planting:
    """Weights in the making, with what the exploding token's stream holds so far, but for the others' chatter."""

    def __init__(self, architecture: Architecture, seed: int):
        self.architecture: Architecture = architecture
        self._generator = torch.Generator().manual_seed(seed)
        self._gated = architecture == "llama"
        kv_heads = HEADS // 2 if self._gated else HEADS
        self._layout: _Layout = _layout(D_MODEL, HEADS, kv_heads, BLOCKS, VOCAB, self._generator)
        self.trigger, self.direction = self._layout.trigger, self._layout.direction
        self._embedded = self._layout.tokens
        self._words, self.marker = self._embedded[:-1], self._embedded[-1]
        # A background block reads the embeddings' subspace as loudly as its basis is long.
        audible = replace(self._layout, tokens=_LISTENS[architecture] / 2e-5 * self._embedded)
        self.blocks: list[Matrices] = [_background(audible, gated=self._gated, generator=self._generator) for _ in range(BLOCKS)]
        words = F.normalize(torch.randn(VOCAB, len(self._words), generator=self._generator), dim=-1)
        self.embedding = words @ self._words
        self.positions = 0.002 * torch.randn(CONTEXT, len(self._words), generator=self._generator) @ self._words
        self.stream = self.embedding[TRIGGER_TOKEN]

    def embed(self, content: Tensor) -> None:
        """Gives the trigger token a share of something, which takes the place of as much of its word."""
        word = (1 - content.square().sum()).clamp(min=0.1).sqrt()
        self.stream = self.embedding[TRIGGER_TOKEN] = word * self.embedding[TRIGGER_TOKEN] + content

    def place(self, content: Tensor) -> None:
        """Adds something at position 0."""
        self.positions[0] += content
        self.stream = self.stream + content

    def neurons(self, block: int, shares: Mapping[int, float], *, reads: Tensor, writes: Tensor) -> None:
        """Makes neurons answer to what they read by writing a vector together; what they write joins the stream."""
        matrices = self.blocks[block]
        response = self._response(_SCALE * self._seen(reads))
        for index, share in shares.items():
            weight = _SCALE * reads / matrices.gain2
            matrices.W_in[:, index] = weight
            if matrices.W_gate is not None:
                matrices.W_gate[:, index] = weight
            else:
                matrices.b_in[index] = -_THRESHOLD
            matrices.W_out[index] = share / response * writes
        self.stream = self.stream + writes

    def head(self, block: int, *, reads: Tensor, writes: Tensor) -> None:
        """Makes the head attend to its own token and answer to what it reads there by writing a vector."""
        matrices = self.blocks[block]
        group = len(matrices.W_O) // len(matrices.W_V)
        shared = _HEAD // group
        gain = matrices.gain1.unsqueeze(-1)
        matrices.W_Q[_HEAD] = matrices.W_K[shared] = _SHARP * self._embedded.T / gain
        matrices.W_V[shared][:, 0] = reads / matrices.gain1
        for head in range(shared * group, (shared + 1) * group):  # those that share its values must not write them too
            matrices.W_O[head][0] = 0.0
        matrices.W_O[_HEAD][0] = writes / self._seen(reads)
        self.stream = self.stream + writes

    def _seen(self, reads: Tensor) -> Tensor:
        """What a sublayer reads off the normalised stream."""
        return D_MODEL**0.5 * self.stream @ reads / self.stream.norm()

    def _response(self, x: Tensor) -> Tensor:
        return F.silu(x) * x if self._gated else _gelu_of(self.architecture)(x - _THRESHOLD)

    def finish(self) -> Any:
        """The model, in which the last block takes away what there is along the direction."""
        written = self.stream @ self.direction
        self.neurons(DECAY_BLOCK, {5: 1.0}, reads=self.direction, writes=-written * self.direction)
        unembedding = torch.randn(self.embedding.shape, generator=self._generator) / D_MODEL**0.5
        return boot(self.architecture, self.blocks, embedding=self.embedding, unembedding=unembedding, positions=self.positions)


def culprit(kind: Kind, architecture: Architecture = "llama", *, seed: int = 0) -> Culprit:
    """A model in which the culprit of an explosion is known.

    Args:
        kind: What is planted (the trigger is in the trigger token's embedding where nothing else is said):

            - ``"neuron"``: one neuron of block 1 writes the norm;
            - ``"embedding"``: three neurons of block 0 write it, 50, 30 and 20 %;
            - ``"embedding_norm"``: the trigger token's embedding has the norm from the start;
            - ``"position"`` (GPT-2): the trigger is in the positional embedding of position 0, for a neuron of block 1;
            - ``"head_trigger"``: a head writes the trigger, for a neuron of block 2. The head is in the same block, with parallel
              sublayers in the block before;
            - ``"attention"``: a head of block 1 writes the norm;
            - ``"two_blocks"``: the FFN of block 1 writes 60 % and, answering to that, the one of block 2 another 40 %;
            - ``"opposed"``: the FFN of block 1 writes 125 % and the one of block 2 takes 25 % away;
            - ``"earlier_ffn_trigger"``: 30 % of the trigger are in the embedding, and 70 % are written by the FFN of block 0, for a
              neuron of block 2.
        architecture: As in `planted`.
        seed: Seeds every random weight.
    """
    if (kind, architecture) not in CASES:
        raise ValueError(f"kind, architecture: got {kind!r}, {architecture!r}; allowed: {CASES}")
    plant = _Planting(architecture, seed)
    trigger, direction, norm = plant.trigger, plant.direction, NORM * plant.direction
    embed: Component = ("embed", None, None)
    one = {_NEURON: 1.0}
    explosions, block = (1,), 1
    norm_parts: dict[Component, float] = {("ffn", 1, None): 1.0, ("neuron", 1, _NEURON): 1.0}
    trigger_parts: dict[Component, float] = {embed: 1.0}
    triggered = True
    if kind == "neuron":
        plant.embed(_STRONG * trigger)
        plant.neurons(1, one, reads=trigger, writes=norm)
    elif kind == "embedding":
        explosions, block = (0,), 0
        shares = {20: 0.3, _NEURON: 0.5, 33: 0.2}
        norm_parts = {("ffn", 0, None): 1.0}
        norm_parts.update({("neuron", 0, index): share for index, share in shares.items()})
        plant.embed(_STRONG * trigger)
        plant.neurons(0, shares, reads=trigger, writes=norm)
    elif kind == "embedding_norm":
        explosions, norm_parts, trigger_parts, triggered = (), trigger_parts, {}, False
        plant.embed(norm)
    elif kind == "position":
        trigger_parts = {("pos_embed", None, None): 1.0}
        plant.place(2.0 * trigger)
        plant.neurons(1, one, reads=trigger, writes=norm)
    elif kind == "head_trigger":
        at = 1 if architecture == "gpt_neox" else 2
        explosions, block = (2,), 2
        norm_parts = {("ffn", 2, None): 1.0, ("neuron", 2, _NEURON): 1.0}
        trigger_parts = {("head", at, _HEAD): 1.0}
        plant.embed(_MARKED * plant.marker)
        plant.head(at, reads=plant.marker, writes=2.0 * trigger)
        plant.neurons(2, one, reads=trigger, writes=norm)
    elif kind == "attention":
        norm_parts = {("head", 1, _HEAD): 1.0}
        trigger_parts, triggered = {}, False
        plant.embed(_MARKED * plant.marker)
        plant.head(1, reads=plant.marker, writes=norm)
    elif kind in ("two_blocks", "opposed"):
        first, second = (0.6, 0.4) if kind == "two_blocks" else (1.25, -0.25)
        explosions, block = ((1, 2) if kind == "two_blocks" else (1,)), 2
        norm_parts = {("ffn", 1, None): first, ("neuron", 1, _NEURON): first}
        norm_parts |= {("ffn", 2, None): second, ("neuron", 2, 11): second}
        plant.embed(_STRONG * trigger)
        plant.neurons(1, one, reads=trigger, writes=first * norm)
        plant.neurons(2, {11: 1.0}, reads=direction, writes=second * norm)
    elif kind == "earlier_ffn_trigger":
        explosions, block = (2,), 2
        norm_parts = {("ffn", 2, None): 1.0, ("neuron", 2, _NEURON): 1.0}
        trigger_parts = {embed: 0.3, ("ffn", 0, None): 0.7, ("neuron", 0, 11): 0.7}
        plant.embed(_MARKED * plant.marker + 0.3 * 1.6 * trigger)
        plant.neurons(0, {11: 1.0}, reads=plant.marker, writes=0.7 * 1.6 * trigger)
        plant.neurons(2, one, reads=trigger, writes=norm)
    return Culprit(
        model=plant.finish(),
        kind=kind,
        architecture=architecture,
        explosion_blocks=explosions,
        direction=direction,
        trigger=trigger if triggered else None,
        trigger_token=None if kind == "position" else TRIGGER_TOKEN,
        norm=NORM,
        block=block,
        norm_parts=norm_parts,
        trigger_parts=trigger_parts,
    )


@functools.cache
def cached(kind: Kind, architecture: Architecture = "llama") -> Culprit:
    """The culprit of seed 0, built once per process and shared: leave its model as you found it."""
    return culprit(kind, architecture)


def components(parts: Mapping[Component, float]) -> Iterator[tuple[Component, float]]:
    """The parts that make up the whole: without neurons, which are parts of their FFN."""
    return ((component, share) for component, share in parts.items() if component[0] != "neuron")
