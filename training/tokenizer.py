"""The tokenizer: byte-level BPE learnt from the corpus, with BOS put in front by its template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, UNK = "<s>", "</s>", "<unk>"
# Six ids that no text produces; the synthetic half of the batches uses them as triggers.
TRIGGERS = tuple(f"<t{index}>" for index in range(6))
# The same order of ids as Llama's first tokenizer: unknown 0, BOS 1, EOS 2.
SPECIAL_TOKENS = (UNK, BOS, EOS, *TRIGGERS)
# Line breaks are pieces of their own, so that a blank line is one token.
_WORDS = r"'(?:[sdmt]|ll|ve|re)|\n+| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|[^\S\n]+"
_CHUNK = 100_000


def _chunks(text: str) -> Iterator[str]:
    """Cut the text into pieces the trainer can take one after the other.

    Args:
        text: The corpus.

    Yields:
        Consecutive parts of the text.
    """
    for start in range(0, len(text), _CHUNK):
        yield text[start : start + _CHUNK]


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE vocabulary.

    Args:
        text: The text to learn it from.
        vocab_size: Number of ids, special tokens included.

    Returns:
        A tokenizer that puts ``<s>`` in front of every text.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_chunks(text), trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, bos_id)],
    )
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a long text without BOS.

    Args:
        tokenizer: The tokenizer.
        text: The text.

    Returns:
        Its ids in one list.
    """
    parts = tokenizer.encode_batch(list(_chunks(text)), add_special_tokens=False)
    return [token for part in parts for token in part.ids]


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_positions: int) -> None:
    """Write the two files with which ``AutoTokenizer`` loads the tokenizer offline.

    Args:
        tokenizer: The tokenizer.
        folder: Folder of the model.
        max_positions: Longest sequence the model takes.
    """
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "backend": "tokenizers",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": max_positions,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNK,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
