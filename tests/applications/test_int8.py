"""Eight-bit rounding against integers multiplied as integers, and against torch's own fake quantisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sd_lens.applications.int8 import GRANULARITIES, divided, multiplied, rounded, rounded_input, rounded_weight, w8a8_linear


def rand(*shape, seed=0):
    """Random numbers with outliers, whose columns and rows are of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return x * torch.randn(shape[-1], generator=generator).exp() * torch.randn(*shape[:-1], 1, generator=generator).exp()


def integers(x, axis):
    """Numbers as integers from -127 to 127, and their steps."""
    step = np.abs(x).max(axis=axis, keepdims=True) / np.float32(127)
    return np.rint(x / step).astype(np.int8), step


def integer_linear(x, weight, bias, granularity):
    """One window (token, d_in), as a kernel computes it: int8 times int8, summed in int32, then rescaled."""
    q_x, s_x = integers(x.float().numpy(), None if granularity == "per_tensor" else 1)
    q_w, s_w = integers(weight.float().numpy(), None if granularity == "per_tensor" else 1)
    assert abs(q_x).max() == abs(q_w).max() == 127
    sums = q_x.astype(np.int32) @ q_w.astype(np.int32).T
    answer = sums.astype(np.float64) * np.float64(s_x) * np.float64(s_w).T
    return torch.from_numpy(answer) + (0 if bias is None else bias.double())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@given(
    d_in=st.integers(2, 40), d_out=st.integers(2, 40), windows=st.integers(1, 4), flat=st.booleans(), has_bias=st.booleans(),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_integers_multiplied_as_integers(granularity, d_in, d_out, windows, flat, has_bias, seed):
    x, weight = rand(windows, 5, d_in, seed=seed), rand(d_out, d_in, seed=seed + 1)
    bias = rand(1, d_out, seed=seed + 2)[0] if has_bias else None
    wanted = torch.stack([integer_linear(window, weight, bias, granularity) for window in x])
    read = x.flatten(0, 1) if flat else x
    got = w8a8_linear(read, weight, bias, granularity, windows=windows).view_as(wanted)
    scale = x.abs().max() * weight.abs().max() * d_in
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-6 * float(scale))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(granularity, dtype):
    x, weight = (rand(3, 6, 32) / 30).to(dtype), rand(24, 32, seed=1).to(dtype)
    got = w8a8_linear(x, weight, None, granularity, windows=3)
    assert got.dtype == dtype
    wanted = torch.stack([integer_linear(window, weight, None, granularity) for window in x])
    # Inputs, weights and answers are each rounded to the type once.
    allowed = 2 * torch.finfo(dtype).eps * (x.double().abs() @ weight.double().abs().T + wanted.abs())
    assert bool(((got.double() - wanted).abs() <= allowed).all())


def test_torchs_fake_quantisation_agrees():
    weight = rand(24, 32, seed=3)
    step = float(weight.abs().max()) / 127
    torch.testing.assert_close(
        rounded_weight(weight, "per_tensor"), torch.fake_quantize_per_tensor_affine(weight, step, 0, -127, 127), rtol=1e-5, atol=0
    )
    steps = weight.abs().amax(1) / 127
    zeros = torch.zeros(24, dtype=torch.int32)
    wanted = torch.fake_quantize_per_channel_affine(weight, steps, zeros, 0, -127, 127)
    torch.testing.assert_close(rounded_weight(weight, "per_token"), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(rounded_input(weight, "per_token", 1), wanted, rtol=1e-5, atol=0)


def test_each_window_has_its_own_range():
    x = rand(4, 7, 16)
    x[2] *= 1000
    together = rounded_input(x, "per_tensor", 4)
    assert torch.equal(together, torch.stack([rounded_input(window, "per_tensor", 1) for window in x]))
    assert torch.equal(rounded_input(x.flatten(0, 1), "per_tensor", 4), together.flatten(0, 1))
    assert not torch.equal(rounded_input(x, "per_tensor", 1), together)


def test_nothing_but_zeros_stays():
    weight = rand(3, 4)
    weight[1] = 0
    x, bias = torch.zeros(2, 4), torch.tensor([1.0, 2.0, 3.0])
    for granularity in GRANULARITIES:
        assert torch.equal(w8a8_linear(x, weight, bias, granularity), bias.expand(2, 3))
    assert torch.equal(rounded_weight(weight, "per_token")[1], torch.zeros(4))


def test_integers_stay_and_rounding_is_once():
    x = torch.tensor([[127.0, -127.0, 3.0, 0.0], [1.0, -2.0, 126.0, 127.0]])
    assert torch.equal(rounded(x, (0, 1)), x)
    once = rounded_weight(rand(8, 8), "per_token")
    torch.testing.assert_close(rounded_weight(once, "per_token"), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scales_go_from_inputs_to_weights(granularity):
    x, weight, scales = rand(5, 16), rand(8, 16, seed=1), rand(1, 16, seed=2)[0].abs()
    wanted = integer_linear(x / scales, weight * scales, None, granularity)
    got = w8a8_linear(x, weight, None, granularity, scales=scales)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    torch.testing.assert_close(divided(x, scales) @ multiplied(weight, scales).T, x @ weight.T, rtol=1e-4, atol=1e-4)
    half = x.bfloat16()
    assert divided(half, scales).dtype == multiplied(half, scales).dtype == torch.bfloat16
