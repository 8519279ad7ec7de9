"""Eight-bit integers, rounded to nearest: what a projection computes when its weights and its inputs are both quantised (W8A8).

Symmetric quantisation: a range is cut into 255 steps around zero, ``q = round(x / s)`` with ``s = max|x| / 127``. What a range belongs to
is the granularity: one for the whole weight matrix and one for all that a layer reads (``"per_tensor"``, as in Wang et al., ICML 2025,
arXiv 2502.07004, section 6), or one for every output of the matrix and one for every token (``"per_token"``). Ranges of inputs are taken as they come
(dynamic quantisation), over one window of text.

The numbers stay floating-point: a *fake* quantisation, which integers times integers, rescaled, give as well.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Granularity = Literal["per_tensor", "per_token"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
LARGEST = 127
"""The largest of the integers; −128 is left out, so that a range has its zero in the middle."""


def rounded(x: Float[Tensor, "*shape"], dims: tuple[int, ...]) -> Float[Tensor, "*shape"]:
    """What is left of numbers when each range is cut into 255 steps.

    Args:
        x: The numbers.
        dims: The axes that one range runs over; there is one range for every index of the others.

    Returns:
        The numbers rounded, in their own precision; computed in float32 or better.

    Example:
        >>> rounded(torch.tensor([127.0, 1.4, -0.3]), (0,))
        tensor([127.,   1.,  -0.])
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    step = wide.abs().amax(dims, keepdim=True) / LARGEST
    step = torch.where(step > 0, step, torch.ones_like(step))  # nothing but zeros: any step keeps them
    return ((wide / step).round() * step).to(x.dtype)


def rounded_weight(weight: Float[Tensor, "d_out d_in"], granularity: Granularity) -> Float[Tensor, "d_out d_in"]:
    """A matrix of eight-bit integers, rescaled.

    Args:
        weight: The matrix, one row per output.
        granularity: ``"per_tensor"``: one range; ``"per_token"``: one for every output.
    """
    return rounded(weight, (0, 1) if granularity == "per_tensor" else (1,))


def rounded_input(x: Float[Tensor, "*batch d_in"], granularity: Granularity, windows: int) -> Float[Tensor, "*batch d_in"]:
    """What a layer reads, as eight-bit integers, rescaled.

    Args:
        x: The input, of windows one after the other; some models flatten windows and places into one axis.
        granularity: ``"per_tensor"``: one range for each window; ``"per_token"``: one for each token.
        windows: How many windows run at once.
    """
    if granularity == "per_token":
        return rounded(x, (-1,))
    return rounded(x.reshape(windows, -1, x.shape[-1]), (1, 2)).view_as(x)


def w8a8_linear(
    x: Float[Tensor, "*batch d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, "d_out"] | None,
    granularity: Granularity,
    *,
    windows: int = 1,
    scales: Float[Tensor, "d_in"] | None = None,
) -> Float[Tensor, "*batch d_out"]:
    """A linear layer with weights and inputs of eight bits.

    Args:
        x: What it reads.
        weight: Its matrix, one row per output.
        bias: Its bias, which stays as it is.
        granularity: What a range belongs to.
        windows: How many windows of text run at once.
        scales: Of SmoothQuant, for each input channel: inputs are divided and weights multiplied by them before they are rounded.

    Returns:
        What it answers, in the input's precision.

    Example:
        >>> w8a8_linear(torch.ones(1, 2), torch.tensor([[1.0, 0.001]]), None, "per_tensor")
        tensor([[1.]])
    """
    if scales is not None:
        x, weight = divided(x, scales), multiplied(weight, scales)
    return functional.linear(rounded_input(x, granularity, windows), rounded_weight(weight, granularity), bias)


def divided(x: Float[Tensor, "*batch d_in"], scales: Float[Tensor, "d_in"]) -> Float[Tensor, "*batch d_in"]:
    """Inputs with SmoothQuant's scales taken out, in their own precision."""
    return (x / scales.to(x.device)).to(x.dtype)


def multiplied(weight: Float[Tensor, "d_out d_in"], scales: Float[Tensor, "d_in"]) -> Float[Tensor, "d_out d_in"]:
    """A matrix with SmoothQuant's scales folded in, in its own precision."""
    return (weight * scales.to(weight.device)).to(weight.dtype)
