"""Arguments that several functions share, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from sd_lens.interventions.intervention import Intervention
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import Prompts, tokenize
from sd_lens.tracing.arguments import require_whole


def one_prompt(model: TransformerLensModel, prompt: Prompts, *, prepend_bos: bool | None = None) -> Int[Tensor, "pos"]:
    """Token ids of a prompt.

    Args:
        model: A TransformerLens model.
        prompt: One prompt, as text or token ids.
        prepend_bos: Passed to the tokenisation of a string; None is the model's default.

    Raises:
        ValueError: The prompt is unusable, or there are several.
    """
    sequences = tokenize(model, prompt, prepend_bos=prepend_bos)
    if len(sequences) != 1:
        raise ValueError(f"prompt: got {len(sequences)}; allowed: one")
    return sequences[0]


def require_position(position: Any, n: int) -> int:
    """A position counted from the start.

    Args:
        position: Position, negative from the end.
        n: How many there are.

    Raises:
        ValueError: There is no such position.
    """
    if not isinstance(position, int) or isinstance(position, bool) or not -n <= position < n:
        raise ValueError(f"position: got {position!r}; allowed: {-n} to {n - 1}")
    return position % n


def require_intervention(model: TransformerLensModel, intervention: Any) -> None:
    """Raises `ValueError` unless an intervention is one of this model, or None.

    Args:
        model: A TransformerLens model.
        intervention: What was given.
    """
    if intervention is not None and (not isinstance(intervention, Intervention) or intervention.model is not model):
        got = "one of another model" if isinstance(intervention, Intervention) else type(intervention).__name__
        raise ValueError(f"intervention: got {got}; allowed: an Intervention of this model, or None")


def whole_numbers(argument: str, values: Any, least: int, *, even: bool = False) -> tuple[int, ...]:
    """Whole numbers, each once and in ascending order.

    Args:
        argument: What they are called.
        values: What was given.
        least: The smallest allowed.
        even: Whether they must be even.

    Raises:
        ValueError: They are none, or no whole numbers from ``least`` on.
    """
    kind = "even" if even else "whole"
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ValueError(f"{argument}: got {values!r}; allowed: at least one {kind} number from {least}")
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < least or (even and value % 2):
            raise ValueError(f"{argument}: got {value!r}; allowed: {kind} numbers from {least}")
    return tuple(sorted(set(values)))


def chosen(argument: str, values: Any, allowed: Sequence[Any]) -> tuple[Any, ...]:
    """Some of what is allowed, each once, as given.

    Args:
        argument: What they are called.
        values: What was given.
        allowed: What may be given.

    Raises:
        ValueError: They are none, or others.
    """
    words = ", ".join(map(str, allowed))
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ValueError(f"{argument}: got {values!r}; allowed: at least one of {words}")
    for value in values:
        if value not in allowed:
            raise ValueError(f"{argument}: got {value!r}; allowed: {words}")
    return tuple(dict.fromkeys(values))


def require_heads(n_heads: Any, d_model: Any) -> None:
    """Raises `ValueError` unless a width splits into heads of even width, which rotations and sinusoids need."""
    require_whole("d_model", d_model, 2)
    require_whole("n_heads", n_heads, 1)
    if d_model % (2 * n_heads):
        raise ValueError(f"n_heads: got {n_heads} at d_model {d_model}; allowed: numbers that leave each head an even width")
