"""The table of all blocks' linear maps, against the direction that the model's own tokens take."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.linear.directions import BlockDirections, directions_of, require_options
from sd_lens.linear.inputs import GaussianInput, Inputs
from sd_lens.linear.linearize import Estimator, PostScales
from sd_lens.linear.measured import measure_inputs, measure_router
from sd_lens.models.loading import weights_of
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import Prompts
from sd_lens.models.weights import ModelWeights
from sd_lens.tracing.defects import Defects, find_defects
from sd_lens.tracing.norms import trace_norms
from sd_lens.tracing.prompts import default_prompts


def block_directions(
    model: TransformerLensModel | ModelWeights | str | os.PathLike[str],
    direction: Float[Tensor, "d_model"] | None = None,
    *,
    prompts: Prompts | None = None,
    blocks: Sequence[int] | None = None,
    norms: Mapping[int, float] | None = None,
    inputs: Inputs | Mapping[int, GaussianInput] | Literal["measured"] = "unit",
    router: Mapping[int, Float[Tensor, "experts"]] | None = None,
    estimator: Estimator = "closed_form",
    samples: int = 100_000,
    paper: bool = False,
    post_scales: Mapping[int, PostScales] | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> BlockDirections:
    """Linearises every block and compares it with a reference direction.

    Args:
        model: A TransformerLens model; or its `weights_of`, or a checkpoint folder or hub name, which is read block by block, so that
            it may be larger than memory.
        direction: The reference. Default: of a model, the defect direction measured on ``prompts``; where there is no model, or no
            token of it has a high norm, the leading left singular vector of the block whose largest singular value stands out most.
        prompts: What to measure on; default: built-in texts, or random token ids for a model without a tokenizer.
        blocks: Which blocks; default: all.
        norms: Norm of the high-norm tokens entering a block, for `BlockDirection.balance`; default: measured where ``direction`` is, or
            where ``prompts`` are given.
        inputs: What FFNs are fitted to, see `sd_lens.linearize`; ``"measured"`` measures the mean and variances of every block's
            FFN input, and the mean weights of experts, on ``prompts``.
        router: Mean weights of each block's experts; default: uniform.
        estimator: ``"closed_form"``, or ``"sampled"``, the paper's least squares.
        samples: Number of samples of the sampled estimator.
        paper: Whether to leave out biases and mean subtraction, as the paper does.
        post_scales: What the norms after each block's sublayers divide by, see `sd_lens.linearize`.
        device: Where to compute; default: where the weights are.
        seed: Seeds the singular solver and the samples.
        progress: Whether to show progress bars; None shows them on a terminal or in a notebook once the work takes seconds.

    Returns:
        The table, three rows per block.

    Raises:
        ValueError: A block does not exist or cannot be linearised; the direction has another width; measuring was asked for and there
            is no model.

    Example:
        >>> from sd_lens.models.planted import planted
        >>> truth = planted()
        >>> table = block_directions(truth.model, truth.direction)
        >>> round(table.row(truth.decay_block).eigenvalue.real)
        -60
    """
    weights_only = isinstance(model, ModelWeights | str | os.PathLike)
    live: Any = model
    if weights_only and (prompts is not None or inputs == "measured"):
        raise ValueError(
            "model: got weights only, which cannot be measured; allowed: a TransformerLens model, or no prompts and no measured inputs"
        )
    weights = model if isinstance(model, ModelWeights) else weights_of(model)
    require_options(
        weights,
        direction,
        blocks,
        norms=norms,
        inputs="unit" if inputs == "measured" else inputs,
        router=router,
        post_scales=post_scales,
        estimator=estimator,
        samples=samples,
    )
    source = None
    if not weights_only and (direction is None or prompts is not None):
        reference = measure_reference(live, prompts, progress=progress)
        if reference is not None:
            norms = reference.norms if norms is None else norms
            if direction is None:
                direction, source = reference.direction, "measured"
    if inputs == "measured":
        text = default_prompts(live) if prompts is None else prompts
        fitted_to: Inputs | Mapping[int, GaussianInput] = measure_inputs(live, text, blocks, progress=progress)
        router = measure_router(live, text, blocks, progress=progress) if router is None else router
    else:
        fitted_to = inputs
    table = directions_of(
        weights,
        direction,
        blocks=blocks,
        norms=norms,
        inputs=fitted_to,
        router=router,
        estimator=estimator,
        samples=samples,
        paper=paper,
        post_scales=post_scales,
        device=device,
        seed=seed,
        progress=progress,
    )
    return table if source is None else replace(table, reference_source=source)


@dataclass(frozen=True)
class Reference:
    """What blocks are compared with, measured.

    Attributes:
        direction: The defect direction.
        norms: Mean norm of the high-norm tokens entering each block.
    """

    direction: Float[Tensor, "d_model"]
    norms: dict[int, float]


def measure_reference(
    model: TransformerLensModel, prompts: Prompts | None = None, *, progress: bool | None = None
) -> Reference | None:
    """The defect direction and the norms it comes with.

    Args:
        model: A TransformerLens model.
        prompts: Strings or token ids; default: built-in texts, or random token ids for a model without a tokenizer.
        progress: Whether to show a progress bar.

    Returns:
        The reference; None where no token has a high norm.

    Raises:
        ValueError: The model or a prompt is unusable.
    """
    trace = trace_norms(model, default_prompts(model) if prompts is None else prompts, progress=progress)
    if trace.direction is None:
        return None
    return Reference(trace.direction.direction, entering_norms(find_defects(trace)))


def entering_norms(defects: Defects) -> dict[int, float]:
    """Mean norm of the high-norm tokens entering each block; empty where there are none."""
    trace = defects.trace
    high = trace.high_norm(defects.min_ratio).any(0)
    return {b: float(trace.norms[b, high].mean()) for b in range(trace.n_blocks)} if bool(high.any()) else {}
