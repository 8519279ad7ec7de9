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

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.linear.inputs import GaussianInput, Inputs, resolve
from sd_lens.linear.moments import activation_moments
from sd_lens.models.weights import FFNWeights


class FFNFit(ABC):
    """A layer's neurons as an affine function of their input: ``h(x) ≈ E[h] + Ã (x − E[x])``.

    Attributes:
        mean_hidden: Expected neuron activations ``E[h]``.
        input_mean: Mean of the layer's input, ``E[x]``.
        method: How the fit was made, in words.
    """

    mean_hidden: Float[Tensor, "d_mlp"]
    input_mean: Float[Tensor, "d_model"]
    method: str

    @abstractmethod
    def mv(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_mlp"]:
        """``Ã`` applied to inputs."""

    @abstractmethod
    def rmv(self, hidden: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_model"]:
        """Its transpose applied to neurons."""

    def to_dense(self) -> Float[Tensor, "d_mlp d_model"]:
        """``Ã`` as a matrix."""
        d = self.input_mean.shape[0]
        return self.mv(torch.eye(d, dtype=self.input_mean.dtype, device=self.input_mean.device)).mT


@dataclass(frozen=True)
class ClosedFormFit(FFNFit):
    """The fit for infinitely many samples: ``Ã = in_coefficient·W_in + gate_coefficient·W_gate``, neuron by neuron.

    Attributes:
        W_in: The input branch's weights.
        in_coefficient: Multiplies the input branch.
        W_gate: The gate branch's weights; None in a plain layer.
        gate_coefficient: Multiplies the gate branch; None in a plain layer.
        mean_hidden: Expected neuron activations ``E[h]``.
        input_mean: Mean of the layer's input, ``E[x]``.
        method: ``"closed form"``, and whether the activation was unknown and integrated by quadrature.
    """

    W_in: Float[Tensor, "d_model d_mlp"]
    in_coefficient: Float[Tensor, "d_mlp"]
    W_gate: Float[Tensor, "d_model d_mlp"] | None
    gate_coefficient: Float[Tensor, "d_mlp"] | None
    mean_hidden: Float[Tensor, "d_mlp"]
    input_mean: Float[Tensor, "d_model"]
    method: str

    def mv(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_mlp"]:
        """``Ã`` applied to inputs."""
        hidden = (x @ self.W_in) * self.in_coefficient
        if self.W_gate is not None and self.gate_coefficient is not None:
            hidden += (x @ self.W_gate) * self.gate_coefficient
        return hidden

    def rmv(self, hidden: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_model"]:
        """Its transpose applied to neurons."""
        x = (hidden * self.in_coefficient) @ self.W_in.mT
        if self.W_gate is not None and self.gate_coefficient is not None:
            x += (hidden * self.gate_coefficient) @ self.W_gate.mT
        return x


# Numbers multiplied at once where neurons' weights are compared: what fits into a processor's cache.
_AT_ONCE = 2**16


class _Spread:
    """Variances and covariances of neurons' pre-activations, ``w_aᵀ Σ w_b``, without a copy of the weights."""

    def __init__(self, inputs: GaussianInput):
        self._cov = inputs.cov
        self._unit = inputs.diagonal and bool((inputs.cov == 1).all())
        self._diagonal = inputs.diagonal

    def covariance(self, a: Tensor, b: Tensor) -> Tensor:
        """One number per column of two matrices, float64."""
        if not self._diagonal:
            chunks = zip(a.split(a.shape[0], dim=1), b.split(a.shape[0], dim=1), strict=True)
            return torch.cat([(left * (self._cov @ right)).sum(0) for left, right in chunks]).double()
        columns = max(1, _AT_ONCE // a.shape[0])
        # One buffer, laid out as the weights are: asking the system for memory for every chunk takes as long as the products.
        buffer = a.new_empty(columns, a.shape[0]).mT if a.stride(0) == 1 else a.new_empty(a.shape[0], columns)
        result = a.new_empty(a.shape[1])
        for left, right, out in zip(a.split(columns, dim=1), b.split(columns, dim=1), result.split(columns), strict=True):
            product = torch.mul(left, right, out=buffer[:, : left.shape[1]])
            if not self._unit:
                product.mul_(self._cov.unsqueeze(-1))
            torch.sum(product, dim=0, out=out)
        return result.double()

    def variance(self, a: Tensor) -> Tensor:
        """One number per column, float64."""
        if self._unit and a.stride(0) == 1:  # as long as a pass over memory takes; along the other axis it would be 30 times that
            return torch.linalg.vector_norm(a, dim=0).double().square()
        return self.covariance(a, a)


def fit_ffn(ffn: FFNWeights, *, inputs: Inputs = "unit") -> ClosedFormFit:
    """Fits a feed-forward layer's neurons to Gaussian input, in closed form.

    Args:
        ffn: The layer, in float32 or float64.
        inputs: ``"unit"`` for the paper's ``x ~ N(0, I)`` at the projections; ``"gain"`` for ``N(0, I)`` before the norm's gain
            and bias, that is ``x ~ N(bias, diag(gain²))``; or a `GaussianInput`.

    Returns:
        The fit, in the layer's dtype.

    Raises:
        ValueError: ``inputs`` is none of these, or has another width.

    Example:
        >>> from sd_lens.models.loading import load, weights_of
        >>> fit_ffn(weights_of(load("tiny"))[0].ffn).in_coefficient.shape
        torch.Size([344])
    """
    x = resolve(inputs, ffn.norm, ffn.W_in, ffn.W_in.shape[0])
    spread = _Spread(x)
    centred = not bool(x.mean.any())

    def branch_mean(weight: Tensor, bias: Tensor | None) -> Tensor:
        mean = weight.new_zeros(weight.shape[1]) if centred else x.mean @ weight
        return (mean if bias is None else mean + bias).double()

    dtype = ffn.W_in.dtype
    known = ffn.activation.name != "other"
    method = "closed form" if known else "closed form, the unknown activation's moments by quadrature on its values"
    in_mean = branch_mean(ffn.W_in, ffn.b_in)
    if ffn.W_gate is None:
        moments = activation_moments(ffn.activation, in_mean, spread.variance(ffn.W_in).clamp(min=0).sqrt())
        return ClosedFormFit(ffn.W_in, moments.slope.to(dtype), None, None, moments.value.to(dtype), x.mean, method)
    gate_mean = branch_mean(ffn.W_gate, ffn.b_gate)
    std = spread.variance(ffn.W_gate).clamp(min=1e-12).sqrt()
    r = spread.covariance(ffn.W_gate, ffn.W_in) / std
    moments = activation_moments(ffn.activation, gate_mean, std)
    gate = in_mean * moments.slope + r * moments.slope_z
    mean_hidden = in_mean * moments.value + r * std * moments.slope
    return ClosedFormFit(ffn.W_in, moments.value.to(dtype), ffn.W_gate, gate.to(dtype), mean_hidden.to(dtype), x.mean, method)
