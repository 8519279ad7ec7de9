"""The closed-form fit against adaptive quadrature and against fits to samples."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from layers import random_block
from scipy.integrate import quad

from sd_lens.linear.gaussian import activation_moments, fit_ffn
from sd_lens.models.activations import KNOWN, Activation, identify

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
    "relu": lambda a: max(a, 0.0),
    "silu": lambda a: a / (1 + math.exp(-a)) if a > -700 else 0.0,
    "gelu": lambda a: 0.5 * a * math.erfc(-a / math.sqrt(2)),
    "gelu_tanh": lambda a: 0.5 * a * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))),
}
SLOPES = {"relu": lambda a: float(a > 0), "silu": _silu_slope, "gelu": _gelu_slope, "gelu_tanh": _gelu_tanh_slope}


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
        (lambda x: torch.relu(x) ** 2, lambda a: max(a, 0.0) ** 2, lambda a: 2 * max(a, 0.0)),
        (torch.tanh, math.tanh, lambda a: 1 - math.tanh(a) ** 2),
        (lambda x: x**3, lambda a: a**3, lambda a: 3 * a * a),
    ],
    ids=["relu squared", "tanh", "cube"],
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


def _sampled(ffn, inputs, samples, seed):
    """Least squares with an intercept: slopes (d_mlp, d_model) and mean activations, from samples."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((samples, ffn.W_in.shape[0])))
    if inputs == "gain":
        x = x * ffn.norm.gain + ffn.norm.bias
    hidden = replace(ffn, b_hidden=None).hidden(x)
    design = torch.cat([x - x.mean(0), torch.ones(samples, 1, dtype=x.dtype)], dim=1)
    solution = torch.linalg.lstsq(design, hidden).solution
    return solution[:-1].T, solution[-1]


@pytest.mark.parametrize("inputs", ["unit", "gain"])
@pytest.mark.parametrize(
    ("gated", "activation", "biases"),
    [(True, "silu", False), (True, "gelu_tanh", True), (False, "gelu", True), (False, "relu", False), (True, "relu", True)],
)
def test_fits_to_samples_converge_to_the_closed_form(gated, activation, biases, inputs):
    # Biases of the norm are always there: they are what "gain" is about.
    block = random_block(d_model=6, d_mlp=12, gated=gated, activation=activation, kind="layer", seed=4)
    without = {} if biases else {"b_in": None, "b_gate": None}
    ffn = replace(block.ffn, W_in=2 * block.ffn.W_in, **without)
    fit = fit_ffn(ffn, inputs=inputs)
    slopes = fit.in_coefficient * ffn.W_in
    if gated:
        slopes = slopes + fit.gate_coefficient * ffn.W_gate

    errors = []
    for samples in (2_000, 8_000, 32_000):
        squares = []
        for seed in range(24):
            sampled_slopes, sampled_means = _sampled(ffn, inputs, samples, seed)
            of_slopes = (sampled_slopes - slopes.T).norm() / slopes.norm()
            of_means = (sampled_means - fit.mean_hidden).norm() / fit.mean_hidden.norm()
            squares.append((float(of_slopes) ** 2, float(of_means) ** 2))
        errors.append(np.sqrt(np.mean(squares, axis=0)))
    of_slopes, of_means = np.array(errors).T
    assert of_slopes[2] < 0.05
    assert of_means[2] < 0.03
    # Four times the samples halve the error. The means' is dominated by few numbers and scatters more.
    assert all(1.7 < ratio < 2.35 for ratio in of_slopes[:2] / of_slopes[1:]), of_slopes
    assert all(1.4 < ratio < 2.9 for ratio in of_means[:2] / of_means[1:]), of_means
    assert 2.8 < of_means[0] / of_means[2] < 5.7, of_means


def test_the_inputs_mean_is_the_norms_bias_or_zero():
    ffn = random_block(kind="layer").ffn
    assert torch.equal(fit_ffn(ffn, inputs="gain").input_mean, ffn.norm.bias)
    assert not fit_ffn(ffn, inputs="unit").input_mean.any()
    bare = replace(ffn, norm=None)
    for one, other in zip(fit_ffn(bare, inputs="gain"), fit_ffn(bare, inputs="unit"), strict=True):
        assert torch.equal(one, other)


def test_coefficients_have_the_layers_dtype_and_float32_is_close_to_float64():
    fine, coarse = (fit_ffn(random_block(dtype=dtype).ffn) for dtype in (torch.float64, torch.float32))
    for a, b in zip(fine, coarse, strict=True):
        assert (a.dtype, b.dtype) == (torch.float64, torch.float32)
        torch.testing.assert_close(a.float(), b, rtol=1e-5, atol=1e-6)


def test_a_linear_activation_is_fitted_exactly():
    # act(a) = a makes a gated neuron (w_g x + b_g)(w_u x + b_u), whose expected gradient is b_u w_g + b_g w_u.
    ffn = replace(random_block(d_mlp=5).ffn, activation=Activation("other", lambda x: x))
    fit = fit_ffn(ffn)
    torch.testing.assert_close(fit.gate_coefficient, ffn.b_in, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fit.in_coefficient, ffn.b_gate, rtol=1e-9, atol=1e-9)
    covariance = (ffn.W_gate * ffn.W_in).sum(0)
    torch.testing.assert_close(fit.mean_hidden, ffn.b_in * ffn.b_gate + covariance, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("as_users_run_it")
def test_unknown_inputs_are_refused():
    with pytest.raises(ValueError, match="inputs: got 'measured'; allowed: 'unit', 'gain'"):
        fit_ffn(random_block().ffn, inputs="measured")
