"""The inputs of feed-forward layers as a model's own activations have them: moments for the linear fit, weights of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.linear.inputs import Covariance, GaussianInput
from sd_lens.models import hook_names
from sd_lens.models.batches import Batch, batches
from sd_lens.models.loading import weights_of
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.running import run_batches
from sd_lens.models.tokens import Prompts, tokenize
from sd_lens.models.weights import BlockWeights, MoEWeights


def measure_inputs(
    model: TransformerLensModel,
    prompts: Prompts,
    blocks: Sequence[int] | None = None,
    *,
    covariance: Covariance = "diagonal",
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    progress: bool | None = None,
) -> dict[int, GaussianInput]:
    """`GaussianInput.measure` for several blocks in one pass.

    Args:
        model: A TransformerLens model.
        prompts: Strings or token ids.
        blocks: Which blocks; default: all.
        covariance: ``"diagonal"``, or ``"full"``: d_model² numbers per block.
        prepend_bos: Passed to the tokenisation of strings; None is the model's default.
        batch_tokens: Largest number of tokens run at once.
        progress: Whether to show a progress bar.

    Returns:
        One Gaussian per block.

    Raises:
        ValueError: The model, a prompt or a block is unusable, or an activation is not finite.

    Example:
        >>> from sd_lens.models.loading import load
        >>> sorted(measure_inputs(load("tiny"), "The cat sat on the mat.", [0, 2]))
        [0, 2]
    """
    if covariance not in ("diagonal", "full"):
        raise ValueError(f"covariance: got {covariance!r}; allowed: 'diagonal', 'full'")
    sums: dict[int, _Moments] = {}

    def add(weights: BlockWeights, x: Tensor) -> None:
        sums.setdefault(weights.block, _Moments(covariance == "full")).add(x)

    _over_ffn_inputs(
        model,
        prompts,
        blocks,
        add,
        prepend_bos=prepend_bos,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    return {block: moments.result(block) for block, moments in sums.items()}


def measure_router(
    model: TransformerLensModel,
    prompts: Prompts,
    blocks: Sequence[int] | None = None,
    *,
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    progress: bool | None = None,
) -> dict[int, Float[Tensor, "experts"]]:
    """Mean weight that the router of a mixture of experts gives each expert, over all tokens of prompts.

    Args:
        model: A TransformerLens model.
        prompts: Strings or token ids.
        blocks: Which blocks; default: all. Dense ones are left out of the result.
        prepend_bos: Passed to the tokenisation of strings; None is the model's default.
        batch_tokens: Largest number of tokens run at once.
        progress: Whether to show a progress bar.

    Returns:
        One vector per block with experts, for ``linearize(..., router=...)``. An expert that a token is not sent to counts as zero.

    Raises:
        ValueError: The model, a prompt or a block is unusable.

    Example:
        >>> from sd_lens.models.loading import load
        >>> measure_router(load("tiny"), "The cat sat on the mat.")  # a dense model
        {}
    """
    sums: dict[int, tuple[Tensor, int]] = {}

    def add(weights: BlockWeights, x: Tensor) -> None:
        if isinstance(weights.ffn, MoEWeights):
            total, n = sums.get(weights.block, (torch.zeros((), dtype=torch.float64, device=x.device), 0))
            sums[weights.block] = total + weights.ffn.route(x).double().sum(0), n + len(x)

    _over_ffn_inputs(
        model,
        prompts,
        blocks,
        add,
        prepend_bos=prepend_bos,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    return {block: (total / n).float() for block, (total, n) in sums.items()}


class _Moments:
    """Running mean and covariance: a batch's own, merged into the total's (Chan, Golub, LeVeque 1979, equations 1.5)."""

    def __init__(self, full: bool):
        self._full = full
        self._n = 0
        self._mean = self._scatter = torch.zeros(())
        self._dtype = torch.float32

    def add(self, x: Tensor) -> None:
        self._dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.double()
        mean = wide.mean(0)
        centred = wide - mean
        scatter = centred.mT @ centred if self._full else centred.square().sum(0)
        if self._n == 0:
            self._n, self._mean, self._scatter = len(x), mean, scatter
            return
        total = self._n + len(x)
        step = mean - self._mean
        between = torch.outer(step, step) if self._full else step.square()
        self._scatter += scatter + between * (self._n * len(x) / total)
        self._mean = self._mean + step * (len(x) / total)
        self._n = total

    def result(self, block: int) -> GaussianInput:
        if not bool(torch.isfinite(self._scatter).all()):
            raise ValueError(f"model: the FFN's input of block {block} is not finite on these prompts; allowed: finite activations")
        return GaussianInput(self._mean.to(self._dtype), (self._scatter / self._n).to(self._dtype), self._n)


def _over_ffn_inputs(
    model: TransformerLensModel,
    prompts: Prompts,
    blocks: Sequence[int] | None,
    add: Callable[[BlockWeights, Tensor], None],
    *,
    prepend_bos: bool | None,
    batch_tokens: int,
    progress: bool | None,
) -> None:
    """Hands over, batch by batch, what goes into the feed-forward layers: ``(tokens, d_model)``, padding left out.

    It is computed from the block's input and its attention's output, which every architecture has hook points for; the FFN's own
    input has none on some.
    """
    weights = weights_of(model)
    found = {block.block: block for block in (weights[index] for index in (range(len(weights)) if blocks is None else blocks))}
    chosen = list(found.values())
    if not chosen:
        raise ValueError("blocks: got none; allowed: at least one block")
    sequences = tokenize(model, prompts, prepend_bos=prepend_bos)
    points = [name(block.block) for block in chosen for name in (hook_names.resid_pre, hook_names.attn_out)]

    def on_batch(batch: Batch) -> Callable[[int, Tensor], None]:
        entering: dict[int, Tensor] = {}

        def receive(point: int, stream: Tensor) -> None:
            block = chosen[point // 2]
            if point % 2 == 0:
                entering[block.block] = stream
                return
            resid = entering.pop(block.block)
            x = block.ffn.input(resid if block.parallel else resid + stream)
            add(block, x[batch.mask.to(x.device)])

        return receive

    last = max(block.block for block in chosen) + 1
    run_batches(
        model,
        batches(sequences, batch_tokens=batch_tokens),
        points,
        on_batch,
        stop_at=last if last < len(weights) else None,
        progress=progress,
        label="inputs",
    )
