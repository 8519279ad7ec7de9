"""Residual norms of every token after the embedding and after every block, reduced inside the hooks.

A trace holds one number per token and hook point, never a residual stream, so that a whole corpus can be traced through a model
of any width. In a second pass over a few prompts it also measures the defect direction (`sd_lens.tracing.direction`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.models import hook_names
from sd_lens.models.loading import inference, require_usable
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import Prompts, decode_each, tokenize
from sd_lens.tracing.batches import Batch, batches
from sd_lens.tracing.direction import DefectDirection, DirectionAccumulator

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MIN_RATIO = 5.0
"""A token has a high norm where it is this many times the median norm of the other tokens. Models without the phenomenon stay
below 2.5, those with it reach 15 (a million parameters) to 1000 (billions)."""


@runtime_checkable
class CacheLike(Protocol):
    """What is needed of an `ActivationCache`; a dict has it too."""

    def keys(self) -> Iterable[str]:
        """Names of the hook points kept."""
        ...

    def __getitem__(self, name: str, /) -> Tensor: ...


@dataclass(frozen=True)
class NormTrace:
    """Residual norms of the tokens of some prompts.

    Attributes:
        norms: Norm of every token; row 0 after the embedding, row ``b + 1`` after block ``b``.
        tokens: Token ids of all prompts, one after the other.
        prompt: Which prompt each token belongs to.
        position: Position of each token in its prompt.
        texts: Each token as text.
        model_name: The model.
        d_model: Its width.
        n_blocks: How many blocks the model has; a trace that was stopped early has fewer rows.
        direction: The defect direction measured along with the norms, None where there is no high-norm token or it was not
            asked for.
    """

    norms: Float[Tensor, "point token"]
    tokens: Int[Tensor, "token"]
    prompt: Int[Tensor, "token"]
    position: Int[Tensor, "token"]
    texts: tuple[str, ...]
    model_name: str
    d_model: int
    n_blocks: int
    direction: DefectDirection | None = None

    @property
    def n_prompts(self) -> int:
        """How many prompts were traced."""
        return int(self.prompt[-1]) + 1

    @cached_property
    def reference(self) -> Float[Tensor, "point"]:
        """Median norm of the tokens after the first of their prompt, at each point: what high norms are compared with.

        NaN where every prompt has one token only: then there is nothing to compare with.
        """
        others = self.norms[:, self.position > 0]
        return others.median(dim=1).values if others.shape[1] else torch.full((len(self.norms),), float("nan"))

    @property
    def ratios(self) -> Float[Tensor, "point token"]:
        """Norms relative to `reference`."""
        return self.norms / self.reference.unsqueeze(1)

    def high_norm(self, min_ratio: float = MIN_RATIO) -> Bool[Tensor, "point token"]:
        """Where a token has a high norm after a block (the embedding's row is always False)."""
        _require_ratio(min_ratio)
        high = self.ratios >= min_ratio
        high[0] = False
        return high

    def of_prompt(self, prompt: int) -> Float[Tensor, "point pos"]:
        """Norms of one prompt's tokens."""
        return self.norms[:, self._of(prompt)]

    def texts_of(self, prompt: int) -> list[str]:
        """One prompt's tokens as text."""
        return [self.texts[i] for i in self._of(prompt).nonzero().flatten().tolist()]

    def _of(self, prompt: int) -> Bool[Tensor, "token"]:
        if not 0 <= prompt < self.n_prompts:
            raise ValueError(f"prompt: got {prompt}; allowed: 0 to {self.n_prompts - 1}")
        return self.prompt == prompt

    def to_dataframe(self) -> pd.DataFrame:
        """One row per token and point: prompt, pos, token, id, block (−1 after the embedding), norm, ratio."""
        points, n_tokens = self.norms.shape
        once = {
            "prompt": self.prompt.numpy(),
            "pos": self.position.numpy(),
            "token": self.texts,
            "id": self.tokens.numpy(),
        }
        frame = pd.concat([pd.DataFrame(once)] * points, ignore_index=True)
        frame["block"] = torch.arange(-1, points - 1).repeat_interleave(n_tokens).numpy()
        frame["norm"] = self.norms.flatten().numpy()
        frame["ratio"] = self.ratios.flatten().numpy()
        return frame

    def plot(self, prompt: int = 0) -> Figure:
        """Norms over blocks, one line per token of a prompt, on a log scale."""
        from sd_lens.display.figures import norm_lines

        return norm_lines(self, prompt)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the trace as one safetensors file, its labels in the metadata."""
        tensors = {name: getattr(self, name).contiguous() for name in ("norms", "tokens", "prompt", "position")}
        labels = {
            "texts": self.texts,
            "model_name": self.model_name,
            "d_model": self.d_model,
            "n_blocks": self.n_blocks,
        }
        if self.direction is not None:
            tensors["direction"] = self.direction.direction
            labels["direction"] = {key: value for key, value in asdict(self.direction).items() if key != "direction"}
        save_file(tensors, path, metadata={"sd_lens.NormTrace": json.dumps(labels)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NormTrace:
        """Reads a trace that `save` wrote."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"path: no file {os.fspath(path)!r}; allowed: a file written by NormTrace.save")
        no_trace = f"path: {os.fspath(path)} holds no trace; allowed: a file written by NormTrace.save"
        try:
            with safe_open(path, framework="pt") as file:
                labels = json.loads((file.metadata() or {}).get("sd_lens.NormTrace", "null"))
                if labels is None:
                    raise ValueError(no_trace)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        except SafetensorError as error:
            raise ValueError(no_trace) from error
        measured = labels.pop("direction", None)
        if measured is not None:
            measured["profiles"] = {group: tuple(profile) for group, profile in measured["profiles"].items()}
            tensors["direction"] = DefectDirection(direction=tensors["direction"], **measured)
        return cls(**tensors, **(labels | {"texts": tuple(labels["texts"])}))

    @classmethod
    def from_cache(
        cls,
        cache: CacheLike,
        tokens: Int[Tensor, "batch pos"] | Int[Tensor, "pos"],
        *,
        model: TransformerLensModel | None = None,
        mask: Bool[Tensor, "batch pos"] | None = None,
        min_ratio: float = MIN_RATIO,
    ) -> NormTrace:
        """A trace of activations that exist already.

        Args:
            cache: An `ActivationCache` (or a dict) that holds ``blocks.0.hook_resid_pre`` and ``blocks.b.hook_resid_post`` for every
                block from 0 on, up to where the run was stopped.
            tokens: The token ids that it was run on.
            model: The model it came from, for its tokenizer and number of blocks; default: the cache's own.
            mask: True at real tokens, False at padding (on the right).
            min_ratio: What counts as a high norm, for the defect direction.

        Returns:
            The trace, with the direction.

        Raises:
            ValueError: Hook points are missing from the cache, shapes do not fit, or the stream is not finite.
        """
        model = getattr(cache, "model", None) if model is None else model
        n_blocks = _blocks_in(cache, model)
        streams = [cache[name] for name in hook_names.residual_points(n_blocks)]
        streams = [stream.unsqueeze(0) if stream.ndim == 2 else stream for stream in streams]
        tokens = tokens.unsqueeze(0) if tokens.ndim == 1 else tokens
        if streams[0].shape[:2] != tokens.shape:
            raise ValueError(f"tokens: got shape {tuple(tokens.shape)}; allowed: the cache's, {tuple(streams[0].shape[:2])}")
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        if mask.shape != tokens.shape:
            raise ValueError(f"mask: got shape {tuple(mask.shape)}; allowed: the tokens', {tuple(tokens.shape)}")
        tokens, mask = tokens.cpu(), mask.cpu().bool()
        if not bool(mask[:, 0].all()) or bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ValueError("mask: a row is not True at its first tokens and False after them; allowed: padding on the right")
        trace = _labelled(
            torch.stack([_norm(stream).cpu()[mask] for stream in streams]),
            [row[keep] for row, keep in zip(tokens, mask, strict=True)],
            model,
            n_blocks=getattr(getattr(model, "cfg", None), "n_layers", n_blocks),
            d_model=streams[0].shape[-1],
        )
        _require_finite(trace)
        high = torch.zeros(len(streams), *mask.shape, dtype=torch.bool)
        high[:, mask] = trace.high_norm(min_ratio)
        accumulator = DirectionAccumulator(len(streams), trace.d_model)
        for point, stream in enumerate(streams):
            accumulator.add(point, stream.detach(), high[point], high.any(0))
        return replace(trace, direction=accumulator.result())

    def __repr__(self) -> str:
        points, n_tokens = self.norms.shape
        return (
            f"NormTrace({self.model_name}: {n_tokens} tokens of {self.n_prompts} prompts, {points - 1} of {self.n_blocks} blocks)"
        )

    def _repr_html_(self) -> str:
        return self.plot()._repr_html_()


def _blocks_in(cache: CacheLike, model: Any) -> int:
    """How many blocks the cache has the stream after; all of them from the first on must be there."""
    names = set(cache.keys())
    most = getattr(getattr(model, "cfg", None), "n_layers", None)
    if most is None:
        most = 1 + max((int(name.split(".")[1]) for name in names if name.endswith("hook_resid_post")), default=0)
    there = [hook_names.resid_post(block) in names for block in range(most)]
    n_blocks = max((block + 1 for block, present in enumerate(there) if present), default=most)
    missing = [name for name in hook_names.residual_points(n_blocks) if name not in names]
    if missing:
        raise ValueError(
            f"cache: it lacks {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; allowed: a cache with these hook points, kept "
            "by run_with_cache(..., names_filter=lambda name: name == 'blocks.0.hook_resid_pre' or name.endswith('hook_resid_post'))"
        )
    return n_blocks


def _require_ratio(min_ratio: float) -> None:
    if not min_ratio > 1:
        raise ValueError(f"min_ratio: got {min_ratio}; allowed: above 1")


def _require_finite(trace: NormTrace) -> None:
    bad = (~torch.isfinite(trace.norms)).nonzero()
    if len(bad):
        point, token = bad[0].tolist()
        where = "the embedding" if point == 0 else f"block {point - 1}"
        raise ValueError(
            f"model: its residual stream is NaN or infinite after {where} (prompt {int(trace.prompt[token])}, position "
            f"{int(trace.position[token])}); allowed: finite weights, and a dtype that holds the stream (float16 ends at 65504)"
        )


def _norm(stream: Tensor) -> Tensor:
    # The squares of norms that fp16 holds do not fit into fp16.
    return torch.linalg.vector_norm(stream, dim=-1, dtype=torch.promote_types(stream.dtype, torch.float32)).float()


def _labelled(norms: Tensor, sequences: Sequence[Tensor], model: Any, *, n_blocks: int, d_model: int) -> NormTrace:
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    tokens = torch.cat(list(sequences))
    return NormTrace(
        norms=norms,
        tokens=tokens,
        prompt=torch.arange(len(sequences)).repeat_interleave(lengths),
        position=torch.cat([torch.arange(int(length)) for length in lengths]),
        texts=tuple(decode_each(model, tokens.tolist())),
        model_name=str(getattr(getattr(model, "cfg", None), "model_name", "model")),
        d_model=d_model,
        n_blocks=n_blocks,
    )


def run_batches(
    model: TransformerLensModel,
    work: Sequence[Batch],
    points: Sequence[str],
    on_batch: Callable[[Batch], Callable[[int, Tensor], None]],
    *,
    stop_at: int | None = None,
    progress: bool | None = None,
    label: str = "tracing",
) -> None:
    """Runs batches through a model and hands the activation at every hook point to a callback; nothing is kept.

    Args:
        model: The model; its hooks and mode are as before afterwards, also after an error.
        work: The batches.
        points: Hook points.
        on_batch: Gives, for each batch, the function that is called with the number of a hook point and its activation.
        stop_at: Run this many blocks only.
        progress: Whether to show a progress bar; None shows one on a terminal or in a notebook once the work takes seconds.
        label: The progress bar's.
    """
    hidden = None if progress is None else not progress
    with inference(model), tqdm(work, desc=label, unit="batch", delay=2.0, disable=hidden, leave=False) as bar:
        for batch in bar:
            receive = on_batch(batch)
            hooks = [(name, _hand_over(receive, point)) for point, name in enumerate(points)]
            options = {} if stop_at is None else {"stop_at_layer": stop_at}
            model.run_with_hooks(batch.tokens.to(model.cfg.device), fwd_hooks=hooks, return_type=None, **options)


def _hand_over(receive: Callable[[int, Tensor], None], point: int) -> Callable[..., None]:
    def hook(stream: Tensor, hook: Any) -> None:
        receive(point, stream)

    return hook


def trace_norms(
    model: TransformerLensModel,
    prompts: Prompts,
    *,
    prepend_bos: bool | None = None,
    stop_at: int | None = None,
    batch_tokens: int = 4096,
    min_ratio: float = MIN_RATIO,
    direction_prompts: int = 32,
    progress: bool | None = None,
) -> NormTrace:
    """Norm of every token's residual stream after the embedding and after every block.

    Args:
        model: A TransformerLens model.
        prompts: Any number of prompts: strings or token ids.
        prepend_bos: Passed to the tokenisation of strings; None is the model's default.
        stop_at: Trace the first blocks only; the others are not run.
        batch_tokens: Largest number of tokens run at once, padding included.
        min_ratio: What counts as a high norm, for the defect direction.
        direction_prompts: The first so many prompts with a high-norm token are run once more to measure the defect direction; 0 to
            leave it out.
        progress: Whether to show a progress bar; None shows one on a terminal or in a notebook once the work takes seconds.

    Returns:
        The trace.

    Raises:
        ValueError: A prompt is empty, too long or outside of the vocabulary; ``stop_at`` is not between 1 and the number of blocks;
            the model is unusable (see `sd_lens.load`), or its stream is not finite.

    Example:
        >>> from sd_lens.models.planted import planted
        >>> trace = trace_norms(planted().model, torch.arange(10).unsqueeze(0))
        >>> bool(trace.ratios[2, 0] > 1000)
        True
    """
    require_usable(model)
    n_blocks: int = model.cfg.n_layers
    if stop_at is not None and not 1 <= stop_at <= n_blocks:
        raise ValueError(f"stop_at: got {stop_at}; allowed: 1 to {n_blocks}, the model's blocks")
    if direction_prompts < 0:
        raise ValueError(f"direction_prompts: got {direction_prompts}; allowed: 0 or more")
    _require_ratio(min_ratio)
    sequences = tokenize(model, prompts, prepend_bos=prepend_bos)
    points = hook_names.residual_points(stop_at or n_blocks)
    norms = torch.empty(len(points), sum(len(sequence) for sequence in sequences))

    def reduce(batch: Batch) -> Callable[[int, Tensor], None]:
        flat = batch.flat[batch.mask]
        kept: list[Tensor] = []

        def receive(point: int, stream: Tensor) -> None:
            kept.append(_norm(stream))
            if point == len(points) - 1:  # an accelerator is waited for once a batch, not at every block
                for row, norm in enumerate(kept):
                    norms[row, flat] = norm.cpu()[batch.mask]

        return receive

    # A model that runs all its blocks stops by itself; asked to stop after the last, HookedTransformer would skip the final norm only.
    stop = stop_at if stop_at != n_blocks else None
    run_batches(model, batches(sequences, batch_tokens=batch_tokens), points, reduce, stop_at=stop, progress=progress)
    trace = _labelled(norms, sequences, model, n_blocks=n_blocks, d_model=model.cfg.d_model)
    _require_finite(trace)
    if direction_prompts == 0:
        return trace
    measured = measure_direction(
        model, trace, min_ratio=min_ratio, n_prompts=direction_prompts, batch_tokens=batch_tokens, progress=progress
    )
    return replace(trace, direction=measured)


def measure_direction(
    model: TransformerLensModel,
    trace: NormTrace,
    *,
    min_ratio: float = MIN_RATIO,
    n_prompts: int | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
    progress: bool | None = None,
) -> DefectDirection | None:
    """The defect direction of a trace's prompts, by running those with a high-norm token once more.

    Args:
        model: The model that was traced.
        trace: Its trace.
        min_ratio: What counts as a high norm.
        n_prompts: Use the first so many prompts that have a high-norm token; None for all.
        batch_tokens: Largest number of tokens run at once.
        seed: Seeds the sample that the mean pairwise angle is measured on.
        progress: Whether to show a progress bar.

    Returns:
        The direction; None where no token has a high norm.
    """
    high = trace.high_norm(min_ratio)
    anywhere = high.any(0)
    with_any = torch.unique(trace.prompt[anywhere])[:n_prompts]
    if len(with_any) == 0:
        return None
    chosen = torch.isin(trace.prompt, with_any)
    sequences = [trace.tokens[trace.prompt == prompt] for prompt in with_any]
    index = chosen.nonzero().flatten()  # from tokens of the chosen prompts to tokens of the trace
    n_points = len(trace.norms)
    accumulator = DirectionAccumulator(n_points, trace.d_model, seed=seed)

    def accumulate(batch: Batch) -> Callable[[int, Tensor], None]:
        where = index[batch.flat]

        def receive(point: int, stream: Tensor) -> None:
            accumulator.add(point, stream, high[point, where] & batch.mask, anywhere[where] & batch.mask)

        return receive

    stop = n_points - 1 if n_points - 1 < trace.n_blocks else None
    points = hook_names.residual_points(n_points - 1)
    work = batches(sequences, batch_tokens=batch_tokens)
    run_batches(model, work, points, accumulate, stop_at=stop, progress=progress, label="direction")
    return accumulator.result()
