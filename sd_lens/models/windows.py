"""The sliding window of a model's attention, and the model without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sd_lens.models.key_values import is_hooked
from sd_lens.models.protocol import TransformerLensModel

_WIDE = 1 << 30  # wider than any context


def sliding_window(model: TransformerLensModel) -> int | None:
    """How many tokens a query of some block sees, itself included; None where every block sees all.

    Args:
        model: The model.
    """
    if is_hooked(model):
        blocks: Any = getattr(model, "blocks")  # noqa: B009  # the protocol has none
        return int(model.cfg.window_size) if any(block.attn.attn_type == "local" for block in blocks) else None
    config = _config(model)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or getattr(config, "use_sliding_window", True) is False or (kinds and "sliding_attention" not in kinds):
        return None
    return int(window)


@contextmanager
def without_window(model: TransformerLensModel) -> Iterator[None]:
    """Whatever runs the model in the body runs it with attention to all earlier tokens in every block.

    Args:
        model: A model with a sliding window (`sliding_window`); as before afterwards.
    """
    # Masks and key-value caches are made anew for every pass from what the configuration says.
    config, name = (model.cfg, "window_size") if is_hooked(model) else (_config(model), "sliding_window")
    window = getattr(config, name)
    setattr(config, name, _WIDE)
    try:
        yield
    finally:
        setattr(config, name, window)


def _config(model: Any) -> Any:
    return model.original_model.config.get_text_config()
