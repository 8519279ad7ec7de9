"""The stories of the fine-tunes: the same on every machine, told in whole sentences, and none of them in both parts."""

from __future__ import annotations

import random
import re

import pytest

from training.stories import GRAMMAR, SEPARATOR, read_grammar, tell_stories, tell_story


@pytest.fixture(scope="module")
def grammar():
    return read_grammar(GRAMMAR.read_text(encoding="utf-8"))


def test_bars_and_line_breaks_divide_alternatives():
    assert read_grammar("# note\n[a]\nx | y\n{b} z\n\n[b]\nw\n") == {"a": ["x", "y", "{b} z"], "b": ["w"]}


def test_every_slot_is_filled(grammar):
    rng = random.Random(0)
    text = SEPARATOR.join(tell_story(grammar, rng) for _ in range(300))
    assert not re.search(r"[{}|\[\]#_]", text)
    # The longest piece that each alternative has between its slots has been told somewhere.
    alternatives = [alternative for slot in grammar.keys() - {"cast"} for alternative in grammar[slot]]
    pieces = [max(re.split(r"{\w+}", alternative), key=len) for alternative in alternatives]
    assert [piece for piece in pieces if piece not in text and piece[0].upper() + piece[1:] not in text] == []


def test_hero_keeps_name_and_pronoun(grammar):
    rng = random.Random(1)
    girls, boys = set(grammar["girl"]), set(grammar["boy"])
    for _ in range(50):
        words = set(re.findall(r"\w+", tell_story(grammar, rng)))
        assert len(words & (girls | boys)) == 1
        friends = words & {*grammar["friend_girl"], *grammar["friend_boy"]}
        assert len(friends) == 1
        people = (words & (girls | boys)) | friends
        if people <= girls | set(grammar["friend_girl"]):
            assert not words & {"he", "He", "him"}  # "his" and "her" may be a stranger's
        if people <= boys | set(grammar["friend_boy"]):
            assert not words & {"she", "She"}


def test_the_seed_decides_and_nothing_is_in_both_parts():
    one, again, other = tell_stories(40, 10), tell_stories(40, 10), tell_stories(40, 10, seed=1)
    assert one.digest == again.digest != other.digest
    learnt, held_out = one.train.split(SEPARATOR), one.held_out.split(SEPARATOR)
    assert (len(set(learnt)), len(set(held_out))) == (40, 10)
    assert not set(learnt) & set(held_out)
