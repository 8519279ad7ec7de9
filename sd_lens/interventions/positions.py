"""Which tokens of a forward pass an intervention means, told from inside its hooks.

Hooks see activations, not token ids or positions. Where it matters, two more hooks tell these: the attention pattern has more keys than
queries in a pass that continues an earlier one from its key-value cache, and an id is recognised by its embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sd_lens.models import hook_names
from sd_lens.models.embeddings import embedded
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.running import Hook

Positions = Literal["all", "initial", "delimiters"] | Bool[Tensor, "batch pos"] | Sequence[int]
"""All tokens; the first of each prompt; those whose id is a delimiter's, anywhere but first; True in a mask; or positions by number.

Masks and numbers count positions of the whole sequence, from 0; tokens beyond a mask's end (those generated) are not meant.
"""

_NAMES = ("all", "initial", "delimiters")
_SAME = 1e-3  # relative distance at which an embedding is an id's: rounding, with room


def require_positions(positions: Any, delimiters: Sequence[int]) -> None:
    """Raises `ValueError` unless positions can be told."""
    allowed = f"{', '.join(map(repr, _NAMES))}, a (batch, pos) mask of truth values, or a list of positions from 0"
    if isinstance(positions, str):
        if positions not in _NAMES:
            raise ValueError(f"positions: got {positions!r}; allowed: {allowed}")
        if positions == "delimiters" and not delimiters:
            raise ValueError(
                "positions: got 'delimiters', of which this subspace knows none; allowed: a subspace with delimiters= ids, or with defects= that hold "
                "some (ExplosionSubspace.at)"
            )
    elif isinstance(positions, Tensor):
        if positions.dtype != torch.bool or positions.ndim != 2:
            raise ValueError(f"positions: got a tensor of {positions.dtype} and shape {tuple(positions.shape)}; allowed: {allowed}")
    elif not isinstance(positions, Sequence) or not all(type(p) is int and p >= 0 for p in positions) or not len(positions):
        raise ValueError(f"positions: got {positions!r}; allowed: {allowed}")


class PassWatcher:
    """What is known of the forward pass that is running: where it begins, and which tokens an intervention means in it.

    Args:
        model: The model.
        block: The block whose activations are edited.
        positions: Which tokens are meant.
        delimiters: Ids of delimiters.
        needs_start: Whether the place of the pass in its sequence is needed for other reasons.
    """

    def __init__(
        self,
        model: TransformerLensModel,
        block: int,
        positions: Positions,
        delimiters: Sequence[int] = (),
        *,
        needs_start: bool = False,
    ):
        self._positions, self._block = positions, block
        self._start = 0
        self._known: Tensor | None = None  # which tokens have one of the ids
        self._watches_start = needs_start or not (isinstance(positions, str) and positions == "all")
        ids: list[int] = []
        if isinstance(positions, str) and positions == "delimiters":
            ids = list(delimiters)
        elif isinstance(positions, str) and positions == "initial":
            ids = _padding(model)
        self._ids = embedded(model, torch.tensor(ids)) if ids else None

    @property
    def start(self) -> int:
        """Position of the pass's first token in its sequence."""
        return self._start

    def hooks(self) -> list[Hook]:
        """The hooks that watch; they change nothing."""
        watching: list[Hook] = []
        if self._ids is not None:
            watching.append((hook_names.embed(), self._see_embedding))
        if self._watches_start:
            watching.append((hook_names.pattern(self._block), self._see_pattern))
        return watching

    def _see_embedding(self, embedding: Tensor, hook: Any) -> None:
        assert self._ids is not None
        self._known = has_id(embedding.detach(), self._ids)

    def _see_pattern(self, pattern: Tensor, hook: Any) -> None:
        self._start = pattern.shape[-1] - pattern.shape[-2]

    def done(self) -> None:
        """Forgets the pass: to be called when its activations have been edited."""
        self._start, self._known = 0, None

    def meant(self, batch: int, length: int) -> Bool[Tensor, "#batch #pos"] | None:
        """Which tokens of the pass are meant; None for all of them.

        Args:
            batch: Its rows.
            length: Its positions.

        Raises:
            ValueError: A mask has another number of rows, or ids cannot be told.
        """
        positions, start = self._positions, self._start
        place = torch.arange(start, start + length).unsqueeze(0)
        if isinstance(positions, Tensor):
            if len(positions) not in (1, batch):
                raise ValueError(
                    f"positions: got a mask of {len(positions)} rows; allowed: the run's {batch}, or 1 for all of them"
                )
            covered = positions.cpu()[:, start : start + length]
            return torch.nn.functional.pad(covered, (0, length - covered.shape[1]))
        if not isinstance(positions, str):
            return torch.isin(place, torch.tensor(list(positions)))
        if positions == "all":
            return None
        known = self._known
        if positions == "delimiters":
            if known is None:
                raise ValueError(
                    "positions: got 'delimiters', which are told by their embeddings, in a run that has none; allowed: a run from the "
                    "embedding on, or a mask"
                )
            return known.cpu() & (place > 0)
        # The first token that is no padding: padding on the left is recognised by its id.
        padding = torch.zeros(1, dtype=torch.long) if known is None else known.cpu().long().cumprod(1).sum(1)
        return place == padding.unsqueeze(1)


def has_id(embedding: Float[Tensor, "batch pos d_model"], rows: Float[Tensor, "id d_model"]) -> Bool[Tensor, "batch pos"]:
    """Which embeddings are one of some ids'.

    Args:
        embedding: What a model shows at ``hook_embed``.
        rows: What it shows there for these ids.
    """
    wide = torch.promote_types(embedding.dtype, torch.float32)
    rows = rows.to(embedding.device, wide)
    distance = torch.cdist(embedding.to(wide), rows, compute_mode="donot_use_mm_for_euclid_dist")
    return (distance <= _SAME * torch.linalg.vector_norm(rows, dim=-1)).any(-1)


def _padding(model: Any) -> list[int]:
    """The padding id, unless it is that of BOS, which a prompt may begin with."""
    tokenizer = getattr(model, "tokenizer", None)
    pad = getattr(tokenizer, "pad_token_id", None)
    return [] if pad is None or pad == getattr(tokenizer, "bos_token_id", None) else [int(pad)]


def ids_of(tokens: Int[Tensor, "token"] | Sequence[int]) -> tuple[int, ...]:
    """Distinct ids, in ascending order."""
    return tuple(sorted({int(token) for token in tokens}))
