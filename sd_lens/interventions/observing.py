"""What one forward pass of a batch shows: norms, attention to a position, logits; and the numbers it is judged by, one per prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sd_lens.models import hook_names
from sd_lens.models.batches import Batch
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.running import Hook, run_batches, run_with_logits
from sd_lens.tracing.sinks import prompt_alpha
from sd_lens.tracing.trace import stream_norms


@dataclass(frozen=True, eq=False)
class Observed:
    """What a forward pass of a batch showed; None for what was not asked for.

    Attributes:
        batch: The batch.
        norms: Norm of every token after the embedding and after every block; NaN at padding.
        alpha: Gu et al.'s ``α`` of every head, see `sd_lens.tracing.sinks`.
        logits: The logits, where the model computed them.
    """

    batch: Batch
    norms: Float[Tensor, "point batch pos"] | None = None
    alpha: Float[Tensor, "batch block head"] | None = None
    logits: Float[Tensor, "batch pos d_vocab"] | None = None


def observe(
    model: TransformerLensModel,
    batch: Batch,
    hooks: Sequence[Hook] = (),
    *,
    norms: bool = False,
    alpha: bool = False,
    logits: bool = False,
    T: int = 64,
    key: int = 0,
) -> Observed:
    """Runs a batch with hooks and keeps what is asked for. Without logits the run ends after the last block.

    Args:
        model: A TransformerLens model, as before afterwards.
        batch: Prompts padded on the right.
        hooks: Hooks that change activations; they act before those that read them.
        norms: Whether to keep norms.
        alpha: Whether to keep ``α``.
        logits: Whether to keep logits.
        T: Queries after the first so many tokens of a prompt are left out of ``α``.
        key: Position whose ``α`` is taken.
    """
    n_blocks = int(model.cfg.n_layers)
    seen_norms: dict[int, Tensor] = {}
    seen_alpha: dict[int, Tensor] = {}

    def norm_reader(point: int) -> Callable[..., None]:
        def read(stream: Tensor, hook: Any) -> None:
            seen_norms[point] = stream_norms(stream).cpu().masked_fill(~batch.mask, float("nan"))

        return read

    def alpha_reader(block: int) -> Callable[..., None]:
        def read(pattern: Tensor, hook: Any) -> None:
            seen_alpha[block] = prompt_alpha(pattern, batch.mask, T, key).float().cpu()

        return read

    reading: list[Hook] = []
    if norms:
        reading += [(name, norm_reader(point)) for point, name in enumerate(hook_names.residual_points(n_blocks))]
    if alpha:
        reading += [(hook_names.pattern(block), alpha_reader(block)) for block in range(n_blocks)]
    found = None
    if logits:
        found = run_with_logits(model, batch, [*hooks, *reading])
    else:
        run_batches(
            model, [batch], [], lambda _: lambda point, activation: None, edits=lambda _: [*hooks, *reading], progress=False
        )
    return Observed(
        batch=batch,
        norms=torch.stack([seen_norms[point] for point in range(n_blocks + 1)]) if norms else None,
        alpha=torch.stack([seen_alpha[block] for block in range(n_blocks)], dim=1) if alpha else None,
        logits=found,
    )


def loss(observed: Observed) -> Float[Tensor, "batch"]:
    """Mean cross-entropy of each prompt's next tokens, in nats; NaN for a prompt of one token."""
    assert observed.logits is not None
    batch = observed.batch
    logits = _wide(observed.logits[:, :-1])
    targets = batch.tokens[:, 1:].to(logits.device)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    return _mean(losses, batch.mask[:, 1:])


def kl(observed: Observed, reference: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, "batch"]:
    """``KL(reference ‖ observed)`` of the predicted distributions, averaged over each prompt's tokens, in nats.

    Args:
        observed: A run with logits.
        reference: Logits of the run that it is compared with.
    """
    assert observed.logits is not None
    new, old = (torch.log_softmax(_wide(logits), dim=-1) for logits in (observed.logits, reference))
    return _mean((old.exp() * (old - new)).sum(-1).clamp(min=0), observed.batch.mask)


def logit_difference(observed: Observed, answers: Int[Tensor, "batch 2"]) -> Float[Tensor, "batch"]:
    """Logit of a right answer minus that of a wrong one, at each prompt's last token.

    Args:
        observed: A run with logits.
        answers: Ids of right and wrong answer, per prompt.
    """
    assert observed.logits is not None
    last = observed.batch.mask.sum(1) - 1
    logits = _wide(observed.logits[torch.arange(len(last)), last.to(observed.logits.device)])
    right, wrong = logits.gather(1, answers.to(logits.device)).T
    return (right - wrong).float().cpu()


def peak_norm(observed: Observed) -> Float[Tensor, "batch"]:
    """Largest norm of any of a prompt's tokens after any block."""
    assert observed.norms is not None
    return observed.norms[1:].nan_to_num(nan=0.0).amax((0, 2))


def sink_rate(observed: Observed, epsilon: float = 0.3) -> Float[Tensor, "batch"]:
    """Share of heads whose ``α`` exceeds ``epsilon`` in each prompt."""
    assert observed.alpha is not None
    return (observed.alpha > epsilon).float().mean((1, 2))


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that count; NaN where there is none."""
    mask = mask.to(values.device)
    return (values.masked_fill(~mask, 0.0).sum(1) / mask.sum(1)).float().cpu()
