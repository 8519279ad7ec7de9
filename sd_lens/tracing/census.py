"""Which single entries of the residual stream are massive.

A high norm sits in a few dimensions. Sun et al. (2024, *Massive Activations in Large Language Models*, arXiv 2402.17762) count those: an
activation is massive if its magnitude is above 100 and above 1000 times the median magnitude of its hidden state. Hidden states
are the residual stream of one prompt after one block, all of its tokens and dimensions together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sd_lens.models import hook_names
from sd_lens.models.batches import Batch
from sd_lens.models.loading import require_usable
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import Prompts, decode_each
from sd_lens.tracing.source import Source, source_of
from sd_lens.tracing.trace import CacheLike, not_finite

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MIN_VALUE = 100.0
"""Least magnitude of a massive activation."""
MIN_TIMES = 1000.0
"""Least magnitude of a massive activation, as a multiple of the median magnitude of its hidden state."""


@dataclass(frozen=True)
class MassiveActivation:
    """One massive entry of the residual stream.

    Attributes:
        block: The block after which it stands.
        prompt: Which prompt it is in.
        pos: Position of its token there.
        token: The token as text.
        id: The token's id.
        dim: The dimension of the residual stream.
        value: The entry, with its sign.
        times_median: Its magnitude relative to the median magnitude of all entries of this prompt after this block.
    """

    block: int
    prompt: int
    pos: int
    token: str
    id: int
    dim: int
    value: float
    times_median: float


@dataclass(frozen=True)
class MassiveActivations:
    """The massive activations of some prompts; possibly that there are none.

    Attributes:
        model_name: The model.
        n_blocks: How many blocks it has.
        d_model: Its width.
        n_tokens: How many tokens were looked at.
        min_value: The magnitude that an entry has to exceed.
        min_times: The multiple of the median magnitude that it has to exceed as well.
        n_found: How many entries exceed both.
        rows: These entries, ordered by block, prompt, position and dimension; of more than ``max_rows`` the largest.
    """

    model_name: str
    n_blocks: int
    d_model: int
    n_tokens: int
    min_value: float
    min_times: float
    n_found: int
    rows: tuple[MassiveActivation, ...]

    @property
    def found(self) -> bool:
        """Whether there is any massive activation."""
        return self.n_found > 0

    @property
    def criteria(self) -> str:
        """What was counted, for headings."""
        return f"|x| > {self.min_value:g} and > {self.min_times:g} × median |x|"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per massive activation."""
        return pd.DataFrame([vars(row) for row in self.rows], columns=list(MassiveActivation.__dataclass_fields__))

    def dimensions(self) -> pd.DataFrame:
        """One row per dimension that any activation is massive in, the largest first.

        Returns:
            Columns ``dim``, ``first_block`` and ``last_block`` after which one is massive, ``count`` (of activations), ``value`` (the
            largest, with its sign).
        """
        by_size = self.to_dataframe().sort_values("value", key=abs, ascending=False, kind="stable")
        blocks = by_size.groupby("dim", sort=False)["block"]
        values = by_size.groupby("dim", sort=False)["value"]
        columns = {"first_block": blocks.min(), "last_block": blocks.max(), "count": values.size(), "value": values.first()}
        return pd.DataFrame(columns).rename_axis("dim").reset_index()

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` largest in magnitude, the largest first."""
        if k < 1:
            raise ValueError(f"k: got {k}; allowed: at least 1")
        return self.to_dataframe().sort_values("value", key=abs, ascending=False, kind="stable").head(k).reset_index(drop=True)

    def plot(self) -> Figure:
        """Magnitude of each dimension's largest activation over the blocks."""
        from sd_lens.display.figures import massive_activations_figure

        return massive_activations_figure(self)

    def __repr__(self) -> str:
        if not self.found:
            return f"MassiveActivations({self.model_name}: none in {self.n_tokens} tokens)"
        dims = self.dimensions()["dim"].tolist()
        shown = f"{', '.join(map(str, dims[:5]))}{' ...' if len(dims) > 5 else ''}"
        largest = max(self.rows, key=lambda row: abs(row.value))
        return f"MassiveActivations({self.model_name}: {self.n_found} in dimensions {shown}, largest {largest.value:.4g})"


def massive_activations(
    model: TransformerLensModel,
    prompts: Prompts | Source | None = None,
    *,
    cache: CacheLike | None = None,
    mask: Bool[Tensor, "batch pos"] | None = None,
    min_value: float = MIN_VALUE,
    min_times: float = MIN_TIMES,
    max_rows: int = 10_000,
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    progress: bool | None = None,
) -> MassiveActivations:
    """Takes the census of massive activations: entries of the residual stream after each block with a huge magnitude.

    The criterion is that of Sun et al. (2024, arXiv 2402.17762, section 2). Its first half is an absolute number and
    made for models of billions of parameters; of a small model's activations it may find none though some stand out as much.

    Args:
        model: A TransformerLens model.
        prompts: Strings or token ids; default: the built-in texts. With a cache: the token ids it was run on. Or a source, which several
            analyses may share.
        cache: An `ActivationCache` (or a dict) with the stream entering block 0 and leaving every block; the model is not run then.
        mask: True at real tokens of a cache, False at padding.
        min_value: Magnitude that an entry has to exceed.
        min_times: Multiple of the median magnitude that it has to exceed as well. The median is that of all entries of its prompt
            after the same block (the lower of the two in the middle).
        max_rows: Keep the so many largest entries; how many there are is counted all the same.
        prepend_bos: Passed to the tokenisation of strings; None is the model's default.
        batch_tokens: Largest number of tokens run at once.
        progress: Whether to show a progress bar; None shows one on a terminal or in a notebook once the work takes seconds.

    Returns:
        The entries, as a table; none is a valid answer, see `MassiveActivations.found`.

    Raises:
        ValueError: A threshold is negative, model or prompts are unusable, the cache lacks a hook point, or the stream is not finite.

    Example:
        >>> from sd_lens.models.planted import planted
        >>> census = massive_activations(planted().model, torch.arange(10).unsqueeze(0))
        >>> sorted({(row.block, row.pos) for row in census.rows})
        [(1, 0), (2, 0), (3, 0)]
    """
    require_usable(model)
    for name, least in (("min_value", min_value), ("min_times", min_times)):
        if not least >= 0:
            raise ValueError(f"{name}: got {least}; allowed: 0 or more")
    if max_rows < 1:
        raise ValueError(f"max_rows: got {max_rows}; allowed: at least 1")
    n_blocks: int = model.cfg.n_layers
    points = [hook_names.resid_post(block) for block in range(n_blocks)]
    source = source_of(
        model,
        prompts,
        may_need=points,
        cache=cache,
        mask=mask,
        prepend_bos=prepend_bos,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    source.require(points)
    kept = _Kept(max_rows)

    def collect(batch: Batch) -> Callable[[int, Tensor], None]:
        def receive(block: int, stream: Tensor) -> None:
            mask = batch.mask.to(stream.device)
            for row in _prompts_above(stream, mask, min_value, block):
                kept.add(block, batch.flat[row], *_massive(stream[row, mask[row]], min_value, min_times, max_rows))

        return receive

    source.run(points, collect, label="census")
    return MassiveActivations(
        model_name=str(getattr(model.cfg, "model_name", "model")),
        n_blocks=n_blocks,
        d_model=int(model.cfg.d_model),
        n_tokens=sum(len(sequence) for sequence in source.sequences),
        min_value=min_value,
        min_times=min_times,
        n_found=kept.n_found,
        rows=_labelled(kept.table, source),
    )


def _prompts_above(
    stream: Float[Tensor, "batch pos d_model"], mask: Bool[Tensor, "batch pos"], min_value: float, block: int
) -> list[int]:
    """The prompts of a batch with an entry above a magnitude: a median, which is a sort, is taken of no others."""
    # Largest magnitudes are exact in any precision, and padding does not count.
    peaks = torch.linalg.vector_norm(stream, ord=float("inf"), dim=-1).masked_fill(~mask, 0.0)
    if not bool(torch.isfinite(peaks).all()):
        raise not_finite(f"block {block}")
    peaks = peaks.to(torch.promote_types(peaks.dtype, torch.float32))  # bfloat16 would round what they are compared with
    return (peaks.amax(dim=1) > min_value).nonzero().flatten().tolist()


def _massive(
    hidden: Float[Tensor, "pos d_model"], min_value: float, min_times: float, limit: int
) -> tuple[int, Int[Tensor, "kept"], Int[Tensor, "kept"], Float[Tensor, "kept"], Float[Tensor, "kept"]]:
    """How many entries of one prompt's hidden state are massive; position, dimension, value and times the median of the largest."""
    values = hidden.to(torch.promote_types(hidden.dtype, torch.float32)).flatten()
    magnitudes = values.abs()
    median = magnitudes.median()
    massive = (magnitudes > min_value) & (magnitudes > min_times * median)
    n_found = int(massive.sum())
    index = magnitudes.masked_fill(~massive, -1.0).topk(limit).indices if n_found > limit else massive.nonzero().flatten()
    pos, dim = index // hidden.shape[1], index % hidden.shape[1]
    return n_found, pos.cpu(), dim.cpu(), values[index].cpu(), (magnitudes[index] / median).cpu()


class _Kept:
    """The largest entries so far, one a row: block, token, dimension, value, times the median."""

    def __init__(self, limit: int):
        self.table = torch.empty(0, 5, dtype=torch.float64)
        self.n_found = 0
        self._limit = limit

    def add(self, block: int, flat: Tensor, n_found: int, pos: Tensor, dim: Tensor, values: Tensor, times: Tensor) -> None:
        """Adds entries of one prompt, whose tokens have the numbers ``flat``."""
        self.n_found += n_found
        columns = (torch.full_like(values, block), flat[pos], dim, values, times)
        self.table = torch.cat([self.table, torch.stack([column.double() for column in columns], dim=1)])
        if len(self.table) > self._limit:
            self.table = self.table[self.table[:, 3].abs().topk(self._limit).indices]


def _labelled(table: Float[Tensor, "kept 5"], source: Source) -> tuple[MassiveActivation, ...]:
    """Rows in the order of block, token and dimension, with what the token is."""
    lengths = torch.tensor([len(sequence) for sequence in source.sequences])
    prompt = torch.arange(len(lengths)).repeat_interleave(lengths)
    start = lengths.cumsum(0) - lengths
    entries = sorted((int(block), int(token), int(dim), value, times) for block, token, dim, value, times in table.tolist())
    ids = torch.cat(source.sequences)[[token for _, token, *_ in entries]].tolist()
    rows = []
    for (block, token, dim, value, times), text, number in zip(entries, decode_each(source.model, ids), ids, strict=True):
        of = int(prompt[token])
        rows.append(MassiveActivation(block, of, token - int(start[of]), text, number, dim, value, times))
    return tuple(rows)
