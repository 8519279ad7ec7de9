"""Gaussian expectations of activation functions: the one-dimensional integrals that the fit of a feed-forward layer is made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.models.activations import Activation


class ActivationMoments(NamedTuple):
    """Gaussian expectations of an activation, for ``a = mean + std·z`` and ``z ~ N(0, 1)``.

    Attributes:
        value: ``E[act(a)]``.
        slope: ``E[act'(a)]``; by Stein's lemma also ``E[z act(a)] / std``.
        slope_z: ``E[z act'(a)]``.
    """

    value: Float[Tensor, "n"]
    slope: Float[Tensor, "n"]
    slope_z: Float[Tensor, "n"]


# Beyond this many standard deviations a Gaussian weighs less than float64's rounding.
_REACH = 9.0
# silu, the slowest of the known functions to get there, differs from relu by less than 1e-15 beyond this.
_RELU_BEYOND = 40.0
# Neurons integrated at once: their nodes fit into a processor's cache, which makes the integrals twice as fast.
_AT_ONCE = 512
_NODES, _NODE_WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(64))


def _pdf(t: Tensor) -> Tensor:
    return torch.exp(-0.5 * t * t) / math.sqrt(2 * math.pi)


def _relu_moments(mean: Tensor, std: Tensor) -> ActivationMoments:
    t = mean / std
    cdf, pdf = torch.special.ndtr(t), _pdf(t)
    return ActivationMoments(mean * cdf + std * pdf, cdf, pdf)


def _relu2_moments(mean: Tensor, std: Tensor) -> ActivationMoments:
    relu = _relu_moments(mean, std)
    value = (mean * mean + std * std) * relu.slope + mean * std * relu.slope_z
    return ActivationMoments(value, 2 * relu.value, 2 * std * relu.slope)


def _gelu_moments(mean: Tensor, std: Tensor) -> ActivationMoments:
    # gelu(a) = a Φ(a), and E[Φ(a)] = Φ(mean / q) with q² = 1 + std²; the slopes are derivatives of the value by the mean.
    q = torch.sqrt(1 + std * std)
    t = mean / q
    cdf, pdf = torch.special.ndtr(t), _pdf(t)
    value = mean * cdf + std * std / q * pdf
    slope = cdf + t * pdf / (q * q)
    curvature = pdf / q * (1 + (1 - t * t) / (q * q))
    return ActivationMoments(value, slope, std * curvature)


def _quadrature(fn, mean: Tensor, std: Tensor, reach: float) -> tuple[Tensor, Tensor, Tensor]:
    """``E[f]``, ``E[z f]`` and ``E[(z² − 1) f]`` of a function of ``a``, restricted to ``|a| ≤ reach``.

    Gauss-Legendre on the two panels below and above 0, because that is where rectified functions have their kink.
    """
    lower, upper = (mean - _REACH * std).clamp(min=-reach), (mean + _REACH * std).clamp(max=reach)
    totals = [torch.zeros_like(mean) for _ in range(3)]
    nodes, weights = _NODES.to(mean.device), _NODE_WEIGHTS.to(mean.device)
    for start, stop in ((lower, upper.clamp(max=0.0)), (lower.clamp(min=0.0), upper)):
        half = ((stop - start) / 2).clamp(min=0.0).unsqueeze(-1)
        a = (start + stop).unsqueeze(-1) / 2 + half * nodes
        z = (a - mean.unsqueeze(-1)) / std.unsqueeze(-1)
        weighted = fn(a) * _pdf(z) / std.unsqueeze(-1) * half * weights
        for total, factor in zip(totals, (1.0, z, z * z - 1), strict=True):
            total += (weighted * factor).sum(-1)
    return totals[0], totals[1], totals[2]


def activation_moments(activation: Activation, mean: Float[Tensor, "n"], std: Float[Tensor, "n"]) -> ActivationMoments:
    """Gaussian expectations of an activation, one per neuron, in float64.

    ReLU, its square and GELU (erf) have exact formulas. SiLU, GELU (tanh) and quick GELU are integrated as ReLU plus a difference
    that vanishes away from 0, which keeps 12 digits for narrow and wide Gaussians alike. An unknown activation is integrated as it
    is, to fewer digits where it bends sharply away from 0.

    Args:
        activation: The function.
        mean: Mean of the pre-activation.
        std: Standard deviation of the pre-activation, positive.

    Returns:
        The three moments.

    Example:
        >>> from sd_lens.models.activations import KNOWN
        >>> one = torch.ones(1)
        >>> round(activation_moments(KNOWN["relu"], 0 * one, one).value.item(), 6)  # 1 / sqrt(2 pi)
        0.398942
    """
    # A neuron without weights has a constant pre-activation: a very narrow Gaussian gives its value and slope.
    mean, std = mean.double(), std.double().clamp(min=1e-6)
    exact = _EXACT.get(activation.name)
    if exact is not None:
        return exact(mean, std)
    parts = [_integrated(activation, m, s) for m, s in zip(mean.split(_AT_ONCE), std.split(_AT_ONCE), strict=True)]
    return ActivationMoments(*(torch.cat(column) for column in zip(*parts, strict=True)))


_EXACT = {"relu": _relu_moments, "relu2": _relu2_moments, "gelu": _gelu_moments}


def _evaluated(fn: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
    """An unknown function's values, in float32 where it does not know float64."""
    try:
        return fn(a.clone()).double()  # a copy: some work in place
    except RuntimeError:
        return fn(a.float()).double()


def _integrated(activation: Activation, mean: Tensor, std: Tensor) -> ActivationMoments:
    if activation.name == "other":
        value, first, second = _quadrature(lambda a: _evaluated(activation.fn, a), mean, std, math.inf)
        return ActivationMoments(value, first / std, second / std)
    relu = _relu_moments(mean, std)
    value, first, second = _quadrature(lambda a: activation(a) - torch.relu(a), mean, std, _RELU_BEYOND)
    return ActivationMoments(relu.value + value, relu.slope + first / std, relu.slope_z + second / std)
