"""Positional encodings against what was published, and against other ways of computing them."""

import math

import pytest
import torch
import torch.nn.functional as F

from sd_lens.propagation.arguments import chosen, require_heads, whole_numbers
from sd_lens.propagation.positions import POSITIONS, alibi_slopes, attention_pattern, rotate, sinusoids


def test_sinusoids_are_those_of_vaswani():
    table = sinusoids(torch.tensor([0, 1, 7, 4000]), 6)
    for row, pos in enumerate([0, 1, 7, 4000]):
        for i in range(3):
            angle = pos / 10_000 ** (2 * i / 6)
            assert table[row, 2 * i] == pytest.approx(math.sin(angle), abs=1e-12)
            assert table[row, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-12)


def test_rotation_is_multiplication_by_complex_numbers_and_relative():
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([0, 1, 2, 40, 999])
    turn = torch.polar(torch.ones(5, 4, dtype=torch.float64), at[:, None] / 10_000 ** (torch.arange(4) / 4).double())
    complex_way = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous()) * turn).flatten(-2)
    assert torch.allclose(rotate(x, at), complex_way, atol=1e-12)
    query, key = x[0, :1], x[1, :1]

    def product(m, n):
        return float((rotate(query, torch.tensor([m])) * rotate(key, torch.tensor([n]))).sum())

    assert product(9, 4) == pytest.approx(product(1005, 1000), abs=1e-10)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-3)


def test_alibi_slopes_are_the_published_ones():
    assert alibi_slopes(8).tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert alibi_slopes(16).tolist() == pytest.approx([2 ** (-0.5 * h) for h in range(1, 17)])
    assert alibi_slopes(12).tolist() == pytest.approx([2.0**-h for h in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])
    assert alibi_slopes(1).tolist() == [1 / 256]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_patterns_are_those_of_torch(positions, causal):
    queries, keys = torch.randn(2, 2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    at = torch.arange(6)
    bias = torch.zeros(2, 6, 6, dtype=torch.float64)
    if positions == "alibi":
        bias = bias - torch.tensor([2.0**-4, 2.0**-8])[:, None, None] * (at[:, None] - at).abs()
    if causal:
        bias = bias + torch.full((6, 6), -math.inf, dtype=torch.float64).triu(1)
    placed = [rotate(x, at) if positions == "rope" else x for x in (queries, keys)]
    identity = torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    reference = F.scaled_dot_product_attention(*placed, identity, attn_mask=bias)
    assert torch.allclose(attention_pattern(queries, keys, at, at, positions=positions, causal=causal), reference, atol=1e-12)


def test_arguments_are_checked():
    assert whole_numbers("lengths", [8, 2, 8], 1) == (2, 8)
    for bad in ([], "12", 4, [0], [1.5], [True], None):
        with pytest.raises(ValueError, match="lengths: got"):
            whole_numbers("lengths", bad, 1)
    with pytest.raises(ValueError, match="allowed: even numbers from 2"):
        whole_numbers("length", [3], 2, even=True)
    with pytest.raises(ValueError, match="positions: got 'learned'; allowed: nope, sinusoidal, rope, alibi"):
        chosen("positions", ["learned"], tuple(POSITIONS))
    require_heads(3, 12)
    with pytest.raises(ValueError, match="n_heads: got 4 at d_model 12"):
        require_heads(4, 12)
