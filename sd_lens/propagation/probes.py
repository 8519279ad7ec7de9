"""Probes of a model's own vocabulary: from the names of symbols to ids, checked before any work."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

from sd_lens.models.loading import require_usable
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import decode_each
from sd_lens.propagation.families import DIGITS, PROBES, SYMBOLS, Probe
from sd_lens.propagation.lengths import require_lengths
from sd_lens.propagation.symbols import (
    Ids,
    beginning,
    encode,
    encode_after,
    one_token,
    require_ids,
    require_known,
    require_tokenizer,
)
from sd_lens.propagation.templates import TEMPLATES
from sd_lens.tracing.arguments import require_seed, require_whole

__all__ = ["DIGITS", "PROBES", "TEMPLATES", "MergedTokensWarning", "Probe", "probe", "require_lengths"]

SAMPLES = 5
"""Sequences per length of random digits where the caller does not say."""
WORD = "dog"
"""What is counted where the caller does not say."""

_TEXTS = {"zero": "0", "one": "1", "plus": "+"}
_CHANGEABLE = ("copy-first", "copy-last")


class MergedTokensWarning(UserWarning):
    """A probe was written as text, and its content is not as many tokens as its symbols are one by one."""


def probe(
    model: TransformerLensModel,
    name: str = "repeat-last",
    *,
    separator_every: int | None = None,
    separator: str | int = ",",
    before: str | Ids | None = None,
    after: str | Ids | None = None,
    template: bool = False,
    contrast: Literal["repeated", "changed"] = "repeated",
    level: Literal["tokens", "text"] = "tokens",
    symbols: Mapping[str, int | str] | None = None,
    word: str | int | Ids | None = None,
    p: float = 0.7,
    seed: int = 0,
    samples: int | None = None,
    prepend_bos: bool | None = None,
) -> Probe:
    """A family of pairs of sequences of growing length, in tokens of a model's vocabulary.

    Symbols are one token each, looked up in the vocabulary and not made by tokenising a row of them, so that a tokenizer that has a token
    for "111" does no harm. Before everything stands what the model's tokenizer puts before a text, often a BOS.

    Args:
        model: A TransformerLens model; it is not run.
        name: One of `sd_lens.propagation.probes.PROBES`: ``"repeat-last"``, ``"count-ones"``, ``"bernoulli"``, ``"copy-first"``, ``"copy-last"``,
            ``"sum"`` or ``"count-word"``.
        separator_every: Put a separator after every so many elements, though not after the last; None for none. An element repeated once more
            may thus have a separator before it.
        separator: The separator, as text of one token or as an id.
        before: Text or ids before the content.
        after: Text or ids after it, such as a question; what a model represents at the last token is then about the question's end.
        template: Put the probe's question from `TEMPLATES` around it, in place of ``before`` and ``after``.
        contrast: ``"repeated"``: a sequence beside the same with its last element once more (of a sum: one summand more). ``"changed"``: the
            zero to be copied beside a one, ``"copy-first"`` and ``"copy-last"`` only.
        level: ``"tokens"``, or ``"text"``: the probe is written out and tokenised as a whole, as a user's prompt would be.
        symbols: Ids, or other texts, for ``"zero"``, ``"one"``, ``"plus"`` and ``"separator"``; for a model without tokenizer ids of those that
            the probe uses.
        word: What ``"count-word"`` repeats: text, taken with the space it has between words, or ids. It may be several tokens, where the
            tokenizer spells it in pieces or bytes. Default: "dog".
        p: Probability of a one among the random digits of ``"bernoulli"``.
        seed: Seeds them.
        samples: Pairs per length; more than one of ``"bernoulli"`` only, where the default is 5.
        prepend_bos: Whether a BOS stands first; None is the model's default.

    Returns:
        The probe. Random digits of a shorter sequence are the first ones of any longer one.

    Raises:
        ValueError: An argument is not among those allowed, the vocabulary lacks a symbol, two symbols are the same token, or text is given
            for a model without tokenizer.

    Warns:
        MergedTokensWarning: At level ``"text"``, once a sequence is made whose content is not as many tokens as at level ``"tokens"``.

    Example:
        >>> from sd_lens.models.loading import load
        >>> model = load("tiny")
        >>> ones = probe(model, "count-ones", separator_every=3)
        >>> model.tokenizer.decode(ones.sequence(7))
        '<s>111,111,1'
        >>> first, second = probe(model, "copy-first", contrast="changed", prepend_bos=False).pair(5)
        >>> model.tokenizer.decode(first), model.tokenizer.decode(second)
        ('01111', '11111')
        >>> ones.answer(7)
        7
    """
    require_usable(model)
    _require_options(name, contrast, level, separator_every, p, seed)
    n_samples = _require_samples(name, samples)
    if template:
        if before is not None or after is not None:
            raise ValueError("template: got True with before or after; allowed: the one or the other")
        before, after = TEMPLATES[name]
        require_tokenizer(model, "template", True, "before and after as token ids")
    if level == "text":
        require_tokenizer(model, "level", level, "'tokens'")
    chosen = _symbols(model, name, separator_every is not None, separator, symbols or {})
    units = _word(model, name, word)
    start, end = _before(model, before, prepend_bos), _after(model, after)
    ids = [*chosen.values(), *units, *start, *end]
    return Probe(
        name=name,
        contrast=contrast,
        level=level,
        samples=n_samples,
        separator_every=separator_every,
        symbols=chosen,
        word=units,
        before=start,
        after=end,
        p=p,
        seed=seed,
        texts=dict(zip(ids, decode_each(model, ids), strict=True)),
        model_name=str(model.cfg.model_name),
        _as_text=_writer(model, before, after, prepend_bos) if level == "text" else None,
    )


def as_probe(model: TransformerLensModel, given: Probe | str) -> Probe:
    """A probe, or the plain one of a name.

    Args:
        model: A TransformerLens model.
        given: A probe or its name.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(given, str):
        return probe(model, given)
    if not isinstance(given, Probe):
        raise ValueError(f"probe: got {type(given).__name__}; allowed: a Probe or its name")
    return given


def _require_options(name: str, contrast: str, level: str, separator_every: int | None, p: float, seed: int) -> None:
    if name not in PROBES:
        raise ValueError(f"name: got {name!r}; allowed: {', '.join(map(repr, PROBES))}")
    if contrast not in ("repeated", "changed"):
        raise ValueError(f"contrast: got {contrast!r}; allowed: 'repeated', 'changed'")
    if contrast == "changed" and name not in _CHANGEABLE:
        raise ValueError(
            f"contrast: got 'changed' with {name!r}; allowed: 'repeated', or a probe among {', '.join(map(repr, _CHANGEABLE))}"
        )
    if level not in ("tokens", "text"):
        raise ValueError(f"level: got {level!r}; allowed: 'tokens', 'text'")
    if separator_every is not None:
        require_whole("separator_every", separator_every, 1)
    if not isinstance(p, int | float) or not 0 < p < 1:
        raise ValueError(f"p: got {p!r}; allowed: between 0 and 1, both excluded")
    require_seed(seed)


def _require_samples(name: str, samples: int | None) -> int:
    if samples is None:
        return SAMPLES if name == "bernoulli" else 1
    require_whole("samples", samples, 1)
    if samples > 1 and name != "bernoulli":
        raise ValueError(f"samples: got {samples} with {name!r}, which has one pair per length; allowed: 1, or 'bernoulli'")
    return samples


def _symbols(model: Any, name: str, separated: bool, separator: str | int, given: Mapping[str, int | str]) -> dict[str, int]:
    unknown = [symbol for symbol in given if symbol not in (*_TEXTS, "separator")]
    if unknown:
        raise ValueError(f"symbols: got {unknown[0]!r}; allowed: {', '.join(map(repr, (*_TEXTS, 'separator')))}")
    used = (*SYMBOLS[name], "separator") if separated else SYMBOLS[name]
    texts: dict[str, int | str] = {**_TEXTS, "separator": separator, **given}
    ids = {symbol: one_token(model, texts[symbol], argument=f"symbols.{symbol}") for symbol in used}
    for symbol, token in ids.items():
        same = next((other for other in ids if other != symbol and ids[other] == token), None)
        if same:
            raise ValueError(f"symbols: got the token {token} as {symbol!r} and {same!r}; allowed: different tokens")
    return ids


def _word(model: Any, name: str, word: str | int | Ids | None) -> tuple[int, ...]:
    if name != "count-word":
        if word is not None:
            raise ValueError(f"word: got {word!r} with {name!r}; allowed: None, or 'count-word'")
        return ()
    word = WORD if word is None else word
    if not isinstance(word, str):
        return require_ids(model, "word", [word] if isinstance(word, int) else word)
    require_tokenizer(model, "word", word, "token ids")
    if not word.strip():
        raise ValueError(f"word: got {word!r}; allowed: a word")
    return require_known(model, "word", word, encode_after(model, f" {word.strip()}", anchors=(word.strip(),)))


def _before(model: Any, before: str | Ids | None, prepend_bos: bool | None) -> tuple[int, ...]:
    start = beginning(model, prepend_bos)
    if not before:
        return start
    if isinstance(before, str):
        require_tokenizer(model, "before", before, "token ids")
        return (*start, *require_known(model, "before", before, encode(model, before)))
    ids = require_ids(model, "before", before)
    return ids if ids[: len(start)] == start else (*start, *ids)


def _after(model: Any, after: str | Ids | None) -> tuple[int, ...]:
    if not after:
        return ()
    if isinstance(after, str):
        require_tokenizer(model, "after", after, "token ids")
        return require_known(model, "after", after, encode_after(model, after))
    return require_ids(model, "after", after)


def _writer(
    model: Any, before: str | Ids | None, after: str | Ids | None, prepend_bos: bool | None
) -> Callable[[list[int]], list[int]]:
    """A function from the content's ids to those of the whole probe, written out and tokenised in one piece."""

    def text_of(ids: Ids) -> str:
        return str(model.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    head, tail = (side if isinstance(side, str) else text_of(side) if side else "" for side in (before, after))
    start = beginning(model, prepend_bos)
    warned = False

    def write(content: list[int]) -> list[int]:
        text = text_of(content).lstrip(" ")
        if head and decode_each(model, content[:1])[0].startswith(" "):
            text = f" {text}"
        # Tokens of nothing but space do not count: some tokenizers begin whatever they read with one.
        seen, meant = (sum(bool(piece.strip(" ")) for piece in decode_each(model, ids)) for ids in (encode(model, text), content))
        nonlocal warned
        if seen != meant and not warned:
            warned = True
            warnings.warn(
                f"tokenised as text, {text[:12]!r}... is {seen} tokens and not {meant}: the model does not see the elements one by one "
                "(level='tokens' shows it each of them)",
                MergedTokensWarning,
                stacklevel=4,
            )
        return [*start, *encode(model, head + text + tail)]

    return write
