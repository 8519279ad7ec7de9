"""The paper's estimator of a feed-forward layer's linear fit: least squares on sampled inputs.

Wang et al. (ICML 2025, arXiv 2502.07004), section 3, draw 100 000 inputs and solve for the matrix that maps them to the neurons'
activations, without an intercept. Here the draws are seeded, and the normal equations are summed chunk by chunk, so that memory does not
grow with the number of samples. It is the second opinion on `sd_lens.linear.gaussian`, whose result it approaches as one over the
square root of the number of samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.linear.gaussian import FFNFit
from sd_lens.linear.inputs import Inputs, resolve, root
from sd_lens.models.weights import FFNWeights

# Numbers held at once for a chunk's inputs and activations.
_CHUNK = 2**25


@dataclass(frozen=True)
class SampledFit(FFNFit):
    """A fit to samples: a matrix of its own.

    Attributes:
        matrix: ``Ã`` transposed.
        mean_hidden: Mean neuron activations of the samples.
        input_mean: Mean that the samples were drawn around.
        method: How many samples, and the seed.
    """

    matrix: Float[Tensor, "d_model d_mlp"]
    mean_hidden: Float[Tensor, "d_mlp"]
    input_mean: Float[Tensor, "d_model"]
    method: str

    def mv(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_mlp"]:
        """``Ã`` applied to inputs."""
        return x @ self.matrix

    def rmv(self, hidden: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_model"]:
        """Its transpose applied to neurons."""
        return hidden @ self.matrix.mT


def require_samples(samples: int, d_model: int) -> None:
    """Raises `ValueError` where there are too few samples for the regression to be well determined."""
    if samples < 2 * d_model:
        raise ValueError(
            f"samples: got {samples}; allowed: at least 2 * d_model = {2 * d_model}, for the regression to be determined"
        )


def sample_fit(ffn: FFNWeights, *, inputs: Inputs = "unit", samples: int = 100_000, seed: int = 0) -> SampledFit:
    """Fits a feed-forward layer's neurons to samples of its input.

    Inputs are drawn as ``μ + Σ^½ z`` and activations regressed on ``z`` without an intercept, which is the paper's regression where
    ``μ = 0`` and ``Σ = I``, and as well conditioned for any other Gaussian. Directions in which Σ is zero stay zero in the fit.

    Args:
        ffn: The layer, in float32 or float64.
        inputs: See `sd_lens.linear.gaussian.fit_ffn`.
        samples: How many.
        seed: Seeds the draws, on the device where the layer is.

    Returns:
        The fit. Peak memory beside the layer is twice d_model × d_mlp numbers and a fixed chunk.

    Raises:
        ValueError: There are fewer samples than twice d_model, or ``inputs`` is none of the allowed kinds.

    Example:
        >>> from sd_lens.models.loading import load, weights_of
        >>> sample_fit(weights_of(load("tiny"))[0].ffn, samples=1000).method
        'sampled (1000 samples, seed 0)'
    """
    d, d_mlp = ffn.W_in.shape
    require_samples(samples, d)
    x = resolve(inputs, ffn.norm, ffn.W_in, d)
    spread = root(x)
    layer = replace(ffn, b_hidden=None)  # added to the neurons whatever their input is
    generator = torch.Generator(ffn.W_in.device).manual_seed(seed)
    zz, zh, total = ffn.W_in.new_zeros(d, d), ffn.W_in.new_zeros(d, d_mlp), ffn.W_in.new_zeros(d_mlp, dtype=torch.float64)
    chunk = max(1, _CHUNK // (d + 3 * d_mlp))
    for start in range(0, samples, chunk):
        z = torch.randn(min(chunk, samples - start), d, generator=generator, dtype=ffn.W_in.dtype, device=ffn.W_in.device)
        hidden = layer.hidden(x.mean + spread.times(z))
        zz.addmm_(z.mT, z)
        zh.addmm_(z.mT, hidden)
        total += hidden.sum(0, dtype=torch.float64)
    fitted = torch.cholesky_solve(zh, torch.linalg.cholesky(zz))
    inverse = spread.inverse
    fitted = fitted * inverse.unsqueeze(-1) if x.diagonal else inverse @ fitted
    mean_hidden = (total / samples).to(ffn.W_in.dtype)
    return SampledFit(fitted, mean_hidden, x.mean, f"sampled ({samples} samples, seed {seed})")
