"""What the linear fit of a feed-forward layer is fitted to: a Gaussian, the paper's or one measured from a model's activations."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import Prompts
from sd_lens.models.weights import NormWeights

Covariance = Literal["diagonal", "full"]
_SCHEMA = "sd_lens.gaussian_input/1"
# A covariance's eigenvalue may be this far below zero, relative to the largest, by rounding alone.
_NEGATIVE = 1e-4


@dataclass(frozen=True, eq=False)
class GaussianInput:
    """A Gaussian that stands for the input of a feed-forward layer, after its norm with gain and bias.

    Attributes:
        mean: Its mean.
        cov: Its covariance, or the diagonal of it.
        n_tokens: How many tokens it was measured on; 0 where it was not measured.

    Raises:
        ValueError: The covariance has another width than the mean, is not symmetric, or has negative variances; an entry is NaN or
            infinite.

    Example:
        >>> GaussianInput(torch.zeros(3), torch.tensor([1.0, 4.0, 9.0]))
        GaussianInput(d_model=3, diagonal covariance)
    """

    mean: Float[Tensor, "d_model"]
    cov: Float[Tensor, "d_model"] | Float[Tensor, "d_model d_model"]
    n_tokens: int = 0

    def __post_init__(self) -> None:
        for name, value in (("mean", self.mean), ("cov", self.cov)):
            if not isinstance(value, Tensor) or value.ndim == 0 or not value.is_floating_point():
                raise ValueError(
                    f"{name}: got {type(value).__name__}; allowed: a tensor of floating-point numbers with at least one axis"
                )
        d = self.mean.shape[0]
        if tuple(self.cov.shape) not in ((d,), (d, d)):
            raise ValueError(f"cov: got shape {tuple(self.cov.shape)}; allowed: ({d},) or ({d}, {d}), the width of the mean")
        for name, tensor in (("mean", self.mean), ("cov", self.cov)):
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name}: got NaN or infinite entries; allowed: finite numbers")
        variances = self.cov if self.diagonal else self.cov.diagonal()
        if bool((variances < 0).any()):
            raise ValueError(f"cov: got a negative variance ({float(variances.min()):.3g}); allowed: variances of at least 0")
        if not self.diagonal and not torch.allclose(self.cov, self.cov.mT, rtol=1e-4, atol=1e-6 * float(variances.max())):
            raise ValueError("cov: got a matrix that is not symmetric; allowed: a covariance")
        if not self.diagonal and self.n_tokens == 0:  # a measured one is a sum of squares
            shifted = self.cov.double() + _NEGATIVE * float(variances.max()) * torch.eye(
                d, dtype=torch.float64, device=self.cov.device
            )
            if int(torch.linalg.cholesky_ex(shifted).info) != 0:
                raise ValueError("cov: got a matrix with negative eigenvalues; allowed: a positive semi-definite matrix")

    @property
    def diagonal(self) -> bool:
        """Whether only the variances are known, and all covariances count as zero."""
        return self.cov.ndim == 1

    @classmethod
    def measure(
        cls,
        model: TransformerLensModel,
        prompts: Prompts,
        block: int,
        *,
        covariance: Covariance = "full",
        prepend_bos: bool | None = None,
        batch_tokens: int = 4096,
        progress: bool | None = None,
    ) -> GaussianInput:
        """Mean and covariance of the input of a block's feed-forward layer over all tokens of prompts.

        One pass over the prompts, which stops at the block; sums are kept in float64, so memory does not grow with the corpus.

        Args:
            model: A TransformerLens model.
            prompts: Strings or token ids.
            block: The block.
            covariance: ``"full"``, d_model² numbers, or ``"diagonal"``.
            prepend_bos: Passed to the tokenisation of strings; None is the model's default.
            batch_tokens: Largest number of tokens run at once.
            progress: Whether to show a progress bar.

        Returns:
            The Gaussian, float32 (float64 for a float64 model), on the device where the block's stream is.

        Raises:
            ValueError: The model, a prompt or the block is unusable.

        Example:
            >>> from sd_lens.models.loading import load
            >>> GaussianInput.measure(load("tiny"), "The cat sat on the mat.", 2, covariance="diagonal").diagonal
            True
        """
        from sd_lens.linear.measured import measure_inputs  # which makes objects of this class

        measured = measure_inputs(
            model,
            prompts,
            [block],
            covariance=covariance,
            prepend_bos=prepend_bos,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        return next(iter(measured.values()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the Gaussian as safetensors."""
        metadata = {"sd_lens": json.dumps({"schema": _SCHEMA, "n_tokens": self.n_tokens})}
        save_file({"mean": self.mean.clone(), "cov": self.cov.clone()}, path, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GaussianInput:
        """Reads what `GaussianInput.save` wrote.

        Raises:
            ValueError: The file is something else.
        """
        try:
            opened = safe_open(os.fspath(path), framework="pt")
        except SafetensorError as error:
            raise ValueError(f"path: {path} cannot be read ({error}); allowed: what GaussianInput.save wrote") from None
        with opened as file:
            record = json.loads((file.metadata() or {}).get("sd_lens", "{}"))
            if record.get("schema") != _SCHEMA:
                raise ValueError(f"path: {path} holds {record.get('schema', 'something else')}; allowed: {_SCHEMA}")
            return cls(file.get_tensor("mean"), file.get_tensor("cov"), int(record["n_tokens"]))

    def __repr__(self) -> str:
        kind = "diagonal" if self.diagonal else "full"
        measured = f", measured on {self.n_tokens} tokens" if self.n_tokens else ""
        return f"GaussianInput(d_model={self.mean.shape[0]}, {kind} covariance{measured})"


Inputs = Literal["unit", "gain"] | GaussianInput
"""``"unit"``: ``N(0, I)`` at the projections, as in the paper. ``"gain"``: ``N(0, I)`` before the norm's gain and bias."""


def require_inputs(inputs: Inputs, d_model: int) -> None:
    """Raises `ValueError` unless ``inputs`` is one of the allowed kinds, of the model's width."""
    if isinstance(inputs, GaussianInput):
        if inputs.mean.shape[0] != d_model:
            raise ValueError(f"inputs: got a Gaussian of width {inputs.mean.shape[0]}; allowed: the model's width, {d_model}")
    elif inputs not in ("unit", "gain"):
        raise ValueError(f"inputs: got {inputs!r}; allowed: 'unit', 'gain' or a GaussianInput")


def in_words(inputs: Inputs) -> str:
    """What an FFN was fitted to, for a result's notes."""
    if isinstance(inputs, GaussianInput):
        kind = "diagonal" if inputs.diagonal else "full"
        return f"a Gaussian with {kind} covariance, {f'measured on {inputs.n_tokens} tokens' if inputs.n_tokens else 'given'}"
    return f"N(0, I) {'at the projections' if inputs == 'unit' else 'before the gain and bias of the norm'}"


def resolve(inputs: Inputs, norm: NormWeights | None, like: Tensor, d_model: int) -> GaussianInput:
    """The Gaussian that ``inputs`` stands for, in the dtype and on the device of a tensor.

    Raises:
        ValueError: ``inputs`` is not one of the allowed kinds, or has another width than the layer.
    """
    require_inputs(inputs, d_model)
    if isinstance(inputs, GaussianInput):
        if inputs.mean.dtype == like.dtype and inputs.mean.device == like.device and inputs.cov.dtype == like.dtype:
            return inputs
        # (Marked as measured: that a given one is a covariance has been checked, and rounding must not fail it now.)
        return GaussianInput(inputs.mean.to(like), inputs.cov.to(like), max(1, inputs.n_tokens))
    zeros, ones = like.new_zeros(d_model), like.new_ones(d_model)
    if inputs == "unit" or norm is None:
        return GaussianInput(zeros, ones)
    bias = zeros if norm.bias is None else norm.bias.to(like)
    return GaussianInput(bias, norm.gain.to(like) ** 2)


class Root(NamedTuple):
    """A symmetric square root of a covariance and its pseudo-inverse; vectors of them for a diagonal one."""

    root: Tensor
    inverse: Tensor

    def times(self, z: Tensor) -> Tensor:
        """The root applied to vectors in the last axis."""
        return z * self.root if self.root.ndim == 1 else z @ self.root


def root(inputs: GaussianInput) -> Root:
    """The root through which ``N(0, I)`` becomes ``N(0, cov)``.

    Directions whose variance is no more than rounding of the covariance's own entries have none: neither root nor inverse reach into them.
    """
    if inputs.diagonal:
        spread = inputs.cov.sqrt()
        return Root(spread, torch.where(spread > 0, 1 / spread, 0.0))
    values, vectors = torch.linalg.eigh(inputs.cov.double())
    kept = values > len(values) * torch.finfo(inputs.cov.dtype).eps * values.max()
    spread = torch.where(kept, values, 0.0).sqrt()
    inverse = torch.where(kept, 1 / spread, 0.0)
    return Root(*((vectors * diagonal @ vectors.mT).to(inputs.cov) for diagonal in (spread, inverse)))


def by_block(inputs: Inputs | Mapping[int, GaussianInput], block: int) -> Inputs:
    """The inputs of one block, of one kind for all or of a Gaussian each.

    Raises:
        ValueError: There is none for the block.
    """
    if not isinstance(inputs, Mapping):
        return inputs
    if block not in inputs:
        raise ValueError(f"inputs: got none for block {block}; allowed: a GaussianInput for every block asked for")
    return inputs[block]
