"""Many patches of the same prompts in few forward passes: the prompts are repeated, and every row is patched in its own way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.interventions.metrics import Score
from sd_lens.interventions.observing import Observed, observe
from sd_lens.interventions.pairs import PromptPairs
from sd_lens.interventions.patches import HeadPatch, Targets, TokenPatch
from sd_lens.interventions.sites import Site
from sd_lens.models.batches import Batch
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.running import Hook

Patch = TokenPatch | HeadPatch


@dataclass(frozen=True, eq=False)
class Cell:
    """One patch of all prompts.

    Attributes:
        patch: Its number among the patches.
        along: What changes are written along.
        places: At which positions.
        head: Of which head; not looked at where tokens are patched.
    """

    patch: int
    along: Site
    places: Bool[Tensor, "pos"]
    head: int = 0


class CellRunner:
    """Runs clean, corrupted and patched prompts, as many rows at once as there is room for.

    Args:
        model: A TransformerLens model.
        pairs: The prompts.
        patches: What is patched.
        score: What runs are judged by.
        batch_tokens: Largest number of tokens run at once; a prompt's, if it has more.
        progress: Whether to show a progress bar.
    """

    def __init__(
        self,
        model: TransformerLensModel,
        pairs: PromptPairs,
        patches: Sequence[Patch],
        score: Score,
        *,
        batch_tokens: int,
        progress: bool | None,
    ):
        self._model, self._pairs, self._patches, self._score, self._progress = model, pairs, patches, score, progress
        self._at_once = max(1, batch_tokens // pairs.longest)
        self._wanted: list[Tensor] = []  # per patch, coefficients of the clean run

    def untouched(self) -> tuple[float, float]:
        """The metric of the clean and of the corrupted run; to be called first, as coefficients of the clean run are kept."""
        kept: list[list[Tensor]] = [[] for _ in self._patches]
        reading = [_keeping(patch, into) for patch, into in zip(self._patches, kept, strict=True)]
        work = torch.arange(self._pairs.n_prompts).split(self._at_once)
        clean = [self._score.of_clean(self._observe(self._pairs.clean, rows, reading), rows) for rows in work]
        self._wanted = [torch.cat(parts) for parts in kept]
        corrupted = [self._score.of_rows(self._observe(self._pairs.corrupted, rows, []), rows) for rows in work]
        return self._score.of_run(torch.cat(clean)), self._score.of_run(torch.cat(corrupted))

    def patched(self, cells: Sequence[Cell]) -> Iterator[float]:
        """The metric of the corrupted run with each cell patched.

        Args:
            cells: The cells; a pass is cheapest where those of one patch, and of these those written along the same, stand together.
        """
        n = self._pairs.n_prompts
        hidden = None if self._progress is None else not self._progress
        work = torch.arange(len(cells) * n).split(self._at_once) if cells else ()
        waiting = torch.empty(0)
        for rows in tqdm(work, desc="patching", unit="batch", delay=2.0, disable=hidden, leave=False):
            prompts = rows % n
            hooks = self._hooks([cells[row // n] for row in rows.tolist()], prompts)
            seen = self._score.of_rows(self._observe(self._pairs.corrupted, prompts, hooks), prompts)
            waiting = torch.cat([waiting, seen]) if len(waiting) else seen
            while len(waiting) >= n:
                yield self._score.of_run(waiting[:n])
                waiting = waiting[n:]

    def _hooks(self, cells: Sequence[Cell], prompts: Int[Tensor, "row"]) -> list[Hook]:
        """Hooks for a pass whose rows are these cells of these prompts."""
        hooks: list[Hook] = []
        for _, group in groupby(range(len(cells)), key=lambda row: id(cells[row].along)):
            rows = torch.tensor(list(group))
            places = torch.stack([cells[row].places for row in rows.tolist()]) & self._pairs.clean.mask[prompts[rows]]
            which, where = places.nonzero(as_tuple=True)
            heads = torch.tensor([cells[row].head for row in rows.tolist()])[which]
            patch = cells[int(rows[0])].patch
            wanted = self._wanted[patch][prompts[rows[which]], where]
            hooks += self._patches[patch].hooks(Targets(rows[which], where, heads), wanted, cells[int(rows[0])].along)
        return hooks

    def _observe(self, batch: Batch, prompts: Int[Tensor, "row"], hooks: Sequence[Hook]) -> Observed:
        part = Batch(batch.tokens[prompts], batch.mask[prompts], batch.flat[prompts])
        return observe(self._model, part, hooks, **self._score.reads)


def _keeping(patch: Patch, into: list[Tensor]) -> Hook:
    def keep(activation: Tensor, hook: Any) -> None:
        into.append(patch.coefficients(activation).cpu())

    return patch.reads, keep
