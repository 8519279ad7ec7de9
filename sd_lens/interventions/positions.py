"""Which tokens of a forward pass an intervention means, told from inside its hooks."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sd_lens.models.passes import IdWatcher, PassStart, leading_padding, padding_id
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.running import Hook

Positions = Literal["all", "initial", "delimiters"] | Bool[Tensor, "mask_batch mask_pos"] | Sequence[int]
"""All tokens; the first of each prompt; those whose id is a delimiter's, anywhere but first; True in a mask; or positions by number.

Masks and numbers count columns of the whole sequence, from 0, padding included; tokens beyond a mask's end (those generated) are not meant.
The first token of a prompt that is padded on the left is the first that is no padding.
"""

_NAMES = ("all", "initial", "delimiters")


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
        if positions.dtype != torch.bool or positions.ndim != 2 or not len(positions):
            raise ValueError(f"positions: got a tensor of {positions.dtype} and shape {tuple(positions.shape)}; allowed: {allowed}")
    elif not isinstance(positions, Sequence) or not all(type(p) is int and p >= 0 for p in positions) or not len(positions):
        raise ValueError(f"positions: got {positions!r}; allowed: {allowed}")


class PassWatcher:
    """Which tokens of the forward pass that is running an intervention means. What it can know of a pass: `sd_lens.models.passes`.

    Args:
        model: The model.
        block: The block whose activations are edited.
        positions: Which tokens are meant.
        delimiters: Ids of delimiters.
        needs_place: Whether the place of tokens in their prompts is needed for other reasons.
    """

    def __init__(
        self,
        model: TransformerLensModel,
        block: int,
        positions: Positions,
        delimiters: Sequence[int] = (),
        *,
        needs_place: bool = False,
    ):
        self._positions = positions
        everywhere, by_number = isinstance(positions, str) and positions == "all", not isinstance(positions, str)
        pad = padding_id(model) if needs_place or not (everywhere or by_number) else None
        self._pad_is_bos = pad == getattr(getattr(model, "tokenizer", None), "bos_token_id", None)
        padding = () if pad is None else (pad,)
        meant = tuple(delimiters) if not by_number and positions == "delimiters" else ()
        self._place = PassStart(model, block)
        self._watches_place = needs_place or not everywhere
        self._ids = IdWatcher(model, padding, meant) if padding or meant else None
        self._leading = torch.zeros(1, dtype=torch.long)

    def hooks(self) -> list[Hook]:
        """The hooks that watch; they change nothing."""
        return [*(self._ids.hooks() if self._ids else ()), *(self._place.hooks() if self._watches_place else ())]

    def done(self, length: int) -> None:
        """To be called when the activations of a pass have been edited, with its length: what is known of it holds no longer."""
        self._place.done(length)
        if self._ids is not None:
            self._ids.done()

    def place(self, batch: int, length: int) -> Int[Tensor, "#batch pos"]:
        """Position of every token in its own prompt, from 0; negative for padding on the left.

        Args:
            batch: Rows of the pass.
            length: Its positions.
        """
        start = self._place.start
        if start == 0:  # a pass that goes on has the padding of the one that it continues
            known = None if self._ids is None else self._ids.known(batch, length)
            none = torch.zeros(1, dtype=torch.long)
            self._leading = none if known is None else leading_padding(known[0], self._place.blind, begins_prompts=self._pad_is_bos)
        leading = self._leading if len(self._leading) in (1, batch) else self._leading.new_zeros(1)
        return torch.arange(start, start + length) - leading.unsqueeze(1)

    def meant(self, batch: int, length: int) -> Bool[Tensor, "#batch #pos"] | None:
        """Which tokens of the pass are meant; None for all of them.

        Args:
            batch: Its rows.
            length: Its positions.

        Raises:
            ValueError: A mask has another number of rows, or ids cannot be told.
        """
        positions, start = self._positions, self._place.start
        if isinstance(positions, Tensor):
            if len(positions) not in (1, batch):
                raise ValueError(
                    f"positions: got a mask of {len(positions)} rows; allowed: the run's {batch}, or 1 for all of them"
                )
            covered = positions.cpu()[:, start : start + length]
            return torch.nn.functional.pad(covered, (0, length - covered.shape[1]))
        if not isinstance(positions, str):
            return torch.isin(torch.arange(start, start + length), torch.tensor(list(positions))).unsqueeze(0)
        if positions == "all":
            return None
        place = self.place(batch, length)
        if positions == "initial":
            return place == 0
        known = None if self._ids is None else self._ids.known(batch, length)
        if known is None:
            raise ValueError(
                "positions: got 'delimiters', which are told by their ids, in a run that begins behind the embedding; allowed: a run from the "
                "embedding on, or a mask"
            )
        return known[1] & (place > 0)


def ids_of(tokens: Int[Tensor, "token"] | Sequence[int]) -> tuple[int, ...]:
    """Distinct ids, in ascending order.

    Raises:
        ValueError: They are no ids.
    """
    try:
        return tuple(sorted({operator.index(token) for token in tokens}))
    except TypeError:
        raise ValueError(f"delimiters: got {tokens!r}; allowed: token ids") from None
