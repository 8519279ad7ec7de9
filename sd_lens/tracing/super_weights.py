"""Which single weights of an FFN's output matrix make the large norm.

A super weight (Yu et al. 2024, *The Super Weight in Large Language Models*, arXiv 2411.07191, section 3) is one entry of an FFN's
``down_proj`` without which a whole model fails. Yu et al. find them where the input and the output of that projection both spike. Here
a spike is measured against what ordinary tokens show, and since every entry in the row of a neuron that spikes, or in the column of
a dimension that spikes, would pass for one, an entry must besides make that spike by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sd_lens.models import hook_names
from sd_lens.models.batches import Batch
from sd_lens.models.loading import require_usable, weights_of
from sd_lens.models.parameters import Expert, entry_names
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.splits import wide
from sd_lens.models.tokens import Prompts
from sd_lens.models.weights import BlockWeights, FFNWeights, MoEWeights
from sd_lens.tracing.arguments import require_blocks
from sd_lens.tracing.defects import find_defects
from sd_lens.tracing.source import Source, source_of
from sd_lens.tracing.trace import MIN_RATIO, CacheLike, NormTrace, require_ratio

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MIN_SHARE = 0.5
"""A super weight makes at least this share of the dimension that it writes to."""
MIN_ENERGY = 0.1
"""That dimension holds at least this share of the squared length of what the FFN writes: at most ten dimensions can."""
_NEURONS = 8  # at most so many neurons are looked at for each dimension of a token


@dataclass(frozen=True)
class SuperWeight:
    """One candidate: the weight from a neuron to a dimension of the residual stream.

    Attributes:
        block: The block.
        expert: Which expert of a mixture, ``"shared"`` for the one that every token goes through; None in a dense block.
        neuron: The neuron.
        dim: The dimension.
        weight: The entry ``W_out[neuron, dim]``.
        activation: The neuron's activation at the token where the entry contributes most.
        output: What the FFN writes to the dimension there.
        share: The entry's own contribution relative to that.
        energy: The dimension's share of the squared length of what the FFN writes there.
        n_tokens: At how many tokens the entry is a candidate.
        token: The token where it contributes most, as text.
        prompt: Which prompt that token is in.
        pos: Its position there.
        tl: Where the entry is in the TransformerLens model.
        hf: Where it is in the Hugging Face model's ``state_dict()``; None where there is no such model.
    """

    block: int
    expert: Expert
    neuron: int
    dim: int
    weight: float
    activation: float
    output: float
    share: float
    energy: float
    n_tokens: int
    token: str
    prompt: int
    pos: int
    tl: str
    hf: str | None


@dataclass(frozen=True)
class SuperWeights:
    """The super-weight candidates of a model; possibly that there are none.

    Attributes:
        model_name: The model.
        blocks: The blocks whose FFNs were looked at.
        n_tokens: How many high-norm tokens there are.
        min_ratio: How many times an ordinary token's a high norm, and a spike, is.
        min_share: Least share of the dimension's output that an entry makes.
        min_energy: Least share of the squared length of the FFN's output that the dimension holds.
        rows: The candidates, the largest contribution first.
    """

    model_name: str
    blocks: tuple[int, ...]
    n_tokens: int
    min_ratio: float
    min_share: float
    min_energy: float
    rows: tuple[SuperWeight, ...]

    @property
    def found(self) -> bool:
        """Whether there is any candidate."""
        return bool(self.rows)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per candidate."""
        return pd.DataFrame([vars(row) for row in self.rows], columns=list(SuperWeight.__dataclass_fields__))

    def plot(self) -> Figure:
        """What each candidate contributes beside the whole of what its dimension gets."""
        from sd_lens.display.figures import super_weight_bars

        return super_weight_bars(self)

    def __repr__(self) -> str:
        if not self.blocks:
            return f"SuperWeights({self.model_name}: none, no block makes a large norm)"
        if not self.rows:
            return f"SuperWeights({self.model_name}: none in block {', '.join(map(str, self.blocks))})"
        shown = ", ".join(row.tl for row in self.rows[:4])
        return f"SuperWeights({self.model_name}: {shown}{' ...' if len(self.rows) > 4 else ''})"


def super_weights(
    model: TransformerLensModel,
    prompts: Prompts | Source | None = None,
    *,
    cache: CacheLike | None = None,
    mask: Bool[Tensor, "batch pos"] | None = None,
    blocks: Sequence[int] | None = None,
    min_ratio: float = MIN_RATIO,
    min_share: float = MIN_SHARE,
    min_energy: float = MIN_ENERGY,
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    progress: bool | None = None,
) -> SuperWeights:
    """Looks for single entries of FFN output matrices that make high-norm tokens' large norm.

    For an FFN with neuron activations ``h`` that adds ``o`` to the stream, the entry from neuron ``n`` to dimension ``j`` is a candidate at
    a token that enters or leaves the block with a high norm if

    - its input spikes: ``|h_n|`` is at least ``min_ratio`` times the median, over ordinary tokens, of the largest ``|h|`` of each;
    - its output spikes: ``|o_j|`` is at least ``min_ratio`` times the median, over ordinary tokens, of the largest ``|o|`` of each;
    - the spike is one of few dimensions: ``o_j²`` is at least ``min_energy`` of ``‖o‖²``;
    - the entry makes it: ``h_n · W_out[n, j]`` is at least ``min_share`` of ``o_j``.

    Ordinary tokens are those that are neither initial nor of a high norm after any block. ``o`` is what joins the stream
    (``hook_mlp_out``), biases included. A norm of the FFN's output is taken at its value at the token and an output scale is multiplied
    in, so that contributions add up to ``o``. In a mixture ``h`` is of all experts that the token is sent to, each contribution times the
    expert's weight. The definition is ours. The first two conditions are those of Yu et al. (2024, arXiv 2411.07191); the
    others tell a super weight from a neuron that writes along a direction of many dimensions, and from a dimension that many neurons write
    to. Whether a model fails without a candidate it does not ask.

    Args:
        model: A TransformerLens model.
        prompts: Strings or token ids; default: the built-in texts. With a cache: the token ids it was run on. Or a source, which several
            analyses may share.
        cache: An `ActivationCache` (or a dict) of the block-level residual hooks, ``hook_attn_out`` and ``hook_mlp_out``; the model is not
            run then.
        mask: True at real tokens of a cache, False at padding.
        blocks: Whose FFNs to look at; None for the explosion blocks of `find_defects`.
        min_ratio: How many times an ordinary token's a high norm, and a spike, is.
        min_share: Least share of the dimension's output that the entry makes; at most the eight largest of a dimension are listed.
        min_energy: Least share of the squared length of the FFN's output that the dimension holds.
        prepend_bos: Passed to the tokenisation of strings; None is the model's default.
        batch_tokens: Largest number of tokens run at once.
        progress: Whether to show a progress bar; None shows one on a terminal or in a notebook once the work takes seconds.

    Returns:
        The candidates, each once, with the number of tokens it is one at; none is a valid answer.

    Raises:
        ValueError: A block does not exist, a threshold is out of range, model or prompts are unusable, the cache lacks a hook point,
            or every prompt has one token only, so that there is nothing to compare with.

    Example:
        >>> from sd_lens.models.loading import load
        >>> super_weights(load("tiny"))
        SuperWeights(tiny: none in block 2)
        >>> super_weights(load("tiny"), min_share=0.3).rows[0].hf
        'model.layers.2.mlp.down_proj.weight[18, 205]'
    """
    require_usable(model)
    n_blocks: int = model.cfg.n_layers
    require_ratio(min_ratio)
    for name, share in (("min_share", min_share), ("min_energy", min_energy)):
        if not 0 < share <= 1:
            raise ValueError(f"{name}: got {share}; allowed: above 0, up to 1")
    otherwise = "or None for the explosion blocks"
    asked = range(n_blocks) if blocks is None else sorted(set(require_blocks(blocks, n_blocks, otherwise=otherwise)))
    if not asked:
        raise ValueError(f"blocks: got none; allowed: some of 0 to {n_blocks - 1}, {otherwise}")
    points = [
        name for block in asked for name in (hook_names.resid_pre(block), hook_names.attn_out(block), hook_names.mlp_out(block))
    ]
    source = source_of(
        model,
        prompts,
        may_need=[*hook_names.residual_points(n_blocks), *points],
        cache=cache,
        mask=mask,
        prepend_bos=prepend_bos,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    source.require(hook_names.residual_points(n_blocks))
    trace = source.trace(min_ratio=min_ratio)
    chosen = tuple(find_defects(trace, min_ratio=min_ratio).explosion_blocks if blocks is None else asked)
    high = trace.high_norm(min_ratio)
    rows: list[SuperWeight] = []
    if chosen and bool(high.any()):
        weights = weights_of(model)
        sweeps = [_Sweep(weights[block], high[block] | high[block + 1], min_share, min_energy) for block in chosen]
        _run(source, sweeps)
        ordinary = ~high.any(0) & (trace.position > 0)
        rows = [row for sweep in sweeps for row in sweep.candidates(model, trace, ordinary, min_ratio)]
    return SuperWeights(
        model_name=trace.model_name,
        blocks=chosen,
        n_tokens=int(high.any(0).sum()),
        min_ratio=min_ratio,
        min_share=min_share,
        min_energy=min_energy,
        rows=tuple(sorted(rows, key=lambda row: -abs(row.share * row.output))),
    )


def _run(source: Source, sweeps: Sequence[_Sweep]) -> None:
    """One pass over the prompts, up to the last block that is looked at."""
    reads = [(sweep, name) for sweep in sweeps for name in sweep.points]

    def hand_on(batch: Batch) -> Callable[[int, Tensor], None]:
        entering: list[Tensor] = []  # what the FFN reads is the sum of these

        def receive(number: int, activation: Tensor) -> None:
            sweep, name = reads[number]
            if name != sweep.points[-1]:
                entering.append(activation)
            else:
                sweep.add(batch, sum(entering[1:], start=entering[0]), activation)
                entering.clear()

        return receive

    stop_at = sweeps[-1].block + 1
    source.run([name for _, name in reads], hand_on, stop_at=stop_at, label="super weights")


@dataclass(frozen=True)
class _Hit:
    """An entry that makes enough of a dimension that holds enough of what is written, at one token."""

    expert: Expert
    neuron: int
    dim: int
    token: int
    weight: float
    activation: float
    output: float
    share: float
    energy: float


class _Sweep:
    """What one block's FFN shows over all prompts: two numbers a token, and the hits at high-norm tokens."""

    def __init__(self, weights: BlockWeights, high: Bool[Tensor, "token"], min_share: float, min_energy: float):
        self.block = weights.block
        self.points = [*hook_names.entering_ffn(self.block, parallel=weights.parallel), hook_names.mlp_out(self.block)]
        self._ffn, self._device = weights.ffn, weights.attention.W_O.device
        self._high, self._min_share, self._min_energy = high, min_share, min_energy
        self._largest_hidden, self._largest_output = torch.zeros(len(high)), torch.zeros(len(high))
        self._hits: list[_Hit] = []

    def add(self, batch: Batch, entering: Float[Tensor, "batch pos d_model"], written: Float[Tensor, "batch pos d_model"]) -> None:
        """Takes in what the FFN reads of the stream and what it adds to it."""
        entering, written = entering.to(self._device), written.to(self._device)  # a cache may be kept elsewhere
        mask, flat = batch.mask.to(self._device), batch.flat[batch.mask]
        entering, written = entering[mask], wide(written[mask])
        high = self._high[flat].to(self._device)
        energy = written**2 / (written**2).sum(-1, keepdim=True).clamp(min=torch.finfo(written.dtype).tiny)
        heavy = (energy >= self._min_energy) & high.unsqueeze(-1)
        factor = torch.ones_like(written)
        factor[high] = _factor(self._ffn, entering[high]).to(written.dtype)
        read = self._ffn.input(entering)
        largest = torch.zeros_like(written[:, 0])
        for expert, layer, sent, weight in _layers(self._ffn, read):
            hidden = layer.hidden(read[sent])
            largest[sent] = largest[sent].maximum(wide(torch.linalg.vector_norm(hidden, ord=float("inf"), dim=-1)))
            for dim in heavy[sent].any(0).nonzero().flatten().tolist():
                rows = heavy[sent, dim].nonzero().flatten()
                tokens, column = sent[rows], wide(layer.W_out[:, dim])
                scale = wide(weight[rows]) * factor[tokens, dim] / written[tokens, dim]
                shares, neurons = (scale.unsqueeze(-1) * wide(hidden[rows]) * column).topk(min(_NEURONS, len(column)), dim=-1)
                for row, rank in (shares >= self._min_share).nonzero().tolist():
                    token, neuron = int(tokens[row]), int(neurons[row, rank])
                    self._hits.append(
                        _Hit(
                            expert=expert,
                            neuron=neuron,
                            dim=dim,
                            token=int(flat[token]),
                            weight=float(column[neuron]),
                            activation=float(hidden[rows[row], neuron]),
                            output=float(written[token, dim]),
                            share=float(shares[row, rank]),
                            energy=float(energy[token, dim]),
                        )
                    )
        self._largest_hidden[flat] = largest.float().cpu()
        self._largest_output[flat] = written.abs().amax(-1).float().cpu()

    def candidates(
        self, model: TransformerLensModel, trace: NormTrace, ordinary: Bool[Tensor, "token"], min_ratio: float
    ) -> Iterator[SuperWeight]:
        """The hits that spike on both sides, each entry once."""
        least_hidden = min_ratio * float(self._largest_hidden[ordinary].median())
        least_output = min_ratio * float(self._largest_output[ordinary].median())
        entries: dict[tuple[Expert, int, int], list[_Hit]] = {}
        for hit in self._hits:
            if abs(hit.activation) >= least_hidden and abs(hit.output) >= least_output:
                entries.setdefault((hit.expert, hit.neuron, hit.dim), []).append(hit)
        for (expert, neuron, dim), hits in entries.items():
            best = max(hits, key=lambda hit: abs(hit.share * hit.output))
            names = entry_names(model, self.block, neuron, dim, expert=expert)
            yield SuperWeight(
                block=self.block,
                expert=expert,
                neuron=neuron,
                dim=dim,
                weight=best.weight,
                activation=best.activation,
                output=best.output,
                share=best.share,
                energy=best.energy,
                n_tokens=len(hits),
                token=trace.texts[best.token],
                prompt=int(trace.prompt[best.token]),
                pos=int(trace.position[best.token]),
                tl=names.tl,
                hf=names.hf,
            )


def _layers(
    ffn: FFNWeights | MoEWeights, read: Float[Tensor, "token d_model"]
) -> Iterator[tuple[Expert, FFNWeights, Int[Tensor, "sent"], Float[Tensor, "sent"]]]:
    """The layers that tokens are sent through: which it is, its weights, which tokens, and what its answers to them are multiplied by."""
    everyone = torch.arange(len(read), device=read.device)
    whole = torch.ones_like(read[:, 0])
    if isinstance(ffn, FFNWeights):
        yield None, ffn, everyone, whole
        return
    for expert, (weight, layer) in enumerate(zip(ffn.route(read).unbind(-1), ffn.experts, strict=True)):
        sent = weight.nonzero().flatten()
        if len(sent) > 0:
            yield expert, layer, sent, weight[sent]
    if ffn.shared is not None:
        gate = whole if ffn.W_shared_gate is None else torch.sigmoid(read @ ffn.W_shared_gate).squeeze(-1)
        yield "shared", ffn.shared, everyone, gate


def _factor(ffn: FFNWeights | MoEWeights, entering: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
    """What each dimension of the bare output is multiplied by before it joins the stream, a norm of it being held at its value."""
    factor = torch.full_like(entering, ffn.output_scale, dtype=torch.promote_types(entering.dtype, torch.float32))
    if ffn.post_norm is None:
        return factor
    bare = replace(ffn, post_norm=None, output_scale=1.0)(entering)
    return factor * ffn.post_norm.gain.to(factor.dtype) / ffn.post_norm.scale(wide(bare))
