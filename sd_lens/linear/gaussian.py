"""The best linear approximation of a feed-forward layer under Gaussian input, in closed form.

Wang et al., *Demystifying Singular Defects in Large Language Models* (ICML 2025, arXiv 2502.07004) fit a matrix to samples
``(x, h(x))`` with ``x ~ N(0, I)`` and ``h(x) = act(W_gate x) * (W_up x)``. By Stein's lemma the fit for infinitely many samples is
the expected Jacobian, which needs one-dimensional Gaussian integrals of the activation only, one set per neuron. For input
``N(μ, Σ)`` let the gate's pre-activation be ``a = m + s z`` with ``z ~ N(0, 1)``, ``m = w_g·μ + b_g``, ``s² = w_gᵀΣw_g``; let the
linear branch have mean ``m_u = w_u·μ + b_u`` and ``r = w_gᵀΣw_u / s``. Then neuron ``i`` of the fit is

    gated:  (m_u E[act'(a)] + r E[z act'(a)]) w_g + E[act(a)] w_u,     value  m_u E[act(a)] + r E[z act(a)]
    plain:  E[act'(a)] w,                                              value  E[act(a)]

so the fit is two coefficients per neuron beside weights that exist already: nothing of size d_model × d_mlp is formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.models.activations import Activation
from sd_lens.models.weights import FFNWeights, NormWeights

Inputs = Literal["unit", "gain"]


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
_NODES, _NODE_WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(64))


def _pdf(t: Tensor) -> Tensor:
    return torch.exp(-0.5 * t * t) / math.sqrt(2 * math.pi)


def _relu_moments(mean: Tensor, std: Tensor) -> ActivationMoments:
    t = mean / std
    cdf, pdf = torch.special.ndtr(t), _pdf(t)
    return ActivationMoments(mean * cdf + std * pdf, cdf, pdf)


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

    ReLU and GELU (erf) have exact formulas. SiLU and GELU (tanh) are integrated as ReLU plus a difference that vanishes away from
    0, which keeps 12 digits for narrow and wide Gaussians alike. An unknown activation is integrated as it is.

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
    if activation.name == "relu":
        return _relu_moments(mean, std)
    if activation.name == "gelu":
        return _gelu_moments(mean, std)
    if activation.name == "other":
        value, first, second = _quadrature(activation.fn, mean, std, math.inf)
        return ActivationMoments(value, first / std, second / std)
    relu = _relu_moments(mean, std)
    value, first, second = _quadrature(lambda a: activation(a) - torch.relu(a), mean, std, _RELU_BEYOND)
    return ActivationMoments(relu.value + value, relu.slope + first / std, relu.slope_z + second / std)


class FFNFit(NamedTuple):
    """The linear fit of a feed-forward layer's neurons: ``hidden ≈ gate_coefficient·(x W_gate) + in_coefficient·(x W_in) + const``.

    Attributes:
        gate_coefficient: Multiplies the gate branch; None in a plain layer.
        in_coefficient: Multiplies the input branch.
        mean_hidden: Expected neuron activations ``E[h(x)]``.
        input_mean: Mean of the layer's input, ``E[x]``.
    """

    gate_coefficient: Float[Tensor, "d_mlp"] | None
    in_coefficient: Float[Tensor, "d_mlp"]
    mean_hidden: Float[Tensor, "d_mlp"]
    input_mean: Float[Tensor, "d_model"]


@dataclass(frozen=True)
class _Moments:
    """Mean and diagonal covariance of an FFN's input, in float32 or better."""

    mean: Tensor
    variance: Tensor


def _input_moments(norm: NormWeights | None, d_model: int, inputs: Inputs, like: Tensor) -> _Moments:
    zeros, ones = (
        torch.zeros(d_model, dtype=like.dtype, device=like.device),
        torch.ones(d_model, dtype=like.dtype, device=like.device),
    )
    if inputs == "unit" or norm is None:
        return _Moments(zeros, ones)
    bias = zeros if norm.bias is None else norm.bias.to(like)
    return _Moments(bias, norm.gain.to(like) ** 2)


def fit_ffn(ffn: FFNWeights, *, inputs: Inputs = "unit") -> FFNFit:
    """Fits a feed-forward layer's neurons to Gaussian input, in closed form.

    Args:
        ffn: The layer, in float32 or float64.
        inputs: ``"unit"`` for the paper's ``x ~ N(0, I)`` at the projections; ``"gain"`` for ``N(0, I)`` before the norm's gain
            and bias, that is ``x ~ N(bias, diag(gain²))``.

    Returns:
        The fit's coefficients, in the layer's dtype.

    Raises:
        ValueError: ``inputs`` is not one of the two.

    Example:
        >>> from sd_lens.models.loading import load, weights_of
        >>> fit_ffn(weights_of(load("tiny"))[0].ffn).in_coefficient.shape
        torch.Size([344])
    """
    if inputs not in ("unit", "gain"):
        raise ValueError(f"inputs: got {inputs!r}; allowed: 'unit', 'gain'")
    x = _input_moments(ffn.norm, ffn.W_in.shape[0], inputs, ffn.W_in)

    def branch_mean(weight: Tensor, bias: Tensor | None) -> Tensor:
        return x.mean @ weight if bias is None else x.mean @ weight + bias

    def covariance(a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("dn,d,dn->n", a, x.variance, b).double()

    dtype = ffn.W_in.dtype
    in_mean = branch_mean(ffn.W_in, ffn.b_in).double()
    if ffn.W_gate is None:
        moments = activation_moments(ffn.activation, in_mean, covariance(ffn.W_in, ffn.W_in).sqrt())
        return FFNFit(None, moments.slope.to(dtype), moments.value.to(dtype), x.mean)
    gate_mean = branch_mean(ffn.W_gate, ffn.b_gate)
    std = covariance(ffn.W_gate, ffn.W_gate).sqrt().clamp(min=1e-6)
    r = covariance(ffn.W_gate, ffn.W_in) / std
    moments = activation_moments(ffn.activation, gate_mean, std)
    gate = in_mean * moments.slope + r * moments.slope_z
    mean_hidden = in_mean * moments.value + r * std * moments.slope
    return FFNFit(gate.to(dtype), moments.value.to(dtype), mean_hidden.to(dtype), x.mean)
