import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer import tiny_tokenizer, with_tokenizer
from tokenizers import decoders, models, pre_tokenizers, processors
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import PreTrainedTokenizerFast

from sd_lens.propagation.probes import PROBES, TEMPLATES, MergedTokensWarning, probe, require_lengths

PAIRS = {
    "repeat-last": ("1110", "11100"),
    "count-ones": ("1111", "11111"),
    "copy-first": ("0111", "01111"),
    "copy-last": ("1110", "11100"),
    "sum": ("1+1+1+1", "1+1+1+1+1"),
    "count-word": (" cat cat cat cat", " cat cat cat cat cat"),
}
SEPARATED = {
    "repeat-last": ("111,0", "111,00"),
    "count-ones": ("111,1", "111,11"),
    "copy-first": ("011,1", "011,11"),
    "copy-last": ("111,0", "111,00"),
    "sum": ("1+1+1,+1", "1+1+1,+1+1"),
    "count-word": (" cat cat cat, cat", " cat cat cat, cat cat"),
}


@pytest.fixture(scope="module")
def model():
    """A model whose tokens are single characters, and which puts a BOS before every text."""
    return with_tokenizer("gpt2")


def ids(text, bos=True):
    """By hand: one token per character."""
    vocabulary = tiny_tokenizer().get_vocab()
    return [zoo.BOS] * bos + [vocabulary[character] for character in text]


def bridge(pieces, merges, *, metaspace=False):
    """A model whose tokenizer merges, byte-level pieces' or SentencePiece's way of writing spaces."""
    pieces = ["<s>", "<unk>", *pieces]
    core = tokenizers.Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    if metaspace:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        core.decoder = decoders.Metaspace(prepend_scheme="always")
    # Tokenizers without a BOS of their own TransformerLens would load again, from a folder that is not there.
    core.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)])
    special = dict.fromkeys(("bos_token", "pad_token", "eos_token"), "<s>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, name_or_path="merging", unk_token="<unk>", add_bos_token=True, **special
    )
    hf = zoo.hf_model("gpt2")
    return build_bridge_from_module(hf, architecture=type(hf).__name__, hf_config=hf.config, tokenizer=tokenizer).eval()


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_what_they_are_said_to_be(model, name):
    word = "cat" if name == "count-word" else None
    for every, expected in ((None, PAIRS), (3, SEPARATED)):
        found = probe(model, name, separator_every=every, word=word)
        first, second = found.pair(4)
        assert first.tolist() == ids(expected[name][0])
        assert second.tolist() == ids(expected[name][1])
        assert found.sequence(4).equal(first)
    assert probe(model, name, separator_every=4, word=word).sequence(4).tolist() == ids(PAIRS[name][0])  # none after the last


def test_the_digit_to_copy_may_be_changed(model):
    for name, first, second in (("copy-first", "0111", "1111"), ("copy-last", "1110", "1111")):
        found = probe(model, name, contrast="changed", prepend_bos=False)
        assert [side.tolist() for side in found.pair(4)] == [ids(first, bos=False), ids(second, bos=False)]
        assert found.answers(4) == (0, 1)
        assert found.longest([2, 4]) == 4


@settings(max_examples=15)
@given(name=st.sampled_from(list(PROBES)), length=st.integers(1, 20), every=st.none() | st.integers(1, 5), seed=st.integers(0, 99))
def test_answers_are_those_of_the_text(model, name, length, every, seed):
    found = probe(model, name, separator_every=every, seed=seed, prepend_bos=False)
    for tokens, answer in zip(found.pair(length, found.samples - 1), found.answers(length, found.samples - 1), strict=True):
        text = model.tokenizer.decode(tokens).replace(",", "")
        by_hand = {
            "repeat-last": lambda text: int(text[-1]),
            "copy-first": lambda text: int(text[0]),
            "copy-last": lambda text: int(text[-1]),
            "sum": lambda text: sum(map(int, text.split("+"))),
            "count-word": lambda text: len(text.split()),
        }
        assert answer == by_hand.get(name, lambda text: text.count("1"))(text)
    assert found.longest([length]) == max(map(len, found.pair(length)))


def test_shorter_sequences_of_random_digits_begin_longer_ones(model):
    found = probe(model, "bernoulli", seed=3)
    assert found.samples == 5
    whole = [found.sequence(2000, sample) for sample in range(5)]
    for length in (1, 7, 1000):
        for sample in range(5):
            assert found.sequence(length, sample).equal(whole[sample][: length + 1])
    drawn = torch.stack(whole)[:, 1:] == ids("1")[1]
    assert abs(drawn.double().mean() - 0.7) < 4 * (0.7 * 0.3 / drawn.numel()) ** 0.5
    # Independent sequences agree where both have a one or both a zero: 0.58 of the places.
    agree = (drawn[0] == drawn[1]).double().mean()
    assert abs(agree - 0.58) < 4 * (0.58 * 0.42 / 2000) ** 0.5
    assert probe(model, "bernoulli", seed=3, samples=1).sequence(2000).equal(whole[0])
    assert not probe(model, "bernoulli", seed=4).sequence(2000).equal(whole[0])
    first, second = found.pair(50, 2)
    assert second.tolist() == [*first.tolist(), first.tolist()[-1]]


def test_a_tokenizer_that_merges_cannot_spoil_tokens_but_does_spoil_text():
    merging = bridge(["0", "1", ",", "+", "11", "1111"], [("1", "1"), ("11", "11")])
    assert merging.to_tokens("1111110", prepend_bos=False)[0].tolist() == [7, 6, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert probe(merging, prepend_bos=False).sequence(7).tolist() == [3] * 6 + [2]
        every_second = probe(merging, "sum", level="text", prepend_bos=False)
        assert every_second.sequence(3).tolist() == [3, 5, 3, 5, 3]  # nothing to merge in "1+1+1"
    written = probe(merging, level="text", prepend_bos=False)
    with pytest.warns(MergedTokensWarning, match="is 3 tokens and not 7"):
        assert written.sequence(7).tolist() == [7, 6, 2]
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        assert [side.tolist() for side in written.pair(5)] == [[7, 2], [7, 2, 2]]
        assert written.longest([5, 7]) == 4


@pytest.mark.parametrize("name", PROBES)
def test_text_and_tokens_are_the_same_where_nothing_merges(model, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"template": True}, {"before": "a: ", "after": [9, 8], "separator_every": 2}):
            as_tokens, as_text = (probe(model, name, level=level, **options) for level in ("tokens", "text"))
            for length in (1, 5):
                assert [side.tolist() for side in as_text.pair(length)] == [side.tolist() for side in as_tokens.pair(length)]
            assert as_text.longest([1, 5]) == as_tokens.longest([1, 5])


def test_symbols_are_found_however_the_vocabulary_writes_spaces():
    # As SentencePiece does: a space before all that is read, merged with some of what follows.
    pieces = ["\u2581", "0", "1", ",", "d", "o", "g", "\u25811", "do", "\u2581do", "\u2581+"]
    model = bridge(pieces, [("\u2581", "1"), ("d", "o"), ("\u2581", "do")], metaspace=True)
    assert model.to_tokens("10", prepend_bos=False)[0].tolist() == [9, 3]
    found = probe(model, "repeat-last", separator_every=1, prepend_bos=False)
    assert found.symbols == {"zero": 3, "one": 4, "separator": 5}  # and not the one with a space, which a text begins with
    assert probe(model, "sum", prepend_bos=False).sequence(2).tolist() == [4, 12, 4]  # there is no other plus
    word = probe(model, "count-word", prepend_bos=False)
    assert word.sequence(2).tolist() == [11, 8, 11, 8]


def test_a_prompt_stands_around_and_one_bos_before_all(model):
    assert probe(model, "count-ones", before="ab", after="?!").sequence(2).tolist() == ids("ab11?!")
    assert probe(model, "count-ones", before=[7, 8], after=[9]).sequence(2).tolist() == [zoo.BOS, 7, 8, *ids("11", bos=False), 9]
    assert probe(model, "count-ones", before=[zoo.BOS, 7]).sequence(1).tolist() == [zoo.BOS, 7, *ids("1", bos=False)]
    assert probe(model, "count-ones", before="ab", prepend_bos=False).sequence(2).tolist() == ids("ab11", bos=False)
    for name in PROBES:
        before, after = TEMPLATES[name]
        content = probe(model, name, prepend_bos=False).sequence(3).tolist()
        assert probe(model, name, template=True).sequence(3).tolist() == ids(before) + content + ids(after, bos=False)
        assert after == after.rstrip()  # else the answer could not have a space before it


def test_models_without_tokenizer_take_ids():
    model = zoo.cached("llama")
    found = probe(model, "copy-first", symbols={"zero": 23, "one": 17}, before=[0], after=[5, 6])
    assert found.sequence(3).tolist() == [0, 23, 17, 17, 5, 6]
    assert probe(model, "count-ones", symbols={"one": 17}, separator=4, separator_every=1).sequence(2).tolist() == [17, 4, 17]
    assert probe(model, "count-word", word=[3, 4]).sequence(2).tolist() == [3, 4, 3, 4]
    assert probe(model, "count-word", word=3).pair(1)[1].tolist() == [3, 3]
    assert repr(found) == "Probe(copy-first, repeated: '<0><23><17><17><17><5><6>')"


def test_records_say_all(model):
    found = probe(model, "bernoulli", separator_every=2, after="?", symbols={"one": "x"}, p=0.5, seed=7, samples=3)
    records = json.loads(json.dumps(found.records()))
    token = dict(zip("0x,?", ids("0x,?", bos=False), strict=True))
    assert records == {
        "name": "bernoulli",
        "contrast": "repeated",
        "level": "tokens",
        "samples": 3,
        "separator_every": 2,
        "symbols": {
            "zero": {"id": token["0"], "token": "0"},
            "one": {"id": token["x"], "token": "x"},
            "separator": {"id": token[","], "token": ","},
        },
        "word": [],
        "before": [{"id": zoo.BOS, "token": "<bos>"}],
        "after": [{"id": token["?"], "token": "?"}],
        "p": 0.5,
        "seed": 7,
    }
    assert probe(model).records()["p"] is None


def test_lengths_must_fit_into_the_context(model):
    found = probe(model)  # a BOS and one token more than the length
    assert require_lengths(model, found, [5, zoo.CONTEXT - 2, 5, 1]) == (1, 5, zoo.CONTEXT - 2)
    with pytest.raises(
        ValueError, match=f"lengths: got {zoo.CONTEXT - 1}, whose longest sequence has 65 tokens; allowed: .* 64 tokens"
    ):
        require_lengths(model, found, [1, zoo.CONTEXT - 1])
    with pytest.raises(ValueError, match="whose longest sequence has 1000000000002 tokens"):
        require_lengths(model, found, [10**12])  # and nothing of that size is made


def test_lengths_may_be_numpys(model):
    found = require_lengths(model, probe(model), np.array([4, 1, 4]))
    assert found == (1, 4)
    assert {type(length) for length in found} == {int}


def test_a_probe_of_another_vocabulary_is_refused(model):
    own = probe(model)
    one, zero = (own.symbols[name] for name in ("one", "zero"))
    # Models of a family share their vocabulary, whatever they are called; ids of a model without tokenizer are nobody's.
    assert require_lengths(model, replace(own, model_name="other"), [2]) == (2,)
    assert require_lengths(zoo.cached("llama"), own, [2]) == (2,)
    assert require_lengths(model, probe(zoo.cached("llama"), symbols={"one": one, "zero": zero}), [2]) == (2,)
    swapped = replace(own, texts=own.texts | {one: own.texts[zero], zero: own.texts[one]}, model_name="other")
    with pytest.raises(ValueError, match=r"^probe: got one of 'other'; allowed: one made for this model"):
        require_lengths(model, swapped, [2])
    beyond = int(model.cfg.d_vocab)
    with pytest.raises(
        ValueError, match=rf"^probe: got ids up to {beyond}, of 'other'; allowed: ids of this model, up to {beyond - 1}"
    ):
        require_lengths(
            model, replace(own, symbols={"one": beyond, "zero": zero}, texts=own.texts | {beyond: "1"}, model_name="other"), [2]
        )


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "count-twos"}, "name: got 'count-twos'; allowed: 'repeat-last', "),
        ({"contrast": "other"}, "contrast: got 'other'; allowed: 'repeated', 'changed'"),
        ({"name": "sum", "contrast": "changed"}, "contrast: got 'changed' with 'sum'; allowed: "),
        ({"level": "bytes"}, "level: got 'bytes'; allowed: 'tokens', 'text'"),
        ({"separator_every": 0}, "separator_every: got 0; allowed: a whole number from 1"),
        ({"separator_every": 2.5}, "separator_every: got 2.5; allowed: a whole number from 1"),
        ({"separator_every": 1, "separator": "§§"}, "symbols.separator: the vocabulary of .* has no token '§§'; allowed: "),
        ({"symbols": {"one": "<unk>x"}}, "symbols.one: the vocabulary of .* has no token '<unk>x'; allowed: "),
        ({"symbols": {"one": 101}}, "symbols.one: got 101; allowed: token ids, 0 to 100"),
        ({"symbols": {"one": -1}}, "symbols.one: got -1; allowed: token ids, 0 to 100"),
        ({"symbols": {"one": 7, "zero": 7}}, "symbols: got the token 7 as 'zero' and 'one'; allowed: different tokens"),
        ({"separator_every": 2, "separator": "0"}, "symbols: got the token .* as 'zero' and 'separator'; allowed: different"),
        ({"symbols": {"two": 7}}, "symbols: got 'two'; allowed: 'zero', 'one', 'plus', 'separator'"),
        ({"before": [101]}, "before: got 101; allowed: token ids, 0 to 100"),
        ({"after": [1.5]}, "after: got 1.5; allowed: token ids, 0 to 100"),
        ({"template": True, "before": "x"}, "template: got True with before or after; allowed: the one or the other"),
        ({"word": "x"}, "word: got 'x' with 'repeat-last'; allowed: None, or 'count-word'"),
        ({"name": "count-word", "word": " "}, "word: got ' '; allowed: a word"),
        ({"name": "count-word", "word": []}, "word: got no token; allowed: at least one"),
        ({"p": 0.0}, "p: got 0.0; allowed: between 0 and 1"),
        ({"p": 1.0}, "p: got 1.0; allowed: between 0 and 1"),
        ({"name": "bernoulli", "samples": 0}, "samples: got 0; allowed: a whole number from 1"),
        ({"name": "bernoulli", "samples": 2.5}, "samples: got 2.5; allowed: a whole number from 1"),
        ({"seed": "a"}, "seed: got 'a'; allowed: 0 to "),
        ({"p": "a"}, "p: got 'a'; allowed: between 0 and 1"),
        ({"samples": 2}, "samples: got 2 with 'repeat-last', which has one pair per length; allowed: 1, or 'bernoulli'"),
    ],
)
def test_bad_input_is_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        probe(model, **options)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "symbols.zero: got '0' for a model without tokenizer; allowed: a token id, such as symbols={'zero': 5}"),
        ({"name": "count-word"}, "word: got 'dog' for a model without tokenizer; allowed: token ids"),
        ({"symbols": {"zero": 5, "one": 6}, "before": "x"}, "before: got 'x' for a model without tokenizer; allowed: token ids"),
        ({"symbols": {"zero": 5, "one": 6}, "after": "x"}, "after: got 'x' for a model without tokenizer; allowed: token ids"),
        ({"template": True}, "template: got True for a model without tokenizer; allowed: before and after as token ids"),
        ({"level": "text"}, "level: got 'text' for a model without tokenizer; allowed: 'tokens'"),
        ({"symbols": {"zero": 5, "one": 6}, "prepend_bos": True}, "prepend_bos: got True for a model without tokenizer; allowed: "),
    ],
)
def test_text_needs_a_tokenizer(options, message):
    with pytest.raises(ValueError, match=message):
        probe(zoo.cached("llama"), **options)


@pytest.mark.usefixtures("as_users_run_it")
def test_bad_lengths_and_samples_are_named(model):
    found = probe(model)
    for call in (found.sequence, found.pair, found.answer, lambda length: found.longest([length])):
        with pytest.raises(ValueError, match="length: got 0; allowed: whole numbers of elements, at least 1"):
            call(0)
    with pytest.raises(ValueError, match="sample: got 1; allowed: 0 to 0"):
        found.sequence(3, 1)
    with pytest.raises(ValueError, match="lengths: got none; allowed: at least one"):
        found.longest([])
    for wrong, shown in (([], "none"), ([3, 0], "0"), ([2.5], "2.5"), ([1, True], "True"), ([[1]], r"\[1\]")):
        with pytest.raises(ValueError, match=f"lengths: got {shown}; allowed: at least one whole number of elements"):
            require_lengths(model, found, wrong)


def test_text_that_the_vocabulary_lacks_is_refused():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "0": 2, "1": 3, "dog": 4, "</s>": 5}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    model = zoo.build("llama")
    model.set_tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")
    ) if hasattr(model, "set_tokenizer") else setattr(
        model,
        "tokenizer",
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"),
    )
    assert probe(model, "count-word", prepend_bos=False).sequence(2).tolist() == [4, 4]
    for options in ({"word": "cat"}, {"before": "count the dog"}, {"after": "how many"}):
        name = "count-word" if "word" in options else "count-ones"
        with pytest.raises(ValueError, match=f"^{next(iter(options))}: got .* of which the vocabulary lacks a part"):
            probe(model, name, prepend_bos=False, **options)
