"""Linear maps that stand for the parts of a Llama block, and the directions read off them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers import LlamaForCausalLM

_QUADRATURE_NODES = 80


@torch.no_grad()
def attention_map(model: LlamaForCausalLM, block: int) -> Tensor:
    """Linear map of a block's attention for a token that attends to itself alone.

    Args:
        model: The model.
        block: Index of the block.

    Returns:
        ``W_O W_V diag(gain)``, with the value heads repeated for the query heads that share them.
    """
    layer = model.model.layers[block]
    value = layer.self_attn.v_proj.weight.double()
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    value = value.view(model.config.num_key_value_heads, -1, value.shape[-1]).repeat_interleave(groups, dim=0)
    gain = layer.input_layernorm.weight.double()
    return (layer.self_attn.o_proj.weight.double() @ value.flatten(0, 1)) * gain


@torch.no_grad()
def ffn_map(model: LlamaForCausalLM, block: int) -> Tensor:
    """Linear map of a block's feed-forward layer: its least-squares fit on Gaussian inputs, in closed form.

    By Stein's lemma the fit is the expected Jacobian, one integral over a single Gaussian per neuron.

    Args:
        model: The model.
        block: Index of the block.

    Returns:
        ``W_down A diag(gain)``.
    """
    layer = model.model.layers[block]
    gate, up, down = (getattr(layer.mlp, f"{name}_proj").weight.double() for name in ("gate", "up", "down"))
    nodes, weights = np.polynomial.hermite_e.hermegauss(_QUADRATURE_NODES)
    z = torch.from_numpy(nodes)
    density = torch.from_numpy(weights / math.sqrt(2 * math.pi))
    scale = gate.norm(dim=1)
    overlap = (gate * up).sum(1) / scale
    pre = scale[:, None] * z
    sigmoid = torch.sigmoid(pre)
    slope = sigmoid * (1 + pre * (1 - sigmoid))
    on_gate = overlap * ((slope * z) @ density)
    on_up = silu(pre) @ density
    fit = on_gate[:, None] * gate + on_up[:, None] * up
    return (down @ fit) * layer.post_attention_layernorm.weight.double()


def acute_angle(first: Tensor, second: Tensor) -> float:
    """Angle between two lines.

    Args:
        first: A direction.
        second: Another one.

    Returns:
        Degrees between 0 and 90.
    """
    cosine = torch.dot(first.double(), second.double()) / (first.double().norm() * second.double().norm())
    return math.degrees(math.acos(min(1.0, abs(cosine.item()))))


def leading_left(matrix: Tensor) -> Tensor:
    """Leading left singular vector.

    Args:
        matrix: A matrix.

    Returns:
        The vector.
    """
    return torch.linalg.svd(matrix)[0][:, 0]
