"""Gaussian moments of activations against adaptive quadrature."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from sd_lens.linear.moments import activation_moments
from sd_lens.models.activations import KNOWN, identify

GRID = [(mean, std) for mean in (-6.0, -0.7, 0.0, 0.3, 4.0, 30.0) for std in (1e-4, 0.02, 0.5, 1.0, 5.0, 300.0)]


# Where an integral is as good as zero, quad says that it could not get all the digits asked for.
pytestmark = pytest.mark.filterwarnings("ignore:The occurrence of roundoff")


def _quad(f, mean, std):
    """``E[f(a, z)]`` to 12 digits: adaptive, told where the integrand bends."""

    def integrand(z):
        return f(mean + std * z, z) * math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)

    bends = sorted({z for a in (-40.0, -6.0, -1.0, 0.0, 1.0, 6.0, 40.0) if abs(z := (a - mean) / std) < 12})
    edges = [-12.0, *bends, 12.0]
    pieces = [quad(integrand, a, b, epsabs=0, epsrel=1e-13, limit=400)[0] for a, b in itertools.pairwise(edges)]
    return math.fsum(pieces)


def _slope_of(activation):
    """The derivative in one point, by automatic differentiation."""

    def slope(a):
        x = torch.tensor(a, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(activation(x), x)[0].item()

    return slope


def _gelu_tanh_slope(a):
    c, k = math.sqrt(2 / math.pi), 0.044715
    t = math.tanh(c * (a + k * a**3))
    return 0.5 * (1 + t) + 0.5 * a * (1 - t * t) * c * (1 + 3 * k * a * a)


def _silu_slope(a):
    s = 1 / (1 + math.exp(-a)) if a > -700 else 0.0
    return s + a * s * (1 - s)


def _gelu_slope(a):
    return 0.5 * math.erfc(-a / math.sqrt(2)) + a * math.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)


VALUES = {
    "relu2": lambda a: max(a, 0.0) ** 2,
    "quick_gelu": lambda a: a / (1 + math.exp(-1.702 * a)) if a > -400 else 0.0,
    "relu": lambda a: max(a, 0.0),
    "silu": lambda a: a / (1 + math.exp(-a)) if a > -700 else 0.0,
    "gelu": lambda a: 0.5 * a * math.erfc(-a / math.sqrt(2)),
    "gelu_tanh": lambda a: 0.5 * a * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))),
}
SLOPES = {
    "relu": lambda a: float(a > 0),
    "relu2": lambda a: 2 * max(a, 0.0),
    "silu": _silu_slope,
    "quick_gelu": lambda a: _silu_slope(1.702 * a),
    "gelu": _gelu_slope,
    "gelu_tanh": _gelu_tanh_slope,
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_slopes_of_this_file_are_the_activations_own(name):
    for a in (-3.0, -0.4, 0.9, 5.0):
        assert SLOPES[name](a) == pytest.approx(_slope_of(KNOWN[name])(a), rel=1e-12)


def _moments(activation, grid):
    mean, std = torch.tensor(grid, dtype=torch.float64).T
    return torch.stack(list(activation_moments(activation, mean, std)), dim=-1).tolist()


@pytest.mark.parametrize("name", KNOWN)
def test_moments_of_known_activations(name):
    value, slope = VALUES[name], SLOPES[name]
    for (mean, std), got in zip(GRID, _moments(KNOWN[name], GRID), strict=True):
        wanted = [_quad(f, mean, std) for f in (lambda a, z: value(a), lambda a, z: slope(a), lambda a, z: z * slope(a))]
        assert got[:2] == pytest.approx(wanted[:2], rel=1e-9, abs=1e-12), (mean, std)
        # The third moment enters a fit multiplied by the standard deviation: that product needs the digits.
        assert std * got[2] == pytest.approx(std * wanted[2], rel=1e-9, abs=1e-13), (mean, std)


@pytest.mark.parametrize(
    ("fn", "value", "slope"),
    [
        (torch.sigmoid, lambda a: 1 / (1 + math.exp(-a)), lambda a: 1 / (2 + 2 * math.cosh(a))),
        (torch.tanh, math.tanh, lambda a: 1 - math.tanh(a) ** 2),
        (lambda x: x**3, lambda a: a**3, lambda a: 3 * a * a),
    ],
    ids=["sigmoid", "tanh", "cube"],
)
def test_moments_of_unknown_activations(fn, value, slope):
    grid = [(mean, std) for mean, std in GRID if 0.02 <= std <= 5 and abs(mean) < 10]
    activation = identify(fn)
    assert activation.name == "other"
    for (mean, std), got in zip(grid, _moments(activation, grid), strict=True):
        wanted = [_quad(f, mean, std) for f in (lambda a, z: value(a), lambda a, z: slope(a), lambda a, z: z * slope(a))]
        assert got == pytest.approx(wanted, rel=1e-6, abs=1e-7), (mean, std)


def test_a_neuron_without_weights_is_a_constant():
    for name, activation in KNOWN.items():
        moments = activation_moments(activation, torch.tensor([0.7, -0.7]), torch.zeros(2))
        for i, a in enumerate((0.7, -0.7)):
            assert moments.value[i].item() == pytest.approx(VALUES[name](np.float32(a).item()), rel=1e-6)
            assert moments.slope[i].item() == pytest.approx(SLOPES[name](a), rel=1e-5)


def test_the_example_of_the_documentation():
    moments = activation_moments(KNOWN["relu"], torch.zeros(1), torch.ones(1))
    assert [round(x.item(), 12) for x in moments] == [
        round(1 / math.sqrt(2 * math.pi), 12),
        0.5,
        round(1 / math.sqrt(2 * math.pi), 12),
    ]
