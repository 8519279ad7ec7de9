"""Coefficients of other runs, which an intervention puts in place of those it finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sd_lens.interventions.coefficients import of_stream, points_of
from sd_lens.interventions.sites import Site
from sd_lens.models import hook_names
from sd_lens.models.batches import Batch, batches, padded
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.running import run_batches
from sd_lens.models.tokens import Prompts, tokenize
from sd_lens.models.weights import BlockWeights
from sd_lens.tracing.trace import CacheLike


def mean_coefficients(model: TransformerLensModel, prompts: Prompts, sites: Sequence[Site]) -> list[Float[Tensor, "rank"]]:
    """Mean coefficients over all tokens of reference prompts, at each site.

    Args:
        model: A TransformerLens model.
        prompts: The prompts.
        sites: Where.

    Raises:
        ValueError: The prompts are unusable.
    """
    sequences = _tokenized(model, prompts, "mean")
    sums = [torch.zeros(site.vectors.shape[1], dtype=torch.float64) for site in sites]

    def on_batch(batch: Batch) -> Callable[[int, Tensor], None]:
        def receive(point: int, activation: Tensor) -> None:
            sums[point] += sites[point].coefficients(activation)[batch.mask.to(activation.device)].double().sum(0).cpu()

        return receive

    work = batches(sequences, batch_tokens=4096)
    run_batches(model, work, [site.name for site in sites], on_batch, stop_at=_last(sites), label="reference")
    return [(total / sum(map(len, sequences))).float() for total in sums]


def source_coefficients(
    model: TransformerLensModel,
    source: Prompts | CacheLike,
    weights: BlockWeights,
    sites: Sequence[Site],
    *,
    prepend_bos: bool | None = None,
) -> list[Float[Tensor, "batch pos rank"]]:
    """Coefficients of every token of another run, at each site; NaN at padding.

    Args:
        model: A TransformerLens model.
        source: Prompts, run in one batch, so that a run of the same prompts has the same numbers to the bit; or a cache.
        weights: The block.
        sites: Where.
        prepend_bos: Passed to the tokenisation of strings.

    Raises:
        ValueError: The prompts are unusable, or the cache lacks hook points.
    """
    if is_cache(source):
        return [_of_cache(source, site, weights) for site in sites]
    sequences = _tokenized(model, source, "source", prepend_bos=prepend_bos)
    batch = padded(sequences)
    kept: list[Tensor] = [torch.empty(0)] * len(sites)

    def receive(point: int, activation: Tensor) -> None:
        values = sites[point].coefficients(activation)
        kept[point] = values.masked_fill(~batch.mask.to(values.device).unsqueeze(-1), float("nan"))

    run_batches(model, [batch], [site.name for site in sites], lambda batch: receive, stop_at=_last(sites), label="source")
    return kept


def is_cache(source: Any) -> bool:
    """Whether something holds activations by their hook points' names."""
    return isinstance(source, Mapping) or hasattr(source, "cache_dict")


def unknown_tokens(cache: Any) -> Int[Tensor, "*batch pos"]:
    """Token ids −1 in the shape of a cache."""
    first = hook_names.resid_pre(0)
    return torch.full(tuple(cache[first].shape[:-1]) if first in set(cache.keys()) else (1, 1), -1)


def _tokenized(model: TransformerLensModel, prompts: Any, argument: str, **options: Any) -> list[Tensor]:
    try:
        return tokenize(model, prompts, **options)
    except ValueError as error:
        raise ValueError(f"{argument}: {str(error).removeprefix('prompts: ')}") from None


def _of_cache(cache: Any, site: Site, weights: BlockWeights) -> Tensor:
    side = "direction" if site.name == hook_names.resid_post(weights.block) else "trigger"
    names, points = set(cache.keys()), points_of(weights, side)
    for name in {site.name, *points} & names:
        shape, width = tuple(cache[name].shape), len(site.vectors)
        if len(shape) not in (2, 3) or shape[-1] != width:
            raise ValueError(f"source: got shape {shape} at {name}; allowed: (batch, pos, {width})")
    if site.name in names:
        values = site.coefficients(cache[site.name].detach())
    elif all(name in names for name in points):
        values = of_stream(weights, [cache[name].detach() for name in points], site.vectors, side)
    else:
        wanted = dict.fromkeys([site.name, *points])
        raise ValueError(
            f"source: the cache lacks {site.name}; allowed: a cache kept by run_with_cache(..., names_filter={hook_names.filter_for(wanted)})"
        )
    return values.unsqueeze(0) if values.ndim == 2 else values


def _last(sites: Sequence[Site]) -> int:
    return max(site.block for site in sites) + 1
