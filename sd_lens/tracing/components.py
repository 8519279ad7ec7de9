"""The residual stream, and anything linear in it, split exactly over what wrote it.

The stream after a block is the sum of the embedding, of the positional embedding where there is one, and of what every sublayer so
far added: ``resid_post = resid_pre + attn_out + mlp_out`` at every block. An attention layer's part is in turn the sum over its
heads and its bias. So the product of the stream with any vector splits over these components, and what is left of it is rounding.

Nothing is kept but one number per token and component of a batch: each activation meets its vector inside the hook. Of blocks whose FFNs
are split further, the stream that the FFN reads is kept to the end of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from sd_lens.models import hook_names
from sd_lens.models.batches import Batch
from sd_lens.models.loading import weights_of
from sd_lens.models.positions import adds_positions
from sd_lens.models.splits import ExpertSplit, HeadSplit, NeuronSplit, wide
from sd_lens.models.weights import BlockWeights, MoEWeights
from sd_lens.tracing.source import Source


@dataclass(frozen=True)
class Component:
    """One of the terms that add up to the stream.

    Attributes:
        kind: ``"embed"``, ``"pos_embed"``, ``"head"``, ``"bias"`` (of an attention layer) or ``"ffn"``; of the inside of an FFN
            ``"neuron"``, ``"expert"`` or ``"ffn_bias"``.
        block: Its block; None for embeddings.
        index: Which head, neuron or expert (a shared expert comes last); None for the others.
        keys: ``"itself"`` or ``"others"`` where a head's part is split by which tokens it was taken from, else None.
    """

    kind: str
    block: int | None = None
    index: int | None = None
    keys: str | None = None

    @property
    def name(self) -> str:
        """A short name, such as ``L2H3``, ``L2 FFN`` or ``L2N77``."""
        name = {
            "embed": "embedding",
            "pos_embed": "positions",
            "head": f"L{self.block}H{self.index}",
            "bias": f"L{self.block} attention bias",
            "ffn": f"L{self.block} FFN",
            "neuron": f"L{self.block}N{self.index}",
            "expert": f"L{self.block}E{self.index}",
            "ffn_bias": f"L{self.block} FFN bias",
        }[self.kind]
        return name if self.keys is None else f"{name} on {self.keys}"


@dataclass(frozen=True)
class Parts:
    """What the real tokens of one batch are made of, in the batch's order.

    Attributes:
        values: One column per component.
        whole: What they should add up to, measured at a hook point of its own.
        inside: Gives, for the block of an FFN that was asked for, one column per neuron or expert and a last one for its biases. They are
            computed when asked for, so that one block's are there at a time.
    """

    values: Float[Tensor, "token component"]
    whole: Float[Tensor, "token"]
    inside: Callable[[int], Float[Tensor, "token unit"]]


class StreamSplit:
    """Splits the product of a vector with the stream after a block, or with the stream that a block's FFN reads.

    Args:
        source: Where activations come from.
        vector: The vector.
        block: The block.
        ffn_input: True for the stream entering the block's FFN, False for the stream leaving the block.
        divide: Gives, of that stream, what the product is divided by, held at its value for each token; None for nothing.
        inside: Blocks whose FFNs are split further, over neurons or experts.
        by_key: Whether a head's part is split by where it was taken from: from the token itself, or from the others.

    Raises:
        ValueError: An FFN to be split is not among the parts, or its weights cannot be read; a cache lacks hook points.
    """

    def __init__(
        self,
        source: Source,
        vector: Float[Tensor, "d_model"],
        block: int,
        *,
        ffn_input: bool = False,
        divide: Callable[[Tensor], Tensor] | None = None,
        inside: Sequence[int] = (),
        by_key: bool = False,
    ):
        weights = weights_of(source.model)
        self.source, self.block = source, block
        self.vector, self.divide = vector, divide
        # Whether, of the block itself, what its attention adds is part of the stream in question.
        attention_before = not (ffn_input and weights[block].parallel)
        self._n_ffns = block + (not ffn_input)
        bad = [b for b in inside if not 0 <= b < self._n_ffns]
        if bad:
            allowed = f"0 to {self._n_ffns - 1}, whose FFNs are among the parts" if self._n_ffns else "none, no FFN comes before"
            raise ValueError(f"neurons: got block {bad[0]}; allowed: {allowed}")
        self.heads = [HeadSplit(weights.attention(b), vector) for b in range(block + attention_before)]
        self.by_key = by_key
        self.inner = {b: _Inner(weights[b], vector) for b in sorted(set(inside))}
        self._positions = adds_positions(source.model)
        self.entering = {b: hook_names.entering_ffn(b, parallel=inner.block.parallel) for b, inner in self.inner.items()}
        ffn_reads = hook_names.entering_ffn(block, parallel=not attention_before)
        self.whole = ffn_reads if ffn_input else [hook_names.resid_post(block)]
        self.points = self._points()
        source.require(self.points)

    def _points(self) -> list[str]:
        """The hook points needed, each once; by block, so that a cache's come in an order in which they can be worked off."""
        names = [hook_names.pos_embed()] * self._positions + [hook_names.resid_pre(0)]
        for block in range(self.block + 1):
            names += self.entering.get(block, [])
            if block < len(self.heads):
                names += [hook_names.value(block), hook_names.pattern(block)] * self.by_key + [hook_names.mixed_values(block)]
            names += [hook_names.mlp_out(block)] * (block < self._n_ffns)
        return list(dict.fromkeys([*names, *self.whole]))

    @property
    def terms(self) -> list[tuple[str, list[Component]]]:
        """The components, by the hook points that they are read off."""
        keys = ("itself", "others") if self.by_key else (None,)
        found = [(hook_names.resid_pre(0), [Component("embed")])]
        if self._positions:
            found.append((hook_names.pos_embed(), [Component("pos_embed")]))
        for block in range(self.block + 1):
            if block < len(self.heads):
                heads = [Component("head", block, head, key) for head in range(self.heads[block].n_parts) for key in keys]
                found.append((hook_names.mixed_values(block), [*heads, Component("bias", block)]))
            if block < self._n_ffns:
                found.append((hook_names.mlp_out(block), [Component("ffn", block)]))
        return found

    @property
    def components(self) -> tuple[Component, ...]:
        """What the columns of `Parts.values` are."""
        return tuple(component for _, components in self.terms for component in components)

    def inner_components(self, block: int) -> tuple[Component, ...]:
        """What the columns of `Parts.inside` are."""
        inner = self.inner[block]
        units = [Component(inner.kind, block, index) for index in range(inner.split.n_parts)]
        return (*units, Component("ffn_bias", block))

    def run(self, on_parts: Callable[[Batch, Parts], None], *, label: str = "attribution") -> None:
        """Hands over, batch by batch, what the tokens are made of.

        Args:
            on_parts: Called with each batch and its parts.
            label: Of a progress bar.
        """

        def on_batch(batch: Batch) -> Callable[[int, Tensor], None]:
            reduction = _Reduction(self, batch)
            left = set(range(len(self.points)))

            def receive(point: int, activation: Tensor) -> None:
                reduction.add(self.points[point], activation)
                left.discard(point)
                if not left:
                    on_parts(batch, reduction.parts())

            return receive

        self.source.run(self.points, on_batch, stop_at=self.block + 1, label=label)


class _Inner:
    """An FFN that is split over its neurons or experts."""

    def __init__(self, block: BlockWeights, vector: Tensor):
        self.block = block
        ffn = block.ffn
        self.split = ExpertSplit(ffn, vector) if isinstance(ffn, MoEWeights) else NeuronSplit(ffn, vector)
        self.kind = "expert" if isinstance(ffn, MoEWeights) else "neuron"

    def __call__(self, entering: Tensor) -> Tensor:
        units, bias = self.split(self.block.ffn.input(entering))
        return torch.cat([units, bias.unsqueeze(-1)], dim=-1)


class _Reduction:
    """One batch's activations, each reduced as soon as it is there."""

    def __init__(self, split: StreamSplit, batch: Batch):
        self._split, self._mask = split, batch.mask
        self._of_head = {
            point(block): block
            for block in range(len(split.heads))
            for point in (hook_names.mixed_values, *(hook_names.value, hook_names.pattern) * split.by_key)
        }
        self._streams = {name for names in (*split.entering.values(), split.whole) for name in names}
        self._products = {name for name, _ in split.terms} - set(self._of_head)
        self._reduced: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}

    def add(self, name: str, activation: Tensor) -> None:
        """Takes in the activation at a hook point."""
        if name in self._of_head:
            block, mask = self._of_head[name], self._mask.to(activation.device)
            if name == hook_names.pattern(block):  # only what each token pays to itself is needed
                self._kept[name] = activation.diagonal(dim1=-2, dim2=-1).mT[mask]
            else:
                self._kept[name] = activation.reshape(*mask.shape, -1)[mask]
            # Which of a layer's hook points comes last depends on the architecture.
            if all(point in self._kept for point, its_block in self._of_head.items() if its_block == block):
                self._reduced[hook_names.mixed_values(block)] = self._by_head(block)
        else:
            stream = self._real(activation)
            if name in self._products:
                self._reduced[name] = self._product(stream).unsqueeze(-1)
            if name in self._streams:
                self._kept[name] = stream

    def parts(self) -> Parts:
        """What the batch's tokens are made of, once everything is there."""
        split = self._split
        if (positions := hook_names.pos_embed()) in self._reduced:  # the stream's beginning holds both embeddings
            self._reduced[hook_names.resid_pre(0)] -= self._reduced[positions]
        values = torch.cat([self._reduced[name].cpu() for name, _ in split.terms], dim=-1)
        stream = self._sum(split.whole)
        whole = self._product(stream).cpu()
        divisor = None if split.divide is None else split.divide(stream).cpu().reshape(-1)

        def inside(block: int) -> Tensor:
            units = split.inner[block](self._sum(split.entering[block])).cpu()
            return units if divisor is None else units.div_(divisor.unsqueeze(-1))

        if divisor is not None:
            values, whole = values / divisor.unsqueeze(-1), whole / divisor
        return Parts(values, whole, inside)

    def _product(self, stream: Tensor) -> Tensor:
        stream = wide(stream)
        return stream @ self._split.vector.to(stream)

    def _sum(self, names: list[str]) -> Tensor:
        streams = [self._kept[name] for name in names]
        return streams[0] if len(streams) == 1 else streams[0] + streams[1].to(streams[0].device)

    def _by_head(self, block: int) -> Tensor:
        """What each head adds, and the biases; with two columns per head where its keys are told apart."""
        split, z = self._split.heads[block], self._kept.pop(hook_names.mixed_values(block))
        z = z.unflatten(-1, (split.n_parts, -1))
        parts, bias = split(z)
        if self._split.by_key:
            values = self._kept.pop(hook_names.value(block)).unflatten(-1, (-1, z.shape[-1]))
            values = repeat(values, "token kv d_head -> token (kv group) d_head", group=split.n_parts // values.shape[1])
            itself, _ = split(z, of=self._kept.pop(hook_names.pattern(block)).unsqueeze(-1) * values)
            parts = torch.stack([itself, parts - itself], dim=-1).flatten(-2)
        return torch.cat([parts, bias.unsqueeze(-1)], dim=-1)

    def _real(self, activation: Tensor) -> Tensor:
        """The rows of the batch's real tokens."""
        shape = (*self._mask.shape, activation.shape[-1])
        if activation.numel() != torch.Size(shape).numel():  # positions may come once for the whole batch
            activation = activation.expand(shape)
        return activation.reshape(shape)[self._mask.to(activation.device)]
