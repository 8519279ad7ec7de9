"""Batches of prompts through a model, one activation at a time handed over and none kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.models.batches import Batch
from sd_lens.models.loading import inference
from sd_lens.models.protocol import TransformerLensModel


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
