"""Residual norms of every token after the embedding and after every block, reduced inside the hooks.

A trace holds one number per token and hook point, never a residual stream, so that a whole corpus can be traced through a model
of any width. In a second pass over a few prompts it also measures the defect direction (`sd_lens.tracing.direction`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sd_lens.models import hook_names
from sd_lens.models.batches import Batch, batches
from sd_lens.models.loading import require_usable
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.running import run_batches
from sd_lens.models.tokens import Prompts, tokenize
from sd_lens.tracing.direction import DefectDirection, DirectionAccumulator
from sd_lens.tracing.trace import MIN_RATIO, NormTrace, labelled, require_finite, require_ratio, stream_norms


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
    require_ratio(min_ratio)
    sequences = tokenize(model, prompts, prepend_bos=prepend_bos)
    points = hook_names.residual_points(stop_at or n_blocks)
    norms = torch.empty(len(points), sum(len(sequence) for sequence in sequences))

    def reduce(batch: Batch) -> Callable[[int, Tensor], None]:
        flat = batch.flat[batch.mask]
        kept: list[Tensor] = []

        def receive(point: int, stream: Tensor) -> None:
            kept.append(stream_norms(stream))
            if point == len(points) - 1:  # an accelerator is waited for once a batch, not at every block
                for row, norm in enumerate(kept):
                    norms[row, flat] = norm.cpu()[batch.mask]

        return receive

    # A model that runs all of its blocks ends by itself: asking it to stop after the last would save nothing.
    stop = stop_at if stop_at != n_blocks else None
    run_batches(model, batches(sequences, batch_tokens=batch_tokens), points, reduce, stop_at=stop, progress=progress)
    trace = labelled(norms, sequences, model, n_blocks=n_blocks, d_model=model.cfg.d_model)
    require_finite(trace)
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
    accumulator = DirectionAccumulator(n_points, trace.d_model, min_ratio=min_ratio, seed=seed)

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
