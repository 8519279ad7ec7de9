"""What layers, metrics and lines of collapse are called."""

from __future__ import annotations

from sd_lens.display.style import BLUE, GREEN, ORANGE, VERMILLION
from sd_lens.propagation.curve import LAYER

DTYPE_COLOURS = {"float64": GREEN, "float32": BLUE, "bfloat16": VERMILLION, "float16": ORANGE}
"""One colour for each precision."""

_ORDERS = {"linf": "L∞ distance", "l2": "L2 distance", "l1": "L1 distance"}
_NAMES = {
    **_ORDERS,
    **{f"{name}_heads": f"{words} of head-sized chunks" for name, words in _ORDERS.items()},
    "relative": "L2 distance over the length",
    "cosine": "1 − cosine",
    "kl": "KL divergence in nats",
    "argmax": "share of pairs of different predictions",
}


def layer_name(layer: LAYER) -> str:
    """Where in a model: ``after block 3``.

    Args:
        layer: A block, ``"final"`` or ``"logits"``.
    """
    return {"final": "after the final norm", "logits": "of the predictions"}.get(str(layer), f"after block {layer}")


def metric_name(metric: str) -> str:
    """What a metric measures, in a few words.

    Args:
        metric: A name of `METRICS`.
    """
    return _NAMES.get(metric, metric)


def metric_axis(metric: str) -> str:
    """The same as the title of an axis, in lines that are no longer than the axis is high.

    Args:
        metric: A name of `METRICS`.
    """
    scale = "" if metric == "argmax" else "(log scale)"
    return f"{metric_name(metric)}<br>{scale}" if scale else metric_name(metric).replace(" of ", "<br>of ", 1)


def length_text(length: int | None, longest: int) -> str:
    """A critical length, in a table: ``none up to 256`` where there is none.

    Args:
        length: The length, None where there is none.
        longest: Longest length measured.
    """
    return f"none up to {longest:,}" if length is None else f"{length:,}"
