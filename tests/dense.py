"""Linear maps of a block as float64 matrices, for column vectors, by formulas of their own.

The FFN's fit is written as ``E[x h(x)]`` with the input split along and across the gate's weights: no derivative of the
activation occurs, and the integrals are sums over a fine grid, which for smooth functions are exact to rounding.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_Z = torch.linspace(-12.0, 12.0, 4097, dtype=torch.float64)
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(200)
_WEIGHT = torch.exp(-0.5 * _Z**2) * float(_Z[1] - _Z[0]) / math.sqrt(2 * math.pi)


def norm_matrix(norm, d: int) -> Tensor:
    """A norm without its division and bias."""
    if norm is None:
        return torch.eye(d, dtype=torch.float64)
    centering = torch.eye(d, dtype=torch.float64) - (1.0 / d if norm.kind == "layer" else 0.0)
    return torch.diag(norm.gain.double()) @ centering


def _behind(layer, d: int, post_scale: float) -> Tensor:
    """What becomes of a sublayer's output before it joins the stream."""
    scale = 1.0 if layer.post_norm is None else post_scale
    return layer.output_scale * norm_matrix(layer.post_norm, d) / scale


def attention_matrix(attention, post_scale: float = 1.0) -> Tensor:
    """Attention of a token that attends only to itself."""
    d = attention.W_O.shape[-1]
    per_group = attention.W_O.shape[0] // attention.W_V.shape[0]
    heads = [output.double().T @ attention.W_V[head // per_group].double().T for head, output in enumerate(attention.W_O)]
    return _behind(attention, d, post_scale) @ torch.stack(heads).sum(0) @ norm_matrix(attention.norm, d)


def _moments(activation, mean: float, std: float) -> tuple[float, float, float]:
    """``E[g]``, ``E[z g]``, ``E[z² g]`` for ``g = act(mean + std z)``."""
    if activation.name == "relu":  # the grid would smear its kink
        t = mean / std
        cdf, pdf = 0.5 * math.erfc(-t / math.sqrt(2)), math.exp(-0.5 * t * t) / math.sqrt(2 * math.pi)
        return mean * cdf + std * pdf, std * cdf, mean * (cdf - t * pdf) + std * pdf * (t * t + 2)
    if activation.name == "relu2":  # the same, to all digits on either side of the kink
        kink = min(max(-mean / std, -12.0), 12.0)
        half = (12.0 - kink) / 2
        z = kink + half * (1 + torch.from_numpy(_NODES))
        weighted = (
            half * torch.from_numpy(_NODE_WEIGHTS) * torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi) * activation(mean + std * z)
        )
        return float(weighted.sum()), float((weighted * z).sum()), float((weighted * z**2).sum())
    weighted = _WEIGHT * activation(mean + std * _Z)
    return float(weighted.sum()), float((weighted * _Z).sum()), float((weighted * _Z**2).sum())


def _number(bias: Tensor | None, neuron: int) -> float:
    return 0.0 if bias is None else float(bias[neuron])


def ffn_fit(ffn) -> Tensor:
    """``(d_mlp, d_model)``: the neurons' best linear fit for input ``N(0, I)``."""
    rows = []
    for neuron in range(ffn.W_in.shape[1]):
        up = ffn.W_in[:, neuron].double()
        if ffn.W_gate is None:
            _, first, _ = _moments(ffn.activation, _number(ffn.b_in, neuron), float(up.norm()))
            rows.append(first * up / up.norm())
            continue
        gate = ffn.W_gate[:, neuron].double()
        zeroth, first, second = _moments(ffn.activation, _number(ffn.b_gate, neuron), float(gate.norm()))
        unit = gate / gate.norm()
        along = unit @ up
        rows.append((_number(ffn.b_in, neuron) * first + along * second) * unit + zeroth * (up - along * unit))
    return torch.stack(rows)


def ffn_matrix(ffn, post_scale: float = 1.0, router: Tensor | None = None) -> Tensor:
    """The FFN through its fit; a mixture through its experts' fits, at mean router weights."""
    if not hasattr(ffn, "experts"):
        d = ffn.W_out.shape[1]
        return _behind(ffn, d, post_scale) @ ffn.W_out.double().T @ ffn_fit(ffn) @ norm_matrix(ffn.norm, d)
    router = torch.full((len(ffn.experts),), 1 / len(ffn.experts), dtype=torch.float64) if router is None else router
    total = sum(float(weight) * ffn_matrix(expert) for weight, expert in zip(router, ffn.experts, strict=True))
    if ffn.shared is not None:  # the mean of its gate is a half: the sigmoid of what is symmetric about zero
        total = total + (1.0 if ffn.W_shared_gate is None else 0.5) * ffn_matrix(ffn.shared)
    return _behind(ffn, total.shape[0], post_scale) @ total


def block_matrix(block, post_scales: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """The block with its residual connections."""
    eye = torch.eye(block.d_model, dtype=torch.float64)
    attention, ffn = attention_matrix(block.attention, post_scales[0]), ffn_matrix(block.ffn, post_scales[1])
    return eye + attention + ffn if block.parallel else (eye + ffn) @ (eye + attention)


def angle(a: Tensor, b: Tensor) -> float:
    """Acute angle of two real vectors in degrees, from the length of one's part across the other."""
    a, b = a.double() / a.double().norm(), b.double() / b.double().norm()
    return math.degrees(math.asin(min(1.0, float((a - (a @ b) * b).norm()))))
