"""Whether a model can be shown a probe at some lengths: the vocabulary must be the probe's, and the context long enough."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, SupportsIndex

from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import decode_each
from sd_lens.propagation.families import Probe


def require_lengths(model: TransformerLensModel, probe: Probe, lengths: Iterable[SupportsIndex]) -> tuple[int, ...]:
    """Lengths in order and each once, if the probe is one of the model and the pairs of all of them fit into its context.

    Args:
        model: A TransformerLens model.
        probe: A probe of its vocabulary.
        lengths: Numbers of content elements.

    Raises:
        ValueError: The probe's ids are not of the model's vocabulary, or other texts there; there is no length, one is below 1, or a
            sequence is longer than the model's context.

    Example:
        >>> from sd_lens.models.loading import load
        >>> from sd_lens.propagation.probes import probe
        >>> model = load("tiny")
        >>> require_lengths(model, probe(model), [16, 4, 8, 4])
        (4, 8, 16)
    """
    _require_own(model, probe)
    whole = [(length, _index(length)) for length in lengths]
    wrong = [length for length, number in whole if number is None or number < 1]
    if wrong or not whole:
        raise ValueError(
            f"lengths: got {wrong[0] if wrong else 'none'}; allowed: at least one whole number of elements, each at least 1"
        )
    ordered = tuple(sorted({number for _, number in whole if number is not None}))
    context = getattr(model.cfg, "n_ctx", None)
    longest = probe.longest(ordered)
    if context and longest > context:
        raise ValueError(
            f"lengths: got {ordered[-1]}, whose longest sequence has {longest} tokens; allowed: sequences of at most {context} tokens, "
            "the model's context"
        )
    return ordered


def _index(length: Any) -> int | None:
    """A whole number, numpy's too, as Python's; None for anything else."""
    try:
        return None if isinstance(length, bool) else operator.index(length)
    except TypeError:
        return None


def _require_own(model: TransformerLensModel, probe: Probe) -> None:
    """Names do not tell: models of a family share a vocabulary, and a changed model may keep its name."""
    vocabulary = int(model.cfg.d_vocab)
    largest = max(probe.texts)
    if largest >= vocabulary:
        raise ValueError(
            f"probe: got ids up to {largest}, of {probe.model_name!r}; allowed: ids of this model, up to {vocabulary - 1}"
        )
    ids, texts = list(probe.texts), list(probe.texts.values())
    bare = [f"<{token}>" for token in ids]  # texts of a model without tokenizer
    if bare not in (texts, found := decode_each(model, ids)) and found != texts:
        raise ValueError(f"probe: got one of {probe.model_name!r}; allowed: one made for this model")
