"""An edit of a forward pass, as hooks for ``run_with_hooks`` and as a context around any code that runs the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sd_lens.interventions.changes import Change
from sd_lens.interventions.positions import PassWatcher, Positions
from sd_lens.interventions.sites import Site
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.running import Hook
from sd_lens.tracing.arguments import require_seed


@dataclass(frozen=True, eq=False)
class Edit:
    """New coefficients on a subspace, at one hook point.

    Attributes:
        site: The subspace there.
        change: What the coefficients become.
        positions: Which tokens are edited.
        delimiters: Ids that ``"delimiters"`` means.
        needs_place: Whether ``change`` depends on the position.
    """

    site: Site
    change: Change
    positions: Positions
    delimiters: tuple[int, ...] = ()
    needs_place: bool = False

    def hooks(self, model: TransformerLensModel) -> list[Hook]:
        """Hooks that make the edit. Between passes they keep no activations, only where the last one ended."""
        watcher = PassWatcher(model, self.site.block, self.positions, self.delimiters, needs_place=self.needs_place)

        def edit(activation: Tensor, hook: Any) -> Tensor:
            if activation.ndim == 2:  # run_with_hooks(..., remove_batch_dim=True)
                return edit(activation.unsqueeze(0), hook).squeeze(0)
            try:
                coefficients = self.site.coefficients(activation)
                meant = watcher.meant(*activation.shape[:2])
                by = self.change(coefficients, watcher.place(*activation.shape[:2])) - coefficients
            finally:
                watcher.done(activation.shape[1])
            if meant is not None:
                by = torch.where(meant.to(by.device).unsqueeze(-1), by, 0.0)
            return self.site.moved(activation, by)

        return [*watcher.hooks(), (self.site.name, edit)]


@dataclass(frozen=True, eq=False)
class Intervention:
    """Edits of a forward pass, made by hooks. Nothing is attached to the model until they are used.

    The hooks change no activation in place, work in any dtype and on any device, let gradients through, and go together with other
    hooks, with caching, ``stop_at_layer`` and generation from a key-value cache. Where several share a hook point, they act in order.

    Attributes:
        model: The model.
        name: What is done, for tables and ``repr``.
        edits: The edits, in order.

    Example:
        >>> import torch
        >>> from sd_lens.interventions.subspace import ExplosionSubspace
        >>> from sd_lens.models.planted import planted
        >>> truth = planted()
        >>> without = ExplosionSubspace.at(truth.model, truth.explosion_block).ablate()
        >>> tokens = torch.arange(10).unsqueeze(0)
        >>> logits = truth.model.run_with_hooks(tokens, fwd_hooks=without.fwd_hooks())
        >>> with without.attached():
        ...     same = truth.model(tokens)
        >>> bool(torch.equal(logits, same))
        True
    """

    model: TransformerLensModel = field(repr=False)
    name: str
    edits: tuple[Edit, ...]

    def fwd_hooks(self) -> list[Hook]:
        """Hook points and functions, for ``run_with_hooks(..., fwd_hooks=...)`` or ``model.hooks``."""
        return [hook for edit in self.edits for hook in edit.hooks(self.model)]

    @contextmanager
    def attached(self) -> Iterator[Intervention]:
        """Attaches the hooks for the body, whatever runs the model there, and removes them (and no others) afterwards."""
        with self.model.hooks(fwd_hooks=self.fwd_hooks()):  # pyright: ignore[reportAttributeAccessIssue]
            yield self

    def control(self, seed: int = 0) -> Intervention:
        """The same displacement of every token, of the same length, along random directions that have none of the subspace.

        What such a control does as well comes from displacing activations by that much, not from the subspace.

        Args:
            seed: Seeds the directions.

        Raises:
            ValueError: The subspace leaves no room beside it.
        """
        require_seed(seed)
        # Far apart, so that no edit draws the directions that another has under a neighbouring seed.
        edits = tuple(replace(edit, site=edit.site.randomised(seed + 1_000_003 * number)) for number, edit in enumerate(self.edits))
        return replace(self, name=f"random control of {self.name}", edits=edits)

    def __add__(self, other: Intervention) -> Intervention:
        """Both, in this order."""
        if not isinstance(other, Intervention) or self.model is not other.model:
            got = "one of another model" if isinstance(other, Intervention) else type(other).__name__
            raise ValueError(f"other: got {got}; allowed: an Intervention of the same model")
        return Intervention(self.model, f"{self.name}, {other.name}", (*self.edits, *other.edits))

    def __repr__(self) -> str:
        places = ", ".join(dict.fromkeys(edit.site.name for edit in self.edits))
        return f"Intervention({self.name} at {places})"
