"""What projections read and how well eight bits keep what they answer, measured on text in bounded memory.

SmoothQuant (Xiao et al., ICML 2023, arXiv 2211.10438, equation 4) moves the outliers of input channels into the weights: input channel j is divided,
and column j of the weight multiplied, by ``s_j = max|X_j|^α / max|W_j|^(1−α)``. Projections that read the same norm share their scales, so
that a deployment can fold the division into that norm's gain; what reads heads or neurons is left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from sd_lens.applications.int8 import Granularity, w8a8_linear
from sd_lens.applications.perplexity import Windows
from sd_lens.applications.quantizing import Scales, logits_of
from sd_lens.models.projections import Projection
from sd_lens.models.protocol import TransformerLensModel

_MOST = 150.0
"""Decibels; more than float32 can tell."""


@dataclass(frozen=True)
class ProjectionRange:
    """How far what a projection works with reaches, and how well eight bits keep it.

    Attributes:
        name: The projection's name in the Hugging Face model.
        part: Of a fused layer, the part.
        block: Its block; None of the unembedding.
        role: What TransformerLens calls it.
        input_max: Largest magnitude of what it reads.
        input_typical: A token's largest magnitude, geometric mean over tokens: far below ``input_max`` where single tokens stand out.
        weight_max: Largest magnitude of its weights.
        weight_typical: An output's largest weight, geometric mean over outputs.
        sqnr_db: By method and granularity, the power of its answers over that of the error that quantising it makes, decibels.
        token_sqnr_db: The same for each token apart, mean over tokens: what is left of ordinary tokens where a single one has nearly all
            the power.
    """

    name: str
    part: str
    block: int | None
    role: str
    input_max: float
    input_typical: float
    weight_max: float
    weight_typical: float
    sqnr_db: Mapping[str, float]
    token_sqnr_db: Mapping[str, float]


def channel_maxima(
    model: TransformerLensModel, chosen: Sequence[Projection], windows: Windows, *, batch_tokens: int = 2048
) -> dict[str, Float[Tensor, "d_in"]]:
    """Largest magnitude of every input channel of every projection, over a text.

    Args:
        model: The model.
        chosen: Its projections.
        windows: The text.
        batch_tokens: Largest number of tokens run at once.

    Returns:
        By label, one number per input channel: all that is kept of the text.

    Example:
        >>> from sd_lens.applications.perplexity import windows_of
        >>> from sd_lens.models.loading import load
        >>> from sd_lens.models.projections import projections
        >>> model = load("tiny")
        >>> maxima = channel_maxima(model, projections(model)[:1], windows_of(model, torch.arange(99) + 10, window=64))
        >>> {label: tuple(values.shape) for label, values in maxima.items()}
        {'model.layers.0.self_attn.q_proj': (128,)}
    """
    maxima: dict[str, Tensor] = {}

    def note(one: Projection, x: Tensor) -> None:
        largest = x.detach().flatten(0, -2).abs().amax(0).float()
        maxima[one.label] = torch.maximum(maxima[one.label], largest) if one.label in maxima else largest

    _run(model, chosen, windows, batch_tokens, note)
    return maxima


def smoothing_scales(
    chosen: Sequence[Projection], maxima: Mapping[str, Float[Tensor, "d_in"]], alpha: float = 0.5
) -> dict[str, Float[Tensor, "d_in"]]:
    """SmoothQuant's scales of the projections that read a norm.

    Args:
        chosen: The projections.
        maxima: Largest magnitude of each input channel, from `channel_maxima`.
        alpha: How much of the difficulty moves into the weights, from 0 to 1.

    Returns:
        By label, what each input channel is divided by; the same for all projections of one block and norm.

    Raises:
        ValueError: ``alpha`` is out of range.

    Example:
        >>> smoothing_scales([], {}, alpha=0.5)
        {}
    """
    require_alpha(alpha)
    groups: dict[tuple[int | None, str], list[Projection]] = {}
    for one in chosen:
        if one.norm:
            groups.setdefault((one.block, one.norm), []).append(one)
    scales = {}
    for members in groups.values():
        weights = torch.stack([one.weight.float().abs().amax(0) for one in members]).amax(0)
        inputs = torch.stack([maxima[one.label].to(weights.device) for one in members]).amax(0)
        shared = inputs.pow(alpha) / weights.pow(1 - alpha)
        # A channel that is never used, or has no weights, keeps its scale.
        shared = torch.where((shared > 0) & shared.isfinite(), shared, torch.ones_like(shared)).clamp(min=1e-5)
        scales |= {one.label: shared for one in members}
    return scales


def require_alpha(alpha: float) -> None:
    """Raises `ValueError` unless this can be SmoothQuant's migration strength."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: got {alpha}; allowed: 0 to 1")


def projection_ranges(
    model: TransformerLensModel,
    chosen: Sequence[Projection],
    windows: Windows,
    schemes: Mapping[str, tuple[Granularity, Scales | None]],
    *,
    batch_tokens: int = 2048,
) -> tuple[ProjectionRange, ...]:
    """Ranges of what projections read and hold, and the error that quantising each alone makes in its answers.

    Args:
        model: The model, which runs unquantised.
        chosen: Its projections.
        windows: The text.
        schemes: Granularity and SmoothQuant's scales, by the name that the results get.
        batch_tokens: Largest number of tokens run at once.

    Returns:
        One per projection, in their order.

    Example:
        >>> from sd_lens.applications.perplexity import windows_of
        >>> from sd_lens.models.loading import load
        >>> from sd_lens.models.projections import projections
        >>> model = load("tiny")
        >>> windows = windows_of(model, torch.arange(99) + 10, window=64)
        >>> found = projection_ranges(model, projections(model)[:1], windows, {"rtn": ("per_token", None)})
        >>> 25 < found[0].sqnr_db["rtn"] < 45
        True
    """
    sums: dict[str, _Sums] = {one.label: _Sums() for one in chosen}
    running = [1]

    def note(one: Projection, x: Tensor) -> None:
        kept, flat = sums[one.label], x.detach().flatten(0, -2).float()
        largest = flat.abs().amax(-1)
        kept.largest = max(kept.largest, float(largest.max()))
        kept.log_sum += float(largest.clamp(min=1e-30).log().double().sum())
        kept.n_tokens += len(flat)
        true = functional.linear(x, one.weight)
        for name, (granularity, scales) in schemes.items():
            rounded = w8a8_linear(
                x, one.weight, None, granularity, windows=running[0], scales=None if scales is None else scales.get(one.label)
            )
            error = (rounded - true).float().flatten(0, -2).square().sum(-1).double()
            signal = true.float().flatten(0, -2).square().sum(-1).double()
            decibels = 10 * (signal / error.clamp(min=1e-300)).clamp(min=1e-15).log10().clamp(max=_MOST / 10)
            decibels = torch.where(error > 0, decibels, _MOST)  # also where nothing is answered, as to neurons that are all silent
            old = kept.powers.get(name, (0.0, 0.0, 0.0))
            new = (float(signal.sum()), float(error.sum()), float(decibels.sum()))
            kept.powers[name] = (old[0] + new[0], old[1] + new[1], old[2] + new[2])

    _run(model, chosen, windows, batch_tokens, note, running)
    return tuple(_range(one, sums[one.label]) for one in chosen)


class _Sums:
    """What is kept of a projection: no more for a long text than for a short one."""

    def __init__(self) -> None:
        self.largest, self.log_sum, self.n_tokens = 0.0, 0.0, 0
        self.powers: dict[str, tuple[float, float, float]] = {}


def _range(one: Projection, sums: _Sums) -> ProjectionRange:
    rows = one.weight.float().abs().amax(1)
    return ProjectionRange(
        name=one.name,
        part=one.part,
        block=one.block,
        role=one.role,
        input_max=sums.largest,
        input_typical=math.exp(sums.log_sum / sums.n_tokens),
        weight_max=float(rows.max()),
        weight_typical=float(rows.clamp(min=1e-30).log().double().mean().exp()),
        sqnr_db={name: _decibels(signal, error) for name, (signal, error, _) in sums.powers.items()},
        token_sqnr_db={name: decibels / sums.n_tokens for name, (*_, decibels) in sums.powers.items()},
    )


def _decibels(signal: float, error: float) -> float:
    return min(_MOST, 10 * math.log10(max(signal, 1e-300) / error)) if error > 0 else _MOST


def _run(
    model: TransformerLensModel,
    chosen: Sequence[Projection],
    windows: Windows,
    batch_tokens: int,
    note: Callable[[Projection, Tensor], None],
    running: list[int] | None = None,
) -> None:
    """Shows every projection's input to a callback while the text runs through the model."""
    logits = logits_of(model)
    with _shown(chosen, note):
        for ids, _ in windows.batches(batch_tokens):
            if running is not None:
                running[0] = len(ids)
            logits(ids)


@contextmanager
def _shown(chosen: Sequence[Projection], note: Callable[[Projection, Tensor], None]) -> Iterator[None]:
    def hook(one: Projection) -> Callable[..., None]:
        return lambda _module, args: note(one, args[0])

    handles: list[Any] = []
    try:
        handles += [one.module.register_forward_pre_hook(hook(one)) for one in chosen]
        yield
    finally:
        for handle in handles:
            handle.remove()
