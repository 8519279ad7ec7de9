"""Batches of prompts through a model, one activation at a time handed over and none kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.models import hook_names
from sd_lens.models.batches import Batch
from sd_lens.models.loading import inference
from sd_lens.models.protocol import TransformerLensModel

Hook = tuple[str, Callable[..., Any]]
"""A hook point's name and a function of the activation (and, by keyword, the hook point), as ``fwd_hooks`` takes them."""


class _BlocksDone(Exception):
    """Ends a forward pass after the last block: the logits, which a large vocabulary makes the largest tensor of all, are not needed."""


def run_batches(
    model: TransformerLensModel,
    work: Sequence[Batch],
    points: Sequence[str],
    on_batch: Callable[[Batch], Callable[[int, Tensor], None]],
    *,
    stop_at: int | None = None,
    edits: Callable[[Batch], Sequence[Hook]] | None = None,
    progress: bool | None = None,
    label: str = "tracing",
) -> None:
    """Runs batches through a model and hands the activation at every hook point to a callback; nothing is kept.

    Args:
        model: The model; its hooks and mode are as before afterwards, also after an error.
        work: The batches.
        points: Hook points.
        on_batch: Gives, for each batch, the function that is called with the number of a hook point and its activation.
        stop_at: Run this many blocks only; None for all of them. Nothing after the blocks is run.
        edits: Gives, for each batch, hooks that change activations; they come before those that read them.
        progress: Whether to show a progress bar; None shows one on a terminal or in a notebook once the work takes seconds.
        label: The progress bar's.
    """
    hidden = None if progress is None else not progress
    n_blocks: int = model.cfg.n_layers
    early = stop_at is not None and stop_at < n_blocks
    options = {"stop_at_layer": stop_at} if early else {}
    # Bridges run on to the logits when asked to stop after the last block.
    end: list[Hook] = [] if early else [(hook_names.resid_post(n_blocks - 1), _end)]
    with inference(model), tqdm(work, desc=label, unit="batch", delay=2.0, disable=hidden, leave=False) as bar:
        for batch in bar:
            receive = on_batch(batch)
            reading = [(name, _hand_over(receive, point)) for point, name in enumerate(points)]
            hooks = [*(edits(batch) if edits is not None else ()), *reading, *end]
            with suppress(_BlocksDone):
                model.run_with_hooks(batch.tokens.to(model.cfg.device), fwd_hooks=hooks, return_type=None, **options)


def not_shown(model: TransformerLensModel, points: Sequence[str], token: int) -> list[str]:
    """Those of some hook points that a forward pass of one token does not show.

    Args:
        model: The model.
        points: Hook points.
        token: Any token id.
    """
    there = [name for name in points if name in model.hook_dict]  # pyright: ignore[reportAttributeAccessIssue]
    seen = set[str]()
    if there:
        one = Batch(torch.tensor([[token]]), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.long))
        run_batches(model, [one], there, lambda _: lambda point, _: seen.add(there[point]), progress=False)
    return [name for name in points if name not in seen]


def require_shown(model: TransformerLensModel, points: Sequence[str], token: int) -> None:
    """Raises `ValueError` where a forward pass of one token does not show all of some hook points of attention layers.

    Args:
        model: The model.
        points: Hook points.
        token: Any token id.
    """
    missing = not_shown(model, points, token)
    if missing:
        raise ValueError(
            f"model: its attention never shows {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}; allowed: a model whose attention "
            "computes its pattern (a Hugging Face model with attn_implementation='eager')"
        )


def run_with_logits(model: TransformerLensModel, batch: Batch, hooks: Sequence[Hook]) -> Float[Tensor, "batch pos d_vocab"]:
    """Runs one batch through the whole model, which is as before afterwards, also after an error.

    Args:
        model: The model.
        batch: The batch.
        hooks: Hooks that change or read activations.

    Returns:
        The logits, padding's too.
    """
    with inference(model):
        return model.run_with_hooks(batch.tokens.to(model.cfg.device), fwd_hooks=list(hooks), return_type="logits")


def _end(stream: Tensor, hook: Any) -> None:
    raise _BlocksDone


def _hand_over(receive: Callable[[int, Tensor], None], point: int) -> Callable[..., None]:
    def hook(stream: Tensor, hook: Any) -> None:
        receive(point, stream)

    return hook
