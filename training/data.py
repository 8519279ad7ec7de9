"""Corpus, tokenizer and ids of a run, made once and kept in the working folder."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from training.batches import Bigrams, Ids
from training.corpus import build_corpus
from training.tokenizer import BOS, EOS, TRIGGERS, encode, train_tokenizer

logger = logging.getLogger(__name__)

Facts = dict[str, int | str]


@dataclass(frozen=True)
class Data:
    """What the batches of a run are made from.

    Attributes:
        tokenizer: The tokenizer.
        bigrams: The training text, indexed for drawing successors.
        held_out: Ids of the held-out text.
        bos: Id of BOS.
        eos: Id of EOS.
        triggers: Ids of the triggers.
        facts: Where the text comes from and how much there is, for the model card.
    """

    tokenizer: Tokenizer
    bigrams: Bigrams
    held_out: Ids
    bos: int
    eos: int
    triggers: Ids
    facts: Facts


def special_id(tokenizer: Tokenizer, name: str) -> int:
    """Id of a special token.

    Args:
        tokenizer: The tokenizer.
        name: The token.

    Returns:
        Its id.

    Raises:
        ValueError: The tokenizer does not have it.
    """
    number = tokenizer.token_to_id(name)
    if number is None:
        raise ValueError(f"name: the tokenizer has no {name!r}; allowed: its special tokens")
    return number


def data_of_ids(tokenizer: Tokenizer, train: Ids, held_out: Ids, facts: Facts) -> Data:
    """Data from text that is already ids.

    Args:
        tokenizer: The tokenizer the ids are of.
        train: Ids of the training text.
        held_out: Ids of the held-out text.
        facts: Where the text comes from.

    Returns:
        The data.
    """
    return Data(
        tokenizer=tokenizer,
        bigrams=Bigrams.of(train, tokenizer.get_vocab_size()),
        held_out=held_out,
        bos=special_id(tokenizer, BOS),
        eos=special_id(tokenizer, EOS),
        triggers=np.array([special_id(tokenizer, name) for name in TRIGGERS], dtype=np.int64),
        facts=facts,
    )


def data_of_text(tokenizer: Tokenizer, train: str, held_out: str, facts: Facts) -> Data:
    """Data from any text, for instance to fine-tune on.

    Args:
        tokenizer: The tokenizer.
        train: Training text.
        held_out: Held-out text.
        facts: Where the text comes from; the numbers of tokens are added.

    Returns:
        The data.
    """
    train_ids, held_out_ids = (np.array(encode(tokenizer, text), dtype=np.int64) for text in (train, held_out))
    counts: Facts = {"train_tokens": len(train_ids), "held_out_tokens": len(held_out_ids)}
    return data_of_ids(tokenizer, train_ids, held_out_ids, facts | counts)


def _library_data(vocab_size: int) -> Data:
    """Data from the standard library, with a tokenizer learnt from it.

    Args:
        vocab_size: Number of ids.

    Returns:
        The data.
    """
    corpus = build_corpus()
    tokenizer = train_tokenizer(corpus.train, vocab_size)
    facts: Facts = {
        "python": corpus.python,
        "sha256": corpus.digest,
        "documents": corpus.documents,
        "characters": len(corpus.train) + len(corpus.held_out),
        **{f"left out, {reason}": count for reason, count in corpus.skipped.items()},
    }
    return data_of_text(tokenizer, corpus.train, corpus.held_out, facts)


def _save(data: Data, folder: Path) -> None:
    """Write data down.

    Args:
        data: The data.
        folder: Folder to write to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data.tokenizer.save(str(folder / "tokenizer.json"))
    np.savez(folder / "ids.npz", train=data.bigrams.stream, held_out=data.held_out)
    # Written last: its presence says that the folder is complete.
    (folder / "facts.json").write_text(json.dumps(data.facts, indent=2) + "\n", encoding="utf-8")


def _load(folder: Path) -> Data:
    """Read data that were written down.

    Args:
        folder: Folder to read from.

    Returns:
        The data.
    """
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    ids = np.load(folder / "ids.npz")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return data_of_ids(tokenizer, ids["train"], ids["held_out"], facts)


def load_data(work: Path, vocab_size: int) -> Data:
    """Corpus, tokenizer and ids, from the working folder if they are there already.

    Args:
        work: Working folder.
        vocab_size: Number of ids of the tokenizer.

    Returns:
        The data.
    """
    folder = work / f"data-{vocab_size}"
    if not (folder / "facts.json").exists():
        logger.info("reading the standard library")
        _save(_library_data(vocab_size), folder)
    data = _load(folder)
    logger.info("corpus: %s", data.facts)
    return data
