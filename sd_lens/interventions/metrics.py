"""The number that a sweep is judged by: one of five named ones, or the caller's function of logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sd_lens.interventions.observing import Observed, kl, logit_difference, loss, peak_norm, sink_rate
from sd_lens.models import hook_names
from sd_lens.models.batches import Batch

NamedMetric = Literal["loss", "logit_diff", "kl", "peak_norm", "sink_rate"]
Metric = NamedMetric | Callable[[Float[Tensor, "batch pos d_vocab"]], Any]
"""A name, or a function of the logits of all prompts that gives one number, such as TransformerLens' ``patching_metric``."""

Answers = tuple[int, int] | Sequence[int] | Int[Tensor, "2"] | Int[Tensor, "prompt 2"]
"""Ids of the right and the wrong answer: of all prompts, or of each."""

_READS = {"peak_norm": "norms", "sink_rate": "alpha"}


class Score:
    """A metric of runs of some prompts, whose rows may come in any number of passes.

    Args:
        metric: The metric.
        clean: The clean prompts: the loss is that of their tokens.
        answers: What `answers_of` made of them, for ``"logit_diff"``.
    """

    def __init__(self, metric: Metric, clean: Batch, answers: Int[Tensor, "prompt 2"] | None):
        self._metric, self._clean, self._answers = metric, clean, answers
        self._reference: list[Tensor] = []

    @property
    def name(self) -> str:
        """What it is called."""
        if isinstance(self._metric, str):
            return self._metric
        function = getattr(self._metric, "func", self._metric)  # of a partial
        return getattr(function, "__name__", type(function).__name__)

    @property
    def reads(self) -> dict[str, bool]:
        """What a run has to show for it, as arguments of `observe`."""
        return {_READS.get(self._metric, "logits") if isinstance(self._metric, str) else "logits": True}

    def of_clean(self, observed: Observed, prompts: Int[Tensor, "row"]) -> Tensor:
        """`of_rows` of the clean run, which has to come first and in order: KL divergences are to it."""
        if self._metric != "kl":
            return self.of_rows(observed, prompts)
        assert observed.logits is not None
        self._reference.append(observed.logits)
        return torch.zeros(len(prompts))

    def of_rows(self, observed: Observed, prompts: Int[Tensor, "row"]) -> Tensor:
        """What is kept of a run: a number per row, or its logits.

        Args:
            observed: The run.
            prompts: Which prompt each of its rows is.
        """
        if self._metric == "loss":
            return loss(replace(observed, batch=replace(observed.batch, tokens=self._clean.tokens[prompts])))
        if self._metric == "kl":
            if len(self._reference) > 1:
                self._reference = [torch.cat(self._reference)]
            return kl(observed, self._reference[0][prompts.to(self._reference[0].device)])
        if self._metric == "logit_diff":
            assert self._answers is not None
            return logit_difference(observed, self._answers[prompts])
        if isinstance(self._metric, str):
            return peak_norm(observed) if self._metric == "peak_norm" else sink_rate(observed)
        assert observed.logits is not None
        return observed.logits

    def of_run(self, rows: Tensor) -> float:
        """The metric, of what was kept of all prompts in order: the mean over those that have one, or what the function gives."""
        if isinstance(self._metric, str):
            return float(rows.double().nanmean())
        number = self._metric(rows)
        try:
            return float(number)
        except (TypeError, ValueError, RuntimeError):
            got = f"a tensor of shape {tuple(number.shape)}" if isinstance(number, Tensor) else type(number).__name__
            raise ValueError(f"metric: got a function that returns {got}; allowed: one that returns a number") from None


def require_metric(metric: Any, answers: Any) -> None:
    """Raises `ValueError` unless a metric is known or a function, and answers are given to the one that needs them."""
    names = get_args(NamedMetric)
    if not callable(metric) and metric not in names:
        raise ValueError(f"metric: got {metric!r}; allowed: {', '.join(map(repr, names))}, or a function of the logits")
    if metric == "logit_diff" and answers is None:
        raise ValueError("answers: got none with metric='logit_diff'; allowed: ids of the right and the wrong answer")
    if metric != "logit_diff" and answers is not None:
        raise ValueError(f"answers: got some with metric={metric!r}; allowed: with metric='logit_diff' only")


def answers_of(answers: Answers, n_prompts: int, d_vocab: int) -> Int[Tensor, "prompt 2"]:
    """Ids of right and wrong answer for each prompt.

    Args:
        answers: What was given.
        n_prompts: How many prompts there are.
        d_vocab: Size of the vocabulary.

    Raises:
        ValueError: They are no ids of the vocabulary, or not two for all prompts or for each.
    """
    allowed = f"(right, wrong) ids from 0 to {d_vocab - 1}, or a ({n_prompts}, 2) tensor of them"
    try:
        ids = torch.as_tensor(answers).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"answers: got {answers!r}; allowed: {allowed}") from None
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or tuple(ids.shape) not in ((2,), (n_prompts, 2)):
        raise ValueError(f"answers: got {ids.dtype} of shape {tuple(ids.shape)}; allowed: {allowed}")
    if int(ids.min()) < 0 or int(ids.max()) >= d_vocab:
        raise ValueError(f"answers: got ids {int(ids.min())} to {int(ids.max())}; allowed: {allowed}")
    return ids.long().expand(n_prompts, 2)


def points_read(metric: Metric, n_blocks: int) -> list[str]:
    """Hook points that a metric reads and that not every model shows."""
    return [hook_names.pattern(block) for block in range(n_blocks)] if metric == "sink_rate" else []
