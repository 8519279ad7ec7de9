"""The closed-form fit against fits to samples and against integrals without derivatives."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from dense import ffn_fit
from layers import random_block

from sd_lens.linear.gaussian import fit_ffn
from sd_lens.linear.inputs import GaussianInput
from sd_lens.models.activations import KNOWN, Activation


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
    one, other = fit_ffn(bare, inputs="gain"), fit_ffn(bare, inputs="unit")
    assert torch.equal(one.gate_coefficient, other.gate_coefficient)
    assert torch.equal(one.mean_hidden, other.mean_hidden)


def test_coefficients_have_the_layers_dtype_and_float32_is_close_to_float64():
    fine, coarse = (fit_ffn(random_block(dtype=dtype).ffn) for dtype in (torch.float64, torch.float32))
    for name in ("in_coefficient", "gate_coefficient", "mean_hidden", "input_mean"):
        a, b = getattr(fine, name), getattr(coarse, name)
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
    with pytest.raises(ValueError, match="inputs: got 'measured'; allowed: 'unit', 'gain' or a GaussianInput"):
        fit_ffn(random_block().ffn, inputs="measured")


def _covariance(d, seed):
    factor = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / d**0.5
    return factor @ factor.mT + 0.1 * torch.eye(d, dtype=torch.float64)


def _in_unit_coordinates(ffn, mean, root):
    """The same layer as a function of ``z`` with ``x = mean + root z``, ``z ~ N(0, I)``."""

    def moved(weight, bias):
        return None if weight is None else (0 if bias is None else bias) + mean @ weight

    gate = None if ffn.W_gate is None else root.mT @ ffn.W_gate
    return replace(
        ffn,
        W_in=root.mT @ ffn.W_in,
        W_gate=gate,
        b_in=moved(ffn.W_in, ffn.b_in),
        b_gate=moved(ffn.W_gate, ffn.b_gate),
    )


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("activation", KNOWN)
@pytest.mark.parametrize("gated", [True, False])
def test_any_gaussian_is_the_unit_one_in_other_coordinates(activation, gated, diagonal):
    d = 10
    ffn = random_block(activation=activation, gated=gated, seed=3).ffn
    mean = torch.linspace(-1, 1, d, dtype=torch.float64)
    cov = torch.linspace(0.2, 3, d, dtype=torch.float64) if diagonal else _covariance(d, 5)
    root = torch.diag(cov.sqrt()) if diagonal else torch.linalg.cholesky(cov)
    fit = fit_ffn(ffn, inputs=GaussianInput(mean, cov))
    wanted = ffn_fit(_in_unit_coordinates(ffn, mean, root)) @ torch.linalg.inv(root)
    torch.testing.assert_close(fit.to_dense(), wanted, rtol=1e-8, atol=1e-10)
    assert torch.equal(fit.input_mean, mean)
    moved = fit_ffn(_in_unit_coordinates(ffn, mean, root))
    torch.testing.assert_close(fit.mean_hidden, moved.mean_hidden, rtol=1e-9, atol=1e-12)


def test_a_full_covariance_that_is_diagonal_says_the_same():
    ffn = random_block(seed=3).ffn
    mean, variances = torch.linspace(-1, 1, 10).double(), torch.linspace(0.2, 3, 10).double()
    one, other = (fit_ffn(ffn, inputs=GaussianInput(mean, cov)) for cov in (variances, torch.diag(variances)))
    torch.testing.assert_close(one.to_dense(), other.to_dense(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("inputs", ["unit", "gain"])
def test_the_layout_in_memory_and_the_chunks_make_no_difference(layout, inputs, monkeypatch):
    ffn = random_block(d_mlp=23, seed=1).ffn
    wanted = fit_ffn(ffn, inputs=inputs)
    arranged = {
        name: getattr(ffn, name).clone() if layout == "rows" else getattr(ffn, name).mT.contiguous().mT
        for name in ("W_in", "W_gate")
    }
    assert (arranged["W_in"].stride(0) == 1) == (layout == "columns")
    monkeypatch.setattr("sd_lens.linear.gaussian._AT_ONCE", 40)
    fit = fit_ffn(replace(ffn, **arranged), inputs=inputs)
    for name in ("in_coefficient", "gate_coefficient", "mean_hidden"):
        torch.testing.assert_close(getattr(fit, name), getattr(wanted, name), rtol=1e-12, atol=1e-14)


def test_a_fit_says_how_it_was_made():
    ffn = random_block().ffn
    assert fit_ffn(ffn).method == "closed form"
    odd = fit_ffn(replace(ffn, activation=Activation("other", torch.tanh)))
    assert odd.method == "closed form, the unknown activation's moments by quadrature on its values"


def test_a_gaussian_of_another_width_is_refused():
    with pytest.raises(ValueError, match="inputs: got a Gaussian of width 9; allowed: the model's width, 10"):
        fit_ffn(random_block().ffn, inputs=GaussianInput(torch.zeros(9), torch.ones(9)))
