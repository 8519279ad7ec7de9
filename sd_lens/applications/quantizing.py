"""A model whose projections compute with eight bits while a context is open: fake quantisation, its weights untouched."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from jaxtyping import Float, Int
from torch import Tensor

from sd_lens.applications.int8 import Granularity, w8a8_linear
from sd_lens.applications.perplexity import Logits
from sd_lens.models.loading import inference
from sd_lens.models.projections import Projection, replaced
from sd_lens.models.protocol import TransformerLensModel

Scales = Mapping[str, Float[Tensor, "d_in"]]
"""SmoothQuant's scale of every input channel, by the projection's label."""


@contextmanager
def quantized(
    model: TransformerLensModel,
    chosen: Sequence[Projection],
    granularity: Granularity,
    *,
    spared: Collection[str] = (),
    scales: Scales | None = None,
) -> Iterator[Logits]:
    """Lets projections of a model compute with weights and inputs of eight bits.

    Each weight is rounded when its layer runs and let go again, so that no more than one rounded matrix exists at a time. The model's own
    weights are never written to.

    Args:
        model: The model.
        chosen: Its projections, from `projections`.
        granularity: What a range belongs to.
        spared: Names of projections that stay as they are.
        scales: SmoothQuant's, by label; projections without any are rounded as they are.

    Yields:
        A function from token ids to logits. Within the context any other run of the model is quantised as well, as one window.

    Example:
        >>> import torch
        >>> from sd_lens.models.loading import load
        >>> from sd_lens.models.projections import projections
        >>> model = load("tiny")
        >>> blocks = [one for one in projections(model) if one.block is not None]
        >>> with quantized(model, blocks, "per_token") as logits:
        ...     logits(torch.tensor([[1, 50, 60]])).shape
        torch.Size([1, 3, 1024])
    """
    running = [1]
    touched = [one for one in chosen if one.name not in spared]
    forwards = [_w8a8(one, granularity, running, (scales or {}).get(one.label)) for one in touched]
    plain = logits_of(model)

    def logits(ids: Int[Tensor, "window pos"]) -> Float[Tensor, "window pos d_vocab"]:
        running[0] = len(ids)
        try:
            return plain(ids)
        finally:
            running[0] = 1

    with replaced(touched, forwards):
        yield logits


def logits_of(model: TransformerLensModel) -> Logits:
    """A model's predictions, as a function of token ids."""

    def logits(ids: Int[Tensor, "window pos"]) -> Float[Tensor, "window pos d_vocab"]:
        with inference(model):
            return model.run_with_hooks(ids.to(model.cfg.device), fwd_hooks=[], return_type="logits")

    return logits


def _w8a8(one: Projection, granularity: Granularity, running: list[int], scales: Tensor | None) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return w8a8_linear(x, one.weight, one.bias, granularity, windows=running[0], scales=scales)

    return forward
