"""What a high-norm token's norm, and what set it off, are made of: both split exactly over what wrote them.

`attribute_norm` splits the projection of the residual stream on the defect direction; `attribute_trigger` the coefficient of an
FFN's input on the leading right singular vector of its linear map, with the norm's scale held at its value for each token, as
direct logit attribution does. Both are products of the stream with a vector, so both are sums over the embeddings, heads, biases
and FFNs that wrote the stream (`sd_lens.tracing.components`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sd_lens.linear.trigger import trigger_direction
from sd_lens.models import hook_names
from sd_lens.models.batches import Batch
from sd_lens.models.loading import weights_of
from sd_lens.models.positions import adds_positions
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.splits import wide
from sd_lens.models.tokens import Prompts
from sd_lens.tracing.arguments import require_block, require_blocks
from sd_lens.tracing.components import Parts, StreamSplit
from sd_lens.tracing.defects import Defects, find_defects
from sd_lens.tracing.groups import GROUPS, group_of
from sd_lens.tracing.shares import Attribution, Inside, Row
from sd_lens.tracing.source import Source, source_of
from sd_lens.tracing.trace import MIN_RATIO, CacheLike, NormTrace

Rows = Literal["groups", "tokens"]


def attribute_norm(
    model: TransformerLensModel,
    prompts: Prompts | Source | None = None,
    *,
    block: int | Literal["explosion", "peak"] = "explosion",
    direction: Float[Tensor, "d_model"] | None = None,
    rows: Rows = "groups",
    neurons: bool | Sequence[int] = False,
    by_key: bool = False,
    cache: CacheLike | None = None,
    mask: Bool[Tensor, "batch pos"] | None = None,
    min_ratio: float = MIN_RATIO,
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    progress: bool | None = None,
) -> Attribution:
    """Splits the projection of the residual stream on the defect direction over everything that wrote it.

    The parts are those of the token embedding, of the positional embedding where there is one, of every head and of every
    attention bias and FFN up to the block. They add up to the projection but for rounding, which the result carries.

    Args:
        model: A TransformerLens model.
        prompts: Strings or token ids; default: built-in texts. With ``cache``, the token ids it was run on. Or a `Source`, which several
            analyses may share.
        block: The block after which the stream is split; default: the explosion block, the last where there are several;
            ``"peak"``: the first after which the projection on the measured direction is within 1 % of its largest, so that all blocks up
            to the peak are parts.
        direction: The direction; default: the defect direction measured on the prompts. It is scaled to length 1.
        rows: ``"groups"``: means over initial tokens, delimiters (later tokens with a high norm) and others, of which only sums are
            kept. ``"tokens"``: every token by itself, which takes one number per token and component.
        neurons: Whether to split the FFNs of the explosion blocks further, over neurons, or over experts where the FFN is a mixture;
            or the blocks to do this for.
        by_key: Whether to split every head's part by what it was taken from: the token itself, or the others.
        cache: An `ActivationCache` to read instead of running the model.
        mask: True at real tokens of a cache, False at padding; default: as in `trace_norms`.
        min_ratio: Least norm of a high-norm token, as a multiple of the other tokens' median.
        prepend_bos: Passed to the tokenisation of strings; None is the model's default.
        batch_tokens: Largest number of tokens run at once.
        progress: Whether to show progress bars.

    Returns:
        The parts, largest first in `Attribution.top`.

    Raises:
        ValueError: Nothing explodes and no direction and block are given; a block does not exist or its weights cannot be read; the
            cache lacks hook points; the model or the prompts are unusable.

    Example:
        >>> from sd_lens.models.planted import planted
        >>> attribute_norm(planted().model, torch.arange(10).unsqueeze(0)).top(1)["name"].item()
        'L1 FFN'
    """
    options = _Options(rows, neurons, by_key, min_ratio)
    options.require(model, block, ("explosion", "peak"), direction)
    source = _source(model, prompts, cache, mask, by_key, prepend_bos=prepend_bos, batch_tokens=batch_tokens, progress=progress)
    trace = source.trace(min_ratio=min_ratio)
    defects = find_defects(trace, min_ratio=min_ratio)
    if direction is None:
        if trace.direction is None:
            raise _nothing(trace, min_ratio, "direction= and block=")
        direction = trace.direction.direction
    if isinstance(block, str):
        if not (defects.explosion_blocks if block == "explosion" else defects.tokens):
            raise _nothing(trace, min_ratio, "block=")
        block = defects.explosion_blocks[-1] if block == "explosion" else _peak_block(defects)
    unit = (direction.double() / torch.linalg.vector_norm(direction.double())).cpu()
    inside = options.blocks(default=[b for b in defects.explosion_blocks if b <= block])
    split = StreamSplit(source, unit, block, inside=inside, by_key=by_key)
    return _attribution(split, trace, "norm", unit, options)


def attribute_trigger(
    model: TransformerLensModel,
    prompts: Prompts | Source | None = None,
    *,
    block: int | Literal["explosion"] = "explosion",
    direction: Float[Tensor, "d_model"] | None = None,
    rows: Rows = "groups",
    neurons: bool | Sequence[int] = False,
    by_key: bool = False,
    cache: CacheLike | None = None,
    mask: Bool[Tensor, "batch pos"] | None = None,
    min_ratio: float = MIN_RATIO,
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    progress: bool | None = None,
) -> Attribution:
    """Splits what sets an explosion off over everything that wrote it.

    What is split is the coefficient ``⟨x, v0⟩`` of the normalised stream ``x`` that a block's FFN reads (before the norm's gain) on
    the leading right singular vector ``v0`` of the FFN's linear map (Wang et al., arXiv 2502.07004, section 4.2). The norm's scale
    is held at its value for each token, so that the parts add up.

    Args:
        model: A TransformerLens model.
        prompts: Strings or token ids; default: built-in texts. With ``cache``, the token ids it was run on. Or a `Source`, which several
            analyses may share.
        block: The block; default: the explosion block, where there are several the one that adds most.
        direction: What to take in place of ``v0``, in the normalised stream before the gain. It is scaled to length 1.
        rows: ``"groups"`` or ``"tokens"``, see `attribute_norm`.
        neurons: Whether to split the FFNs of earlier blocks further, over neurons or experts; or the blocks to do this for.
        by_key: Whether to split every head's part by what it was taken from: the token itself, or the others.
        cache: An `ActivationCache` to read instead of running the model.
        mask: True at real tokens of a cache, False at padding; default: as in `trace_norms`.
        min_ratio: Least norm of a high-norm token, as a multiple of the other tokens' median.
        prepend_bos: Passed to the tokenisation of strings; None is the model's default.
        batch_tokens: Largest number of tokens run at once.
        progress: Whether to show progress bars.

    Returns:
        The parts, largest first in `Attribution.top`.

    Raises:
        ValueError: Nothing explodes and no block is given; a block does not exist or cannot be linearised; the cache lacks hook points;
            the model or the prompts are unusable.

    Example:
        >>> from sd_lens.models.planted import planted
        >>> truth = planted("gpt2", pathway="embedding")
        >>> tokens = torch.tensor([[3, 14, 15, truth.trigger_token, 9, 2]])
        >>> attribute_trigger(truth.model, tokens).top(1, row="delimiter")["name"].item()
        'embedding'
    """
    options = _Options(rows, neurons, by_key, min_ratio)
    options.require(model, block, ("explosion",), direction)
    source = _source(model, prompts, cache, mask, by_key, prepend_bos=prepend_bos, batch_tokens=batch_tokens, progress=progress)
    trace = source.trace(min_ratio=min_ratio)
    if isinstance(block, str):
        main = find_defects(trace, min_ratio=min_ratio).main_block
        if main is None:
            raise _nothing(trace, min_ratio, "block=")
        block = main
    weights = weights_of(model)[block]
    if direction is None:
        direction = trigger_direction(weights).vector
    unit = (direction.double() / torch.linalg.vector_norm(direction.double())).cpu()
    norm = weights.ffn.norm
    split = StreamSplit(
        source,
        unit if norm is None else norm.center(unit),
        block,
        ffn_input=True,
        divide=None if norm is None else lambda stream: norm.scale(wide(stream)),
        inside=options.blocks(default=range(block)),
        by_key=by_key,
    )
    return _attribution(split, trace, "trigger", unit, options)


@dataclass(frozen=True)
class _Options:
    rows: str
    neurons: bool | Sequence[int]
    by_key: bool
    min_ratio: float

    def require(self, model: Any, block: int | str, names: tuple[str, ...], direction: Tensor | None) -> None:
        if self.rows not in ("groups", "tokens"):
            raise ValueError(f"rows: got {self.rows!r}; allowed: 'groups', 'tokens'")
        cfg = getattr(model, "cfg", None)
        if cfg is None:
            return  # no model at all, which the source says
        n_blocks, width = int(cfg.n_layers), int(cfg.d_model)
        require_block(block, n_blocks, names=names)
        if not isinstance(self.neurons, bool):
            require_blocks(self.neurons, n_blocks, otherwise="True or False", argument="neurons")
        if direction is not None and not isinstance(direction, Tensor):
            raise ValueError(f"direction: got {type(direction).__name__}; allowed: a tensor of {width} numbers")
        if direction is not None:
            norm = float(torch.linalg.vector_norm(direction.double()))
            if direction.shape != (width,) or not 0 < norm < float("inf"):
                raise ValueError(
                    f"direction: got shape {tuple(direction.shape)} and norm {norm:g}; allowed: {width} finite numbers, not all zero"
                )

    def blocks(self, *, default: Sequence[int]) -> Sequence[int]:
        if isinstance(self.neurons, bool):
            return default if self.neurons else ()
        return self.neurons


def _source(model: TransformerLensModel, prompts: Any, cache: Any, mask: Any, by_key: bool, **options: Any) -> Source:
    """The source of activations; of a cache, all that may be needed of any block is known beforehand."""
    names: list[str] = []
    if cache is not None and hasattr(model, "hook_dict"):
        kinds = [hook_names.resid_pre, hook_names.mixed_values, hook_names.attn_out, hook_names.mlp_out, hook_names.resid_post]
        kinds += [hook_names.value, hook_names.pattern] * by_key
        names = [hook_names.pos_embed()] * adds_positions(model) + [kind(b) for kind in kinds for b in range(model.cfg.n_layers)]
    return source_of(model, prompts, may_need=names, cache=cache, mask=mask, **options)


def _nothing(trace: NormTrace, min_ratio: float, otherwise: str) -> ValueError:
    largest = float(trace.ratios[1:].nan_to_num(nan=0.0).max())
    return ValueError(
        f"prompts: no block makes a token's norm explode (largest ratio to the other tokens' median {largest:.1f}, threshold {min_ratio:g}); allowed: a "
        f"model and prompts with high-norm tokens, or {otherwise}"
    )


def _peak_block(defects: Defects) -> int:
    """The first block after which some group's profile is within a hundredth of its largest: on a plateau the last digits decide nothing."""
    profiles = torch.tensor(list(defects.profiles.values()), dtype=torch.float64)[:, 1:].abs()
    near = (profiles >= 0.99 * profiles.max()).any(0)
    return int(near.long().argmax())


def _attribution(split: StreamSplit, trace: NormTrace, quantity: str, unit: Tensor, options: _Options) -> Attribution:
    """Runs a split and adds it up."""
    group = group_of(trace, options.min_ratio)
    by_token = options.rows == "tokens"
    sizes = torch.bincount(group, minlength=len(GROUPS))
    n_rows = len(group) if by_token else len(GROUPS)
    row_of = torch.arange(len(group)) if by_token else group
    sums = _Sums(n_rows, by_token)

    def add(batch: Batch, parts: Parts) -> None:
        rows = row_of[batch.flat[batch.mask]]
        sums.add("values", rows, parts.values)
        sums.add("total", rows, parts.whole.unsqueeze(1))
        for block in split.inner:  # one block's neurons at a time
            sums.add(block, rows, parts.inside(block))

    split.run(add)
    if not sums.seen:
        raise ValueError(f"model: a run does not reach all of {', '.join(split.points[:5])}, ...; allowed: a model that does")
    if by_token:
        kept = torch.arange(n_rows)
        places = zip(trace.texts, group.tolist(), trace.prompt.tolist(), trace.position.tolist(), strict=True)
        rows = [Row(text, GROUPS[number], 1, prompt, pos) for text, number, prompt, pos in places]
    else:
        kept = sizes.nonzero().flatten()
        rows = [Row(GROUPS[number], GROUPS[number], int(sizes[number])) for number in kept.tolist()]
    counts = torch.tensor([[row.n_tokens] for row in rows])
    values = sums.of("values")[kept] / counts
    inside = {}
    for block in split.inner:
        ffn = next(i for i, component in enumerate(split.components) if (component.kind, component.block) == ("ffn", block))
        inside[block] = Inside(block, split.inner_components(block), sums.of(block)[kept] / counts, values[:, ffn])
    return Attribution(
        model_name=trace.model_name,
        quantity=quantity,
        block=split.block,
        components=split.components,
        rows=tuple(rows),
        values=values,
        total=(sums.of("total")[kept] / counts).squeeze(1),
        inside=inside,
        vector=unit.float(),
        min_ratio=options.min_ratio,
    )


class _Sums:
    """Sums of parts by row: of many tokens in float64, of single ones as they are."""

    def __init__(self, n_rows: int, by_token: bool):
        self._n_rows, self._by_token = n_rows, by_token
        self._sums: dict[str | int, Tensor] = {}

    def add(self, name: str | int, rows: Tensor, values: Tensor) -> None:
        if name not in self._sums:
            dtype = values.dtype if self._by_token else torch.float64
            self._sums[name] = torch.zeros(self._n_rows, values.shape[1], dtype=dtype)
        if self._by_token:
            self._sums[name][rows] = values
            return
        for row in rows.unique().tolist():
            self._sums[name][row] += values[rows == row].sum(0, dtype=torch.float64)

    @property
    def seen(self) -> bool:
        return bool(self._sums)

    def of(self, name: str | int) -> Tensor:
        return self._sums[name]
