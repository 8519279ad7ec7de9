"""Whether a model adds a positional embedding to the stream, found by running one token through it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sd_lens.models import hook_names
from sd_lens.models.loading import inference
from sd_lens.models.protocol import TransformerLensModel


def adds_positions(model: TransformerLensModel) -> bool:
    """Whether the stream that enters block 0 is a token's embedding plus a positional one, each with its hook point.

    Names do not tell: models with rotary positions may have a hook point for positions that is never reached, and there are models whose
    positional embedding goes to queries and keys only.

    Args:
        model: A TransformerLens model.
    """
    points = [hook_names.embed(), hook_names.pos_embed(), hook_names.resid_pre(0)]
    known: Any = model
    if not all(point in known.hook_dict for point in points):
        return False
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(value: Tensor, hook: Any) -> None:
            seen[name] = value.float()

        return hook

    token = torch.zeros(1, 1, dtype=torch.long, device=model.cfg.device)
    with inference(model):
        hooks = [(name, keep(name)) for name in points]
        # One block of a model of one block is all of it, which the smallest prompt makes cheap.
        model.run_with_hooks(token, fwd_hooks=hooks, return_type=None, stop_at_layer=1)
    if len(seen) < len(points):
        return False
    embed, position, stream = (seen[name] for name in points)
    return bool((embed + position - stream).abs().max() <= 1e-2 * stream.abs().max())
