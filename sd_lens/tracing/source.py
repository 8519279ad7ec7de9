"""Where an analysis has its activations from: prompts that are run, or an `ActivationCache` that the caller already has.

Analyses ask a `Source` for hook points and get one activation at a time; whether a model runs for it is not their business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sd_lens.models import hook_names
from sd_lens.models.batches import Batch, batches
from sd_lens.models.loading import require_usable
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.running import run_batches
from sd_lens.models.tokens import Prompts, tokenize
from sd_lens.tracing.norms import trace_norms
from sd_lens.tracing.prompts import default_prompts
from sd_lens.tracing.trace import MIN_RATIO, CacheLike, NormTrace, cached_tokens

OnBatch = Callable[[Batch], Callable[[int, Tensor], None]]
"""Gives, for each batch, the function that is called with the number of a hook point and its activation."""


class Source(ABC):
    """Activations at hook points, for some prompts. Analyses that share one trace the prompts once.

    Attributes:
        model: The model they are of.
        sequences: Token ids of the prompts, without padding, on the CPU.
    """

    model: TransformerLensModel
    sequences: list[Int[Tensor, "_"]]

    def trace(self, *, min_ratio: float = MIN_RATIO) -> NormTrace:
        """Norms of all tokens and the defect direction; its tokens are those of `sequences`, one after the other."""
        if self._traced is None or self._traced[0] != min_ratio:
            self._traced = min_ratio, self._trace(min_ratio)
        return self._traced[1]

    _traced: tuple[float, NormTrace] | None = None

    @abstractmethod
    def _trace(self, min_ratio: float) -> NormTrace: ...

    @abstractmethod
    def run(self, points: Sequence[str], on_batch: OnBatch, *, stop_at: int | None = None, label: str = "tracing") -> None:
        """Hands the activations at hook points over, batch by batch, in the order in which a forward pass has them.

        Args:
            points: Hook points, in that order.
            on_batch: Called for each batch; what it gives is called with the number of each point and the activation there.
            stop_at: No later block than the first so many is needed.
            label: Of a progress bar.

        Raises:
            ValueError: The activations are not to be had.
        """

    @abstractmethod
    def require(self, points: Sequence[str]) -> None:
        """Raises `ValueError` unless the activations at these hook points are to be had: to be called before any work."""


class PromptSource(Source):
    """Prompts that are run through the model, in batches, whenever something is asked for."""

    def __init__(self, model: TransformerLensModel, sequences: list[Int[Tensor, "_"]], *, batch_tokens: int, progress: bool | None):
        self.model, self.sequences = model, sequences
        self._work = batches(sequences, batch_tokens=batch_tokens)
        self._batch_tokens, self._progress = batch_tokens, progress

    def run(self, points: Sequence[str], on_batch: OnBatch, *, stop_at: int | None = None, label: str = "tracing") -> None:
        """Runs the model once over all prompts."""
        run_batches(self.model, self._work, points, on_batch, stop_at=stop_at, progress=self._progress, label=label)

    def _trace(self, min_ratio: float) -> NormTrace:
        return trace_norms(
            self.model, self.sequences, min_ratio=min_ratio, batch_tokens=self._batch_tokens, progress=self._progress
        )

    def require(self, points: Sequence[str]) -> None:
        """Raises `ValueError` where the model has no such hook points."""
        missing = [name for name in points if name not in self.model.hook_dict]  # pyright: ignore[reportAttributeAccessIssue]
        if missing:
            raise ValueError(f"model: it has no hook point {', '.join(missing[:5])}; allowed: a model with these")


class CacheSource(Source):
    """What a cache holds, as one batch. It must have the stream entering block 0, which tells the shape of the rest.

    Args:
        model: The model that the cache is of.
        cache: The cache.
        tokens: The token ids that it was run on.
        mask: True at real tokens, False at padding; None for what `trace_norms` takes for padding.
        may_need: All hook points that the analysis may ask for, which a complaint names a filter for.
    """

    def __init__(self, model: TransformerLensModel, cache: CacheLike, tokens: Tensor, mask: Tensor | None, may_need: Sequence[str]):
        self.model, self._cache = model, cache
        self._may_need = [hook_names.resid_pre(0), *may_need]
        self.require(self._may_need[:1])
        stream = cache[hook_names.resid_pre(0)]
        # Without its batch dimension (remove_batch_dim), a cache of one prompt lacks the first axis everywhere.
        self._bare = stream.ndim == 2
        shape = stream.shape[:1] if self._bare else stream.shape[:2]
        self._tokens, self._mask = cached_tokens(shape, tokens, model=model, mask=mask)
        self.sequences = [row[keep] for row, keep in zip(self._tokens, self._mask, strict=True)]

    def run(self, points: Sequence[str], on_batch: OnBatch, *, stop_at: int | None = None, label: str = "tracing") -> None:
        """Hands over what the cache holds."""
        self.require(points)
        flat = torch.zeros_like(self._tokens)
        flat[self._mask] = torch.arange(int(self._mask.sum()))
        receive = on_batch(Batch(self._tokens, self._mask, flat))
        with torch.no_grad():
            for number, name in enumerate(points):
                activation = self._cache[name].detach()
                receive(number, activation.unsqueeze(0) if self._bare else activation)

    def _trace(self, min_ratio: float) -> NormTrace:
        self.require([hook_names.resid_post(0)])
        return NormTrace.from_cache(self._cache, self._tokens, model=self.model, mask=self._mask, min_ratio=min_ratio)

    def require(self, points: Sequence[str]) -> None:
        """Raises `ValueError` naming the hook points that the cache lacks, and the filter that would have kept them."""
        names = set(self._cache.keys())
        missing = [name for name in points if name not in names]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise ValueError(
                f"cache: it lacks {', '.join(missing[:5])}{more}; allowed: a cache with all that is needed, kept by "
                f"run_with_cache(..., names_filter={hook_names.filter_for([*self._may_need, *points])})"
            )


def source_of(
    model: TransformerLensModel,
    prompts: Prompts | Source | None,
    *,
    may_need: Sequence[str],
    cache: CacheLike | None = None,
    mask: Bool[Tensor, "batch pos"] | None = None,
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    progress: bool | None = None,
) -> Source:
    """The source that an analysis' arguments name.

    Args:
        model: A TransformerLens model.
        prompts: Strings or token ids; None for the built-in texts. With a cache: the token ids it was run on. Or a source, which is
            given back.
        may_need: All hook points that the analysis may ask for: a cache that lacks one is met with a filter that keeps all.
        cache: An `ActivationCache` (or a dict) of these tokens; the model is not run then.
        mask: True at real tokens of a cache, False at padding; default: what `trace_norms` takes for padding.
        prepend_bos: Passed to the tokenisation of strings; None is the model's default.
        batch_tokens: Largest number of tokens run at once.
        progress: Whether to show progress bars.

    Raises:
        ValueError: Model or prompts are unusable; a cache comes without its tokens, or they do not fit.
    """
    require_usable(model)
    if isinstance(prompts, Source):
        if prompts.model is not model or cache is not None or mask is not None:
            raise ValueError("prompts: got a source with a cache, a mask or another model; allowed: a source of this model alone")
        return prompts
    if cache is None:
        if mask is not None:
            raise ValueError("mask: got one without a cache; allowed: with cache= only, padding of prompts is found by itself")
        sequences = tokenize(
            model, default_prompts(model, prepend_bos=prepend_bos) if prompts is None else prompts, prepend_bos=prepend_bos
        )
        return PromptSource(model, sequences, batch_tokens=batch_tokens, progress=progress)
    if not isinstance(prompts, Tensor):
        got = "none" if prompts is None else type(prompts).__name__
        raise ValueError(f"prompts: got {got} with a cache; allowed: the (batch, pos) tensor of token ids that it was run on")
    return CacheSource(model, cache, prompts, mask, may_need)
