"""What a block's true FFN answers to its map's right singular vectors: how far the linear picture holds.

Wang et al. (ICML 2025, arXiv 2502.07004), section 4.2, probe the FFN of the explosion block with each right singular vector; one answer
stands out. A linear map's answer grows in proportion and does not care about the sign; a gated FFN's grows with the square, a plain
one's in proportion beyond a threshold, and mostly for one sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sd_lens.linear.linearize import linearize
from sd_lens.linear.spectra import SingularTriplets, leading_singular
from sd_lens.linear.trigger import ffn_answer, full_length, signed
from sd_lens.models.weights import FFNWeights, MoEWeights

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from sd_lens.interventions.subspace import ExplosionSubspace

_RANDOM = 64  # directions that an answer is compared with


@dataclass(frozen=True, eq=False)
class ResponseCurve:
    """Answers of a true FFN to a right singular vector of any length.

    An answer is the norm of ``FFN(c v) − FFN(0)``: what the vector adds to what the biases give by themselves, before a norm behind the FFN.

    Attributes:
        model_name: The model.
        block: The block.
        vector: Which singular vector, 0 for the leading one.
        scales: The lengths ``c`` in the normalised stream; ``√d`` is the largest that a stream can have.
        answers: Answers to ``c v``.
        opposite: Answers to ``-c v``.
        predicted: What the linear map says: ``σ c``. NaN where a norm stands behind the FFN, which the map has in it.
        d_model: The width.
    """

    model_name: str
    block: int
    vector: int
    scales: Float[Tensor, "scale"]
    answers: Float[Tensor, "scale"]
    opposite: Float[Tensor, "scale"]
    predicted: Float[Tensor, "scale"]
    d_model: int

    @property
    def exponent(self) -> float:
        """How the answer grows: the slope of its logarithm over that of ``c``, fitted from a quarter of the longest ``c`` on.

        1 for a linear answer, 2 for that of a gated FFN far from zero. NaN where fewer than two answers are left to fit.
        """
        used = (self.scales >= self.scales.max() / 4) & (self.answers > 0)
        if int(used.sum()) < 2:
            return float("nan")
        x, y = self.scales[used].double().log(), self.answers[used].double().log()
        x = x - x.mean()
        return float((x * y).sum() / (x * x).sum())

    @property
    def asymmetry(self) -> float:
        """Answer to the longest ``c v``, divided by that to its opposite."""
        last = int(self.scales.argmax())
        return float(self.answers[last] / self.opposite[last])

    def to_dataframe(self) -> pd.DataFrame:
        """One row per length: scale, answer, opposite, predicted."""
        columns = {"scale": self.scales, "answer": self.answers, "opposite": self.opposite, "predicted": self.predicted}
        return pd.DataFrame({name: values.numpy() for name, values in columns.items()})

    def plot(self) -> Figure:
        """The answers over the length, for both signs, beside the linear map's."""
        from sd_lens.display.figures import response_curve as figure

        return figure(self)

    def sentence(self) -> str:
        """The curve in one sentence."""
        last = int(self.scales.argmax())
        answer, predicted = float(self.answers[last]), float(self.predicted[last])
        beside = "" if predicted != predicted else f" where the linear map says {predicted:.3g}"
        return (
            f"The FFN of block {self.block} answers {float(self.scales[last]):.3g} v{self.vector} with a norm of {answer:.3g}{beside}, "
            f"{_times(self.asymmetry)} its answer to the opposite; the answer grows with the power {self.exponent:.2f}."
        )

    def __repr__(self) -> str:
        return (
            f"ResponseCurve({self.model_name}, block {self.block}, vector {self.vector}: exponent {self.exponent:.2f}, "
            f"{_times(self.asymmetry)} the opposite)"
        )


@dataclass(frozen=True, eq=False)
class SingularProbe:
    """Answers of a true FFN to its map's right singular vectors, each as long as a stream is.

    Attributes:
        model_name: The model.
        block: The block.
        sigma: Singular values, largest first.
        answers: Norm of ``FFN(√d v) − FFN(0)`` for each vector, with the sign that gives more.
        opposite: For the other sign.
        random_mean: Mean answer to random directions of the same length.
        random_max: Largest of these.
    """

    model_name: str
    block: int
    sigma: Float[Tensor, "vector"]
    answers: Float[Tensor, "vector"]
    opposite: Float[Tensor, "vector"]
    random_mean: float
    random_max: float

    @property
    def spike(self) -> float:
        """The first vector's answer, divided by the largest of the others'; NaN where there are none."""
        return float(self.answers[0] / self.answers[1:].max()) if len(self.answers) > 1 else float("nan")

    def to_dataframe(self) -> pd.DataFrame:
        """One row per vector: vector, sigma, answer, opposite."""
        frame = pd.DataFrame({"sigma": self.sigma.numpy(), "answer": self.answers.numpy(), "opposite": self.opposite.numpy()})
        frame.insert(0, "vector", range(len(frame)))
        return frame

    def plot(self) -> Figure:
        """The answers as bars, beside those to random directions."""
        from sd_lens.display.figures import singular_probe as figure

        return figure(self)

    def __repr__(self) -> str:
        return (
            f"SingularProbe({self.model_name}, block {self.block}: answer {float(self.answers[0]):.3g} to the first of {len(self.answers)} vectors, "
            f"{self.spike:.3g} times the next)"
        )


def response_curve(
    subspace: ExplosionSubspace, scales: Float[Tensor, "scale"] | Sequence[float] | None = None, *, vector: int = 0
) -> ResponseCurve:
    """How a block's true FFN answers to ``c · v``, beside what its linear map predicts.

    Args:
        subspace: The subspace.
        scales: Lengths ``c``, above 0; default: 40 from a fiftieth of ``√d`` to ``√d``, evenly.
        vector: Which of the subspace's vectors.

    Returns:
        The curve, for ``c · v`` and ``-c · v``.

    Raises:
        ValueError: Scales are not positive and finite, or the subspace has no such vector.

    Example:
        >>> from sd_lens.interventions.subspace import ExplosionSubspace
        >>> from sd_lens.models.loading import load
        >>> response_curve(ExplosionSubspace.at(load("tiny"), 2))
        ResponseCurve(tiny, block 2, vector 0: exponent 2.02, 218 times the opposite)
    """
    if not isinstance(vector, int) or isinstance(vector, bool) or not 0 <= vector < subspace.rank:
        raise ValueError(f"vector: got {vector!r}; allowed: 0 to {subspace.rank - 1}")
    d = len(subspace.right)
    try:
        lengths = torch.linspace(d**0.5 / 50, d**0.5, 40) if scales is None else torch.as_tensor(scales, dtype=torch.float32).cpu()
    except (TypeError, ValueError):
        raise ValueError(f"scales: got {scales!r}; allowed: one or more finite lengths above 0") from None
    if lengths.ndim != 1 or not len(lengths) or not bool((lengths > 0).all() & lengths.isfinite().all()):
        raise ValueError(f"scales: got {scales}; allowed: one or more finite lengths above 0")
    weights, v = subspace.weights, subspace.right[:, vector]
    probes = lengths.unsqueeze(1) * v
    behind = weights.ffn.post_norm is not None
    return ResponseCurve(
        model_name=_name(subspace),
        block=subspace.block,
        vector=vector,
        scales=lengths,
        answers=_added(weights.ffn, probes),
        opposite=_added(weights.ffn, -probes),
        predicted=torch.full_like(lengths, float("nan")) if behind else lengths * subspace.sigma[vector],
        d_model=d,
    )


def probe_singular_vectors(subspace: ExplosionSubspace, n: int = 20, *, seed: int = 0) -> SingularProbe:
    """How a block's true FFN answers to the first right singular vectors of its linear map.

    Args:
        subspace: A subspace of the block; the vectors are those of the block's map (`linearize` with its defaults).
        n: How many vectors.
        seed: Seeds the random directions that answers are compared with.

    Returns:
        The answers.

    Raises:
        ValueError: There are not so many vectors.

    Example:
        >>> from sd_lens.interventions.subspace import ExplosionSubspace
        >>> from sd_lens.models.planted import planted
        >>> truth = planted()
        >>> probe_singular_vectors(ExplosionSubspace.at(truth.model, truth.explosion_block), 5).spike > 100
        True
    """
    d = len(subspace.right)
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= d:
        raise ValueError(f"n: got {n!r}; allowed: 1 to {d}")
    weights = subspace.weights
    found: SingularTriplets = signed(weights, leading_singular(linearize(weights).ffn, k=n))
    probes = full_length(found.v.T.float())
    drawn = torch.randn(_RANDOM, d, generator=torch.Generator().manual_seed(seed))
    norm = weights.ffn.norm
    drawn = drawn if norm is None else norm.center(drawn)
    among = _added(weights.ffn, full_length(torch.nn.functional.normalize(drawn, dim=-1)))
    sides = torch.stack([_added(weights.ffn, probes), _added(weights.ffn, -probes)])
    return SingularProbe(
        model_name=_name(subspace),
        block=subspace.block,
        sigma=found.s.float().cpu(),
        answers=sides.amax(0),
        opposite=sides.amin(0),
        random_mean=float(among.mean()),
        random_max=float(among.max()),
    )


def _added(ffn: FFNWeights | MoEWeights, x: Tensor) -> Tensor:
    """Norms of what vectors add to the FFN's answer to nothing."""
    answer = ffn_answer(ffn, torch.cat([torch.zeros_like(x[:1]), x]))
    return torch.linalg.vector_norm(answer[1:] - answer[:1], dim=-1).cpu()


def _times(ratio: float) -> str:
    return "more than 1000 times" if ratio > 1000 else f"{ratio:.3g} times"


def _name(subspace: ExplosionSubspace) -> str:
    return str(getattr(subspace.model.cfg, "model_name", "model"))
