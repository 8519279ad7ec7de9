"""Norms carried along in runs that are somebody else's: generation, training, a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sd_lens.models import hook_names
from sd_lens.models.loading import require_usable
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.tracing.trace import NormTrace, labelled, stream_norms


class NormMonitor:
    """Hooks that keep the norm of every token they see, for any code that runs the model.

    A forward pass that continues an earlier one from its key-value cache, as the steps of a generation do, is appended to it; this
    is seen from the attention pattern, which then has more keys than queries. Every other pass begins new prompts, one per row.

    Args:
        model: A TransformerLens model. Nothing is attached to it yet.

    Example:
        >>> from sd_lens.models.planted import planted
        >>> model = planted().model
        >>> monitor = NormMonitor(model)
        >>> with monitor.attached():
        ...     _ = model(torch.arange(10).unsqueeze(0))
        >>> monitor.result()
        NormTrace(planted: 10 tokens of 1 prompts, 6 of 6 blocks)
    """

    def __init__(self, model: TransformerLensModel):
        require_usable(model)
        self._model = model
        self._n_blocks: int = model.cfg.n_layers
        self.reset()

    def reset(self) -> None:
        """Forgets what was seen so far."""
        self._runs: list[list[list[Tensor]]] = []  # per run, per pass: norms (batch, pos) at every point
        self._pass: list[Tensor] = []
        self._keys = 0

    def fwd_hooks(self) -> list[tuple[str, Callable[..., None]]]:
        """Hook points and functions, for ``run_with_hooks(..., fwd_hooks=...)`` or ``model.hooks``."""
        points = hook_names.residual_points(self._n_blocks)
        hooks: list[tuple[str, Callable[..., None]]] = [(hook_names.pattern(0), self._see_keys)]
        return hooks + [(name, self._receiver(point)) for point, name in enumerate(points)]

    @contextmanager
    def attached(self) -> Iterator[NormMonitor]:
        """Attaches the hooks for the body, whatever runs the model there, and removes them (and no others) afterwards."""
        with self._model.hooks(fwd_hooks=self.fwd_hooks()):  # pyright: ignore[reportAttributeAccessIssue]
            yield self

    def _receiver(self, point: int) -> Callable[..., None]:
        def hook(stream: Tensor, hook: Any) -> None:
            if point == 0:
                self._begin_pass()
            if point == len(self._pass):  # not so in a pass that began at a later block, of which nothing is kept
                self._pass.append(stream_norms(stream.detach()).cpu())

        return hook

    def _begin_pass(self) -> None:
        self._close_pass()
        self._pass, self._keys = [], 0

    def _see_keys(self, pattern: Tensor, hook: Any) -> None:
        self._keys = pattern.shape[-1]

    def _close_pass(self) -> None:
        """Puts a finished pass where it belongs. One that an error or an early stop cut short is kept up to the last full point."""
        if not self._pass:
            return
        rows, length = self._pass[0].shape
        continues = self._keys > length and self._runs and self._runs[-1][0][0].shape[0] == rows
        if continues:
            self._runs[-1].append(self._pass)
        else:
            self._runs.append([self._pass])
        self._pass = []

    def result(
        self, tokens: Int[Tensor, "batch pos"] | None = None, *, mask: Bool[Tensor, "batch seen"] | None = None
    ) -> NormTrace:
        """What was seen, as a trace (without a direction: streams are not kept).

        Args:
            tokens: The token ids of all prompts seen, in order, for their labels. Hooks do not see ids; without them they are −1 in
                the trace, and their text is ``?``. A row may be longer than what was seen, as a generation's last token is never run.
            mask: True at real tokens, False at padding; same shape as ``tokens``, or as what was seen.

        Returns:
            The trace, up to the last block that every pass reached.

        Raises:
            ValueError: Nothing was seen, or ``tokens`` or ``mask`` do not fit what was.
        """
        self._close_pass()
        if not self._runs:
            raise ValueError("monitor: nothing was seen; allowed: run the model with the hooks attached first")
        points = min(len(one) for run in self._runs for one in run)
        seen = [torch.stack([torch.cat([one[p] for one in run], dim=1) for p in range(points)]) for run in self._runs]
        rows = [norms[:, row] for norms in seen for row in range(norms.shape[1])]
        longest = max(row.shape[1] for row in rows)
        for name, given in (("tokens", tokens), ("mask", mask)):
            if given is not None and (given.shape[0] != len(rows) or given.shape[1] < longest):
                raise ValueError(
                    f"{name}: got shape {tuple(given.shape)}; allowed: {len(rows)} rows of at least {longest}, as seen"
                )
        sequences, kept = [], []
        for number, row in enumerate(rows):
            length = row.shape[1]
            real = torch.ones(length, dtype=torch.bool) if mask is None else mask[number, :length].cpu().bool()
            if not bool(real.any()):
                raise ValueError(f"mask: got only False in row {number}; allowed: at least one real token in every row")
            ids = torch.full((length,), -1) if tokens is None else tokens[number, :length].cpu()
            sequences.append(ids[real])
            kept.append(row[:, real])
        model = self._model
        return labelled(torch.cat(kept, dim=1), sequences, model, n_blocks=self._n_blocks, d_model=model.cfg.d_model)

    def __repr__(self) -> str:
        return f"NormMonitor({len(self._runs) + bool(self._pass)} runs seen)"
