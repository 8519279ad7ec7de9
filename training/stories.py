"""Another text to learn: short children's stories, written by a grammar from a seed.

They share the alphabet with the documentation of the standard library and little else: past tense, names, speech, no code. A story
draws its cast once, so that a name, once met, comes back.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from pathlib import Path

GRAMMAR = Path(__file__).with_name("stories.txt")
SEPARATOR = "\n\n"
PARAGRAPHS = (("opening", "habit"), ("trouble", "search"), ("meeting", "help", "found", "ending"))
_PRONOUNS = {"girl": ("she", "her", "her"), "boy": ("he", "him", "his")}
_SLOT = re.compile(r"{(\w+)}")

Grammar = dict[str, list[str]]


@dataclass(frozen=True)
class Stories:
    """Stories split into a training and a held-out part.

    Attributes:
        train: Stories separated by blank lines.
        held_out: Other stories, told by the same grammar.
    """

    train: str
    held_out: str

    @property
    def digest(self) -> str:
        """SHA-256 of the whole text, which identifies it."""
        return hashlib.sha256((self.train + "\0" + self.held_out).encode()).hexdigest()


def read_grammar(text: str) -> Grammar:
    """Alternatives of every slot.

    Args:
        text: Names of slots in brackets, each followed by its alternatives, divided by line breaks or bars.

    Returns:
        Alternatives by name of the slot.
    """
    grammar: Grammar = {}
    slot = ""
    for line in text.splitlines():
        if line.startswith("["):
            slot = line.strip("[]")
            grammar[slot] = []
        elif line and not line.startswith("#"):
            grammar[slot] += line.split(" | ")
    return grammar


def _draw_cast(grammar: Grammar, rng: random.Random) -> dict[str, str]:
    """Choose what stays the same throughout a story.

    Args:
        grammar: The grammar.
        rng: Source of randomness.

    Returns:
        Word or phrase by name of the slot.
    """
    cast = {slot: rng.choice(grammar[slot]) for slot in grammar["cast"]}
    for who, prefix in (("name", ""), ("friend", "friend_")):
        sex = rng.choice(sorted(_PRONOUNS))
        cast[who] = rng.choice(grammar[prefix + sex])
        slots = (f"{prefix}they", f"{prefix}them", f"{prefix}their")
        cast |= dict(zip(slots, _PRONOUNS[sex], strict=True))
    return cast


def _fill(template: str, grammar: Grammar, cast: dict[str, str], rng: random.Random) -> str:
    """Replace the slots of a template, and those of what they are replaced by.

    Args:
        template: Text with slots in braces; what fills one that begins with a capital letter is capitalised.
        grammar: The grammar.
        cast: What is fixed.
        rng: Source of randomness for the rest.

    Returns:
        The text.
    """

    def filling(match: re.Match[str]) -> str:
        slot = match[1].lower()
        words = cast[slot] if slot in cast else _fill(rng.choice(grammar[slot]), grammar, cast, rng)
        return words[0].upper() + words[1:] if match[1][0].isupper() else words

    return _SLOT.sub(filling, template)


def tell_story(grammar: Grammar, rng: random.Random) -> str:
    """One story of three paragraphs.

    Args:
        grammar: The grammar.
        rng: Source of randomness.

    Returns:
        The story.
    """
    cast = _draw_cast(grammar, rng)
    counts = {"habit": rng.randint(1, 2), "search": rng.randint(1, 3)}

    def sentences(part: str) -> str:
        return " ".join(_fill(template, grammar, cast, rng) for template in rng.sample(grammar[part], counts.get(part, 1)))

    return "\n".join(" ".join(map(sentences, parts)) for parts in PARAGRAPHS)


def tell_stories(count: int = 3000, held_out: int = 100, seed: int = 0) -> Stories:
    """Stories to fine-tune on.

    Args:
        count: How many stories to learn.
        held_out: How many others to keep for measuring.
        seed: Decides all of them.

    Returns:
        The stories.
    """
    grammar, rng = read_grammar(GRAMMAR.read_text(encoding="utf-8")), random.Random(seed)
    stories = [tell_story(grammar, rng) for _ in range(count + held_out)]
    return Stories(train=SEPARATOR.join(stories[:count]), held_out=SEPARATOR.join(stories[count:]))
