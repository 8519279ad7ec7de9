"""The tokens that probes are made of: symbols of one token each, words of several, and what stands before a text.

Tokenizers merge: a row of ones is seldom as many tokens as it has digits. A probe is therefore put together from ids, and this file finds
the id of a symbol as the tokenizer has it: the piece without a leading space where there is one, else the piece with it, in byte-level
and SentencePiece vocabularies alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import decode_each

Ids = Sequence[int]
"""Token ids."""

_SPACES = ("", "\u0120", "\u2581")  # how vocabularies write a leading space: not at all, byte-level, SentencePiece
_ANCHORS = ("=", ":", "a")


def has_tokenizer(model: TransformerLensModel) -> bool:
    """Whether a model can read text.

    Args:
        model: A TransformerLens model.
    """
    return getattr(model, "tokenizer", None) is not None


def require_tokenizer(model: TransformerLensModel, argument: str, got: object, allowed: str) -> None:
    """Raises `ValueError` for text where a model has no tokenizer.

    Args:
        model: A TransformerLens model.
        argument: What the text was given as.
        got: The text.
        allowed: What to give instead.
    """
    if not has_tokenizer(model):
        raise ValueError(f"{argument}: got {got!r} for a model without tokenizer; allowed: {allowed}")


def require_ids(model: TransformerLensModel, argument: str, ids: Ids) -> tuple[int, ...]:
    """The ids, if there are any and all are of the model's vocabulary.

    Args:
        model: A TransformerLens model.
        argument: What the ids were given as.
        ids: Token ids.

    Raises:
        ValueError: There are none, or one is no id of the vocabulary.
    """
    vocabulary = int(model.cfg.d_vocab)
    if not ids:
        raise ValueError(f"{argument}: got no token; allowed: at least one")
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
            raise ValueError(f"{argument}: got {token!r}; allowed: token ids, 0 to {vocabulary - 1}")
    return tuple(ids)


def one_token(model: TransformerLensModel, symbol: int | str, *, argument: str) -> int:
    """The id of a symbol that is to be one token.

    Args:
        model: A TransformerLens model.
        symbol: An id, or text: the token that reads like it, without a leading space if there is such a token, else with one.
        argument: What the symbol was given as, for complaints.

    Raises:
        ValueError: The vocabulary has no such token, or the model no tokenizer to look text up with.

    Example:
        >>> from sd_lens.models.loading import load
        >>> model = load("tiny")
        >>> one_token(model, "+", argument="separator"), one_token(model, 19, argument="separator")
        (19, 19)
    """
    if not isinstance(symbol, str):
        return require_ids(model, argument, [symbol])[0]
    require_tokenizer(model, argument, symbol, f"a token id, such as symbols={{{argument.split('.')[-1]!r}: 5}}")
    found = [token for token in _pieces(model, symbol) if 0 <= token < int(model.cfg.d_vocab)]
    texts = decode_each(model, found)
    for read in (str, str.strip):
        for token, text in zip(found, texts, strict=True):
            if read(text) == (symbol if read is str else symbol.strip()) and text.strip(" "):
                return token
    raise ValueError(
        f"{argument}: the vocabulary of {model.cfg.model_name} has no token {symbol!r}; allowed: text that is one token, or a token id"
    )


def _pieces(model: Any, symbol: str) -> Iterator[int]:
    """Ids that may be the symbol's, the likelier ones first."""
    for text in (symbol, f" {symbol}"):
        ids = encode(model, text)
        if len(ids) == 1:
            yield ids[0]
    for space in _SPACES:
        token = model.tokenizer.convert_tokens_to_ids(space + symbol)
        if token is not None:
            yield int(token)


def encode(model: Any, text: str) -> list[int]:
    """Token ids of a text without a BOS; none of an empty one.

    Args:
        model: A TransformerLens model with a tokenizer.
        text: The text.
    """
    return model.to_tokens(text, prepend_bos=False, truncate=False)[0].tolist() if text else []


def require_known(model: Any, argument: str, text: str, ids: Sequence[int]) -> tuple[int, ...]:
    """Token ids of a text, unless the tokenizer has put its unknown token in them for what it cannot spell.

    Args:
        model: A TransformerLens model with a tokenizer.
        argument: What the text was given as.
        text: The text.
        ids: Its token ids.

    Raises:
        ValueError: The unknown token is among them.
    """
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in ids and unknown != getattr(model.tokenizer, "eos_token_id", None):
        raise ValueError(
            f"{argument}: got {text!r}, of which the vocabulary lacks a part (token {model.tokenizer.unk_token!r} would stand for it); "
            "allowed: text of its tokens, or token ids"
        )
    return require_ids(model, argument, ids)


def encode_after(model: Any, text: str, anchors: Sequence[str] = _ANCHORS) -> list[int]:
    """Token ids of a text where it stands behind other text, without the space that some tokenizers put before all that they read.

    Args:
        model: A TransformerLens model with a tokenizer.
        text: The text.
        anchors: Texts to put before it; the first that keeps its own tokens is taken, and none if there is none.

    Example:
        >>> from sd_lens.models.loading import load
        >>> model = load("tiny")
        >>> model.tokenizer.convert_ids_to_tokens(encode_after(model, " one"))
        ['Ġone']
    """
    for anchor in anchors:
        alone, both = encode(model, anchor), encode(model, anchor + text)
        if both[: len(alone)] == alone:
            return both[len(alone) :]
    return encode(model, text)


def beginning(model: Any, prepend_bos: bool | None) -> tuple[int, ...]:
    """What the model's conventions put before a text: often one BOS, else nothing.

    Args:
        model: A TransformerLens model; nothing stands before the ids of one without tokenizer.
        prepend_bos: Whether BOS is wanted; None is the model's default.

    Raises:
        ValueError: BOS is wanted of a model without tokenizer.
    """
    if not has_tokenizer(model):
        if prepend_bos:
            raise ValueError(
                "prepend_bos: got True for a model without tokenizer; allowed: None or False, and BOS among the ids of `before`"
            )
        return ()
    bare = encode(model, "a")
    whole = model.to_tokens("a", prepend_bos=prepend_bos, truncate=False)[0].tolist()
    return tuple(whole[: len(whole) - len(bare)]) if whole[len(whole) - len(bare) :] == bare else ()
