"""What hooks can tell of the forward pass that is running: where in its sequence it begins, and which of its tokens have certain ids.

Hooks see activations, not positions or ids, and they see passes that begin at the embedding or behind it, with a key-value cache or
without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sd_lens.models import hook_names
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.running import Hook

_SAME = 1e-3  # relative distance at which an embedding is an id's: rounding, with room


class PassStart:
    """Where a pass begins in its sequence, told by a block's attention pattern: keys beyond the pass's own are those of earlier tokens.

    But the key-value cache of a block with a sliding window keeps no more than the window. Once it is full, a pass is taken to go on
    where the last one seen ended. So hooks that are attached in the middle of a generation longer than the window, or caches taken up
    again in another order, are counted wrongly there. So is a cache that is allocated at full length from the start (``StaticCache``).

    Args:
        model: The model.
        block: The block whose pattern is seen.

    Attributes:
        start: Position of the pass's first token, from 0.
        blind: Which queries of a pass from the start pay exactly nothing to the first key, in any head: an attention mask hides it from them.
    """

    def __init__(self, model: TransformerLensModel, block: int):
        self.start = 0
        self.blind: Bool[Tensor, "batch pos"] | None = None
        self._end, self._block, self._window = 0, block, _window(model, block)

    def hooks(self) -> list[Hook]:
        """The hook that watches; it changes nothing."""
        return [(hook_names.pattern(self._block), self._see)]

    def _see(self, pattern: Tensor, hook: Any) -> None:
        self.start = pattern.shape[-1] - pattern.shape[-2]
        if self._window is not None and self.start == self._window - 1:
            self.start = max(self.start, self._end)
        self.blind = None if self.start else (pattern[..., 0] == 0).all(-2).reshape(-1, pattern.shape[-2]).cpu()

    def done(self, length: int) -> None:
        """To be called when the block has been passed.

        Args:
            length: Positions of the pass.
        """
        self._end, self.start, self.blind = self.start + length, 0, None


class IdWatcher:
    """Which tokens of a pass have one of certain ids.

    A bridge shows the ids that it embeds. `HookedTransformer` does not, nor does it embed them inside the pass when it generates; there
    an id is recognised by its embedding in the stream that enters block 0. No pass of the model is made to know it, which hooks of
    the caller's would see.

    Args:
        model: The model.
        *ids: Sets of ids.
    """

    def __init__(self, model: TransformerLensModel, *ids: Sequence[int]):
        self._ids = [torch.tensor(list(some), dtype=torch.long) for some in ids]
        self._known: tuple[Tensor, ...] | None = None
        self._added: Tensor | None = None  # what is added to embeddings for positions
        loaded: Any = model
        names = loaded.hook_dict
        self._shows_ids = hook_names.embed_in() in names
        self._rows = [] if self._shows_ids else [_embedded(loaded, some) for some in self._ids]
        self._adds = not self._shows_ids and loaded.cfg.positional_embedding_type == "standard"

    def hooks(self) -> list[Hook]:
        """The hooks that watch; they change nothing."""
        if self._shows_ids:
            return [(hook_names.embed_in(), self._see_ids)]
        added: list[Hook] = [(hook_names.pos_embed(), self._see_positions)] if self._adds else []
        return [*added, (hook_names.resid_pre(0), self._see_stream)]

    def known(self, batch: int, length: int) -> tuple[Bool[Tensor, "batch pos"], ...] | None:
        """For each set, which tokens of the running pass have one of its ids; None where the pass begins behind the embedding.

        Args:
            batch: Rows of the pass. What was seen of other sizes is from an earlier pass, which ended before anybody asked.
            length: Its positions.
        """
        return self._known if self._known is not None and self._known[0].shape == (batch, length) else None

    def done(self) -> None:
        """To be called when nobody will ask about the pass any more."""
        self._known = self._added = None

    def _see_ids(self, tokens: Tensor, hook: Any) -> None:
        tokens = tokens.detach().reshape(-1, tokens.shape[-1])
        self._known = tuple(torch.isin(tokens, some.to(tokens.device)).cpu() for some in self._ids)

    def _see_positions(self, added: Tensor, hook: Any) -> None:
        self._added = added.detach()

    def _see_stream(self, stream: Tensor, hook: Any) -> None:
        self._known = None
        if self._adds and self._added is None:  # a stream of the caller's
            return
        added = torch.zeros_like(stream[:1, :1]) if self._added is None else self._added[:, -stream.shape[1] :]
        self._known = tuple(has_id(stream.detach(), rows, added).cpu() for rows in self._rows)


def has_id(
    stream: Float[Tensor, "batch pos d_model"], rows: Float[Tensor, "id d_model"], added: Float[Tensor, "#batch #pos d_model"]
) -> Bool[Tensor, "batch pos"]:
    """Which vectors are the sum of an id's embedding and another vector.

    Args:
        stream: The vectors.
        rows: The embeddings of these ids, in the same precision.
        added: What stands beside the embedding in each of them.
    """
    wide = torch.promote_types(stream.dtype, torch.float32)
    found = torch.zeros(stream.shape[:2], dtype=torch.bool, device=stream.device)
    for row in rows.to(stream.device):
        distance = torch.linalg.vector_norm(stream.to(wide) - (row + added).to(wide), dim=-1)
        found |= distance <= _SAME * torch.linalg.vector_norm(row, dtype=wide)
    return found


def padding_id(model: Any) -> int | None:
    """The id that prompts are padded with; None where it is not known."""
    pad = getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
    return None if pad is None else int(pad)


def leading_padding(
    is_padding: Bool[Tensor, "batch pos"], blind: Bool[Tensor, "batch pos"] | None, *, begins_prompts: bool
) -> Int[Tensor, "batch"]:
    """How many tokens at the beginning of each row are padding.

    Args:
        is_padding: Where a token has the padding's id.
        blind: Which queries do not see the first key (`PassStart.blind`); None where that is not known.
        begins_prompts: Whether prompts may begin with that id themselves, because it is BOS'. Then the last of several is the prompt's own if
            it does not see the first, and all are where it does: no attention mask hides them.
    """
    run = is_padding.long().cumprod(1).sum(1)
    if not begins_prompts:
        return run
    last = (run - 1).clamp(min=0)
    hidden = torch.zeros_like(run, dtype=torch.bool) if blind is None else blind[torch.arange(len(run)), last]
    return torch.where(hidden & (run > 1), last, 0)


@torch.no_grad()
def _embedded(model: Any, ids: Tensor) -> Tensor:
    return model.embed(ids.unsqueeze(1).to(model.cfg.device))[:, 0]


def _window(model: Any, block: int) -> int | None:
    """How many tokens a block's key-value cache is limited to, the next included; None for a cache that keeps all."""
    config: Any = getattr(getattr(model, "original_model", None), "config", None)  # a HookedTransformer's cache keeps all
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = getattr(config, "layer_types", None)
    return None if kinds and kinds[block] != "sliding_attention" else getattr(config, "sliding_window", None)
