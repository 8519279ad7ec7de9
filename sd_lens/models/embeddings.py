"""The vocabulary as embeddings: how long they are, which of them were trained, and how to put another vector in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sd_lens.models import hook_names
from sd_lens.models.batches import Batch, equally_long
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.running import Hook, run_batches

UNTRAINED = 0.1
"""An id whose embedding's norm is at most this share of the mean was not trained (Wang et al., arXiv 2502.07004)."""

# Numbers of the embedding matrix that are looked at together.
_CHUNK = 2**22


def embedding_norms(model: TransformerLensModel, ids: Int[Tensor, "id"] | None = None) -> Float[Tensor, "id"]:
    """Norm of every row of the embedding matrix, in float32, without a copy of the matrix.

    These are the parameters' norms. What joins the stream may be a multiple of them (Gemma) or normed (Bloom).

    Args:
        model: A TransformerLens model.
        ids: Token ids; default: the whole vocabulary.

    Returns:
        The norms, on the CPU.

    Raises:
        ValueError: An embedding is NaN or infinite.

    Example:
        >>> from sd_lens.models.planted import planted
        >>> norms = embedding_norms(planted().model)
        >>> len(norms), round(norms.mean().item(), 3)
        (97, 1.0)
    """
    loaded: Any = model
    matrix: Tensor = loaded.W_E.detach()
    ids = torch.arange(len(matrix)) if ids is None else ids
    norms = torch.empty(len(ids))
    # The squares of norms that half precision holds may not fit into it.
    wide = torch.promote_types(matrix.dtype, torch.float32)
    rows = max(1, _CHUNK // matrix.shape[1])
    for chunk, into in zip(ids.split(rows), norms.split(rows), strict=True):
        into.copy_(torch.linalg.vector_norm(matrix[chunk.to(matrix.device)], dim=-1, dtype=wide))
    bad = (~torch.isfinite(norms)).nonzero().flatten()
    if len(bad):
        raise ValueError(f"model: the embedding of id {int(ids[bad[0]])} is NaN or infinite; allowed: finite weights")
    return norms


def trained_ids(norms: Float[Tensor, "vocab"]) -> Bool[Tensor, "vocab"]:
    """Which ids of a vocabulary were trained: those whose embedding is longer than a tenth of the mean.

    Rows that no training text ever touched (reserved and padding ids, byte fallbacks) keep the small values they began with, or decay
    to them. That makes this a rule of thumb: rows drawn as long as trained ones become, and not decayed, pass as trained.

    Args:
        norms: Norms of all embeddings, from `embedding_norms`.

    Example:
        >>> trained_ids(torch.tensor([1.0, 1.2, 0.01])).tolist()
        [True, True, False]
    """
    return norms > UNTRAINED * norms.mean()


def in_place_of_embedding(vectors: Float[Tensor, "batch d_model"]) -> list[Hook]:
    """Hooks that put other vectors in place of the last tokens' embeddings; what a model adds for the position stays.

    Args:
        vectors: One per row of the batch.

    Returns:
        Hooks for `run_batches`.
    """
    embedded: list[Tensor] = []

    def keep(embedding: Tensor, hook: Any) -> None:
        embedded[:] = [embedding[:, -1]]

    def replace(stream: Tensor, hook: Any) -> Tensor:
        stream = stream.clone()
        wide = torch.promote_types(stream.dtype, torch.float32)
        # Not every model says what it adds for the position, but all show the sum and the embedding.
        added = stream[:, -1].to(wide) - embedded.pop().to(wide)
        stream[:, -1] = (vectors.to(stream.device, wide) + added).to(stream.dtype)
        return stream

    return [(hook_names.embed(), keep), (hook_names.resid_pre(0), replace)]


def joining_norm(model: TransformerLensModel, ids: Int[Tensor, "id"], *, batch_tokens: int = 4096) -> float:
    """Mean norm of what token ids' embeddings bring into the stream: what the model makes of the matrix, without positions.

    Args:
        model: A TransformerLens model.
        ids: Token ids.
        batch_tokens: Largest number of tokens run at once.

    Example:
        >>> from sd_lens.models.planted import planted
        >>> round(joining_norm(planted().model, torch.arange(97)), 3)
        1.0
    """
    total = torch.zeros((), dtype=torch.float64)

    def on_batch(batch: Batch) -> Callable[[int, Tensor], None]:
        def receive(point: int, embedding: Tensor) -> None:
            wide = torch.promote_types(embedding.dtype, torch.float32)
            total.add_(torch.linalg.vector_norm(embedding, dim=-1, dtype=wide).sum().cpu())

        return receive

    work = equally_long(ids.unsqueeze(1), batch_tokens=batch_tokens)
    run_batches(model, work, [hook_names.embed()], on_batch, stop_at=1, label="embeddings")
    return float(total) / len(ids)
