"""Many equally long sequences of a few tokens through the first blocks of a model; of each token a norm and a coefficient are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sd_lens.linear.trigger import Trigger
from sd_lens.models import hook_names
from sd_lens.models.batches import Batch, equally_long
from sd_lens.models.embeddings import in_place_of_embedding
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.running import Hook, run_batches
from sd_lens.models.weights import BlockWeights
from sd_lens.tracing.trace import not_finite, stream_norms


class Target(NamedTuple):
    """What coefficients are of.

    Attributes:
        weights: A block.
        trigger: What its FFN answers to.
    """

    weights: BlockWeights
    trigger: Trigger


class Alone:
    """Runs sequences of one length through the first blocks of a model.

    Args:
        model: The model.
        with_attention: Whether attention adds anything to the stream.
        batch_tokens: Largest number of tokens run at once.
        progress: Whether to show progress bars.
    """

    def __init__(
        self,
        model: TransformerLensModel,
        *,
        with_attention: bool = True,
        batch_tokens: int = 4096,
        progress: bool | None = None,
    ):
        self._model = model
        self._with_attention, self._batch_tokens, self._progress = with_attention, batch_tokens, progress

    def norms(
        self,
        sequences: Int[Tensor, "row pos"],
        blocks: Sequence[int],
        *,
        embeddings: Float[Tensor, "row d_model"] | None = None,
        label: str = "vocabulary",
    ) -> Float[Tensor, "block row pos"]:
        """Norms of the stream after blocks.

        Args:
            sequences: Token ids.
            blocks: The blocks, in order; no later one is run.
            embeddings: Put in place of the last tokens' embeddings.
            label: Of the progress bar.

        Raises:
            ValueError: A norm is not finite.
        """
        return self._run(sequences, blocks, None, embeddings, label)[0]

    def norms_and_coefficients(
        self, sequences: Int[Tensor, "row pos"], block: int, target: Target | None
    ) -> tuple[Float[Tensor, "row pos"], Float[Tensor, "row pos"]]:
        """Norms of the stream after a block, and coefficients of its FFN's normalised input on the trigger; NaN without one.

        Args:
            sequences: Token ids.
            block: The block; no later one is run.
            target: The block with its trigger.

        Raises:
            ValueError: A norm is not finite.
        """
        norms, coefficients = self._run(sequences, [block], target, None, "vocabulary")
        return norms[0], coefficients

    def _run(
        self, sequences: Tensor, blocks: Sequence[int], target: Target | None, embeddings: Tensor | None, label: str
    ) -> tuple[Tensor, Tensor]:
        last, length = blocks[-1], sequences.shape[1]
        norms = torch.empty(len(blocks), *sequences.shape)
        coefficients = torch.full(sequences.shape, float("nan"))
        terms = [] if target is None else hook_names.entering_ffn(last, parallel=target.weights.parallel)

        def on_batch(batch: Batch) -> Callable[[int, Tensor], None]:
            seen: list[Tensor] = []

            def receive(point: int, stream: Tensor) -> None:
                if point >= len(terms):
                    norms[point - len(terms)].view(-1)[batch.flat] = stream_norms(stream).cpu()
                    return
                seen.append(stream.to(torch.promote_types(stream.dtype, torch.float32)))
                if target is not None and point == len(terms) - 1:
                    found = target.trigger.coefficient(target.weights, torch.stack(seen).sum(0))
                    coefficients.view(-1)[batch.flat] = found.float().cpu()

            return receive

        def edits(batch: Batch) -> list[Hook]:
            silent: list[Hook] = [(hook_names.attn_out(block), _nothing) for block in range(last + 1)]
            hooks = [] if self._with_attention else silent
            return hooks if embeddings is None else hooks + in_place_of_embedding(embeddings[batch.flat[:, 0] // length])

        work = equally_long(sequences, batch_tokens=self._batch_tokens)
        points = [*terms, *map(hook_names.resid_post, blocks)]
        run_batches(self._model, work, points, on_batch, stop_at=last + 1, edits=edits, progress=self._progress, label=label)
        _require_finite(norms, blocks, sequences if embeddings is None else None)
        return norms, coefficients


def _nothing(added: Tensor, hook: Any) -> Tensor:
    return torch.zeros_like(added)


def _require_finite(norms: Tensor, blocks: Sequence[int], sequences: Tensor | None) -> None:
    bad = (~torch.isfinite(norms)).nonzero()
    if len(bad):
        at, row, pos = bad[0].tolist()
        of = "a random embedding" if sequences is None else f"id {int(sequences[row, pos])} at position {pos}"
        raise not_finite(f"block {blocks[at]} ({of})")
