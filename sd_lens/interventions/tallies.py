"""What runs with and without an intervention show, added up batch by batch to the measures of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, fields, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sd_lens.interventions import observing
from sd_lens.interventions.observing import Observed
from sd_lens.interventions.outcomes import Measures
from sd_lens.tracing.trace import NormTrace


class Tally:
    """What the runs of one intervention show.

    Args:
        trace: The trace of the untouched model, for the places of the tokens.
        epsilon: What ``α`` of a sink exceeds.
    """

    def __init__(self, trace: NormTrace, epsilon: float):
        self._trace, self._epsilon = trace, epsilon
        self._norms = torch.full_like(trace.norms, float("nan"))
        self._alpha: Tensor | None = None
        self._sums = torch.zeros(4, dtype=torch.float64)  # loss and divergence over tokens, and over how many
        self._sinks = 0.0

    def add(self, seen: Observed, untouched: Observed) -> None:
        """Adds a batch, which the untouched model was run on, too."""
        assert seen.norms is not None
        assert untouched.logits is not None
        batch = seen.batch
        n_tokens = batch.mask.sum(1)
        predicted = n_tokens - 1
        loss = torch.where(predicted > 0, observing.loss(seen) * predicted, 0.0)
        kl = observing.kl(seen, untouched.logits) * n_tokens
        self._sums += torch.stack([loss.sum(), predicted.sum(), kl.sum(), n_tokens.sum()]).double()
        self._norms[:, batch.flat[batch.mask]] = seen.norms[:, batch.mask]
        if seen.alpha is not None:
            alpha = seen.alpha.double().sum(0)
            self._alpha = alpha if self._alpha is None else self._alpha + alpha
            self._sinks += float(observing.sink_rate(seen, self._epsilon).sum())

    def mean_alpha(self) -> Float[Tensor, "block head"]:
        """``α`` of every head, averaged over prompts."""
        assert self._alpha is not None
        return self._alpha / self._trace.n_prompts

    def measures(
        self, high: Bool[Tensor, "token"], block: int, min_ratio: float, sinks: Bool[Tensor, "block head"] | None
    ) -> Measures:
        """The measures, once all batches were added.

        Args:
            high: The tokens that have a high norm in the untouched model.
            block: The subspace's block.
            min_ratio: Least ratio of a high norm.
            sinks: The sink heads of the untouched model; None where attention patterns were not seen.
        """
        edited = replace(self._trace, norms=self._norms, direction=None)
        ratios, missing, after = edited.ratios, float("nan"), slice(block + 1, None)
        some, some_sinks = bool(high.any()), sinks is not None and bool(sinks.any())
        loss, predicted, kl, n_tokens = self._sums.tolist()
        return Measures(
            loss=loss / predicted,
            kl=kl / n_tokens,
            peak_norm=float(self._norms[after, high].max()) if some else missing,
            peak_ratio=float(ratios[after, high].max()) if some else missing,
            block_ratio=float(ratios[block + 1, high].max()) if some else missing,
            peak_ratio_anywhere=float(ratios[1:, high].max()) if some else missing,
            n_high=float(edited.high_norm(min_ratio)[after].any(0).sum()),
            sink_rate=self._sinks / self._trace.n_prompts if sinks is not None else missing,
            sink_attention=float(self.mean_alpha()[sinks].mean()) if some_sinks else missing,
        )


def means(seen: Sequence[Measures]) -> Measures:
    """Each measure's mean over runs; of one run, what it shows."""
    return seen[0] if len(seen) == 1 else Measures(*_table(seen).mean(0).tolist())


def deviations(seen: Sequence[Measures]) -> Measures:
    """Each measure's standard deviation over runs, as of a sample; NaN for one run."""
    return Measures(*(_table(seen).std(0).tolist() if len(seen) > 1 else [float("nan")] * len(fields(Measures))))


def _table(seen: Sequence[Measures]) -> Float[Tensor, "run measure"]:
    return torch.tensor([astuple(measures) for measures in seen], dtype=torch.float64)
