import itertools
import math

import pytest
import torch
import zoo
from recording import same_state, state
from tokenizer import tiny_tokenizer, with_tokenizer
from transformer_lens.model_bridge.sources import build_bridge_from_module

from sd_lens.propagation.answering import answer_probes
from sd_lens.propagation.candidates import _spellings
from sd_lens.propagation.probes import probe


@pytest.fixture(scope="module")
def echo():
    """A model that predicts the token it reads: no sublayer adds anything, and the unembedding is the embedding's transpose."""
    hf = zoo.hf_model("llama")
    with torch.no_grad():
        for block in hf.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        embedding = hf.model.embed_tokens.weight
        embedding.div_(embedding.norm(dim=1, keepdim=True))
        hf.model.norm.weight.fill_(1.0)
        hf.lm_head.weight.copy_(embedding)
    bridge = build_bridge_from_module(hf, architecture=type(hf).__name__, hf_config=hf.config, tokenizer=tiny_tokenizer())
    return bridge.eval()


@pytest.fixture(scope="module")
def model():
    return with_tokenizer("gpt2")


def starting(model, prompt, text):
    """Probability that what follows a prompt begins with a text, one token per character, by one run over all of it."""
    ids = model.tokenizer.convert_tokens_to_ids(list(text))
    whole = torch.tensor([[*prompt.tolist(), *ids]])
    with torch.no_grad():
        logs = model(whole, return_type="logits")[0].double().log_softmax(-1)
    return math.exp(sum(float(logs[len(prompt) - 1 + place, token]) for place, token in enumerate(ids)))


@pytest.mark.parametrize("by", ["logits", "generation"])
def test_a_model_that_repeats_the_last_token_copies_the_last_digit_and_never_the_first(echo, by):
    lengths = [1, 2, 20]
    last = answer_probes(echo, probe(echo, "copy-last", contrast="changed"), lengths, by=by, max_new_tokens=2)
    assert last.accuracy == dict.fromkeys(lengths, 1.0)
    assert last.mean_absolute_error == dict.fromkeys(lengths, 0.0)
    assert [(row.length, row.changed, row.expected, row.answered) for row in last.rows] == [
        (length, changed, int(changed), int(changed)) for length in lengths for changed in (False, True)
    ]
    first = answer_probes(echo, probe(echo, "copy-first"), lengths, by=by, max_new_tokens=2)
    assert first.accuracy == {1: 1.0, 2: 0.0, 20: 0.0}
    # Both of a pair: it answers one whatever stands first.
    both = answer_probes(echo, probe(echo, "copy-first", contrast="changed"), [5], by=by, max_new_tokens=2)
    assert both.accuracy == {5: 0.5}
    assert [row.answered for row in both.rows] == [1, 1]


def test_a_model_that_repeats_the_last_token_counts_one(echo):
    answers = answer_probes(echo, probe(echo, "count-ones"), [4, 1, 3], candidates=range(10))
    assert answers.candidates == tuple(range(10))
    assert [(row.length, row.expected, row.answered, row.absolute_error) for row in answers.rows] == [
        (1, 1, 1, 0.0),
        (3, 3, 1, 2.0),
        (4, 4, 1, 3.0),
    ]
    assert answers.accuracy == {1: 1.0, 3: 0.0, 4: 0.0}
    # It goes on with ones, and of the texts that begin with "1" most begin with "11".
    assert answer_probes(echo, probe(echo, "count-ones"), [4], candidates=range(12)).rows[0].answered == 11
    assert answer_probes(echo, probe(echo, "count-ones"), [4]).candidates == tuple(range(10))
    assert answer_probes(echo, probe(echo, "count-ones"), [60]).candidates == tuple(range(67))
    assert answer_probes(echo, probe(echo, "count-ones"), [60], candidates=[60, 1]).candidates == (1, 60)


def test_generation_reads_the_first_number(echo):
    count = answer_probes(echo, probe(echo, "count-ones"), [4], by="generation", max_new_tokens=3)
    assert [(row.text, row.answered, row.absolute_error) for row in count.rows] == [("111", 111, 107.0)]
    silent = answer_probes(echo, probe(echo, "count-ones", after="x"), [4, 6], by="generation", max_new_tokens=2)
    assert [(row.text, row.answered, row.correct) for row in silent.rows] == [("xx", None, False)] * 2
    assert silent.accuracy == {4: 0.0, 6: 0.0}
    assert all(math.isnan(error) for error in silent.mean_absolute_error.values())
    table = silent.to_dataframe()
    assert table["answered"].isna().all()
    assert table["absolute_error"].isna().all()
    # Other symbols for the digits: the text is read for these.
    letters = probe(echo, "copy-last", symbols={"zero": "a", "one": "b"})
    assert [row.answered for row in answer_probes(echo, letters, [3], by="generation", max_new_tokens=1).rows] == [0]
    assert answer_probes(echo, letters, [3]).accuracy == {3: 1.0}


def test_candidates_are_scored_by_all_their_tokens_and_spellings(model):
    found = probe(model, "count-ones", separator_every=2, after="=")
    lengths, numbers = (3, 12), range(14)
    answers = answer_probes(model, found, lengths, candidates=numbers)
    for row in answers.rows:
        prompt = found.sequence(row.length)
        texts = [str(number) for number in numbers]
        begins = {space + text: starting(model, prompt, space + text) for space in ("", " ") for text in texts}
        by_hand = {
            number: sum(
                begins[space + text]
                - sum(begins[space + other] for other in texts if other.startswith(text) and len(other) == len(text) + 1)
                for space in ("", " ")
            )
            for number, text in enumerate(texts)
        }
        assert row.answered == max(by_hand, key=by_hand.__getitem__)
        assert row.log_probability == pytest.approx(math.log(by_hand[row.expected]), abs=1e-4)
        assert row.correct == (row.answered == row.length)


def test_a_nested_family_of_candidates_shares_out_what_its_shortest_begins_with(model):
    found = probe(model, "count-ones")
    nested = [1, 11, 111]
    of = {number: answer_probes(model, probe(model, "count-ones"), [number], candidates=nested).rows[0] for number in (1, 11)}
    for number, row in of.items():
        prompt, text = found.sequence(number), str(number)
        expected = sum(starting(model, prompt, space + text) - starting(model, prompt, space + text + "1") for space in ("", " "))
        assert row.log_probability == pytest.approx(math.log(expected), abs=1e-4)


def test_models_without_tokenizer_are_asked_by_ids():
    model = zoo.cached("llama")
    digits = probe(model, "copy-first", symbols={"zero": 23, "one": 17}, contrast="changed")
    answers = answer_probes(model, digits, [2, 6])
    counting = probe(model, "count-ones", symbols={"one": 17}, after=[9])
    said = {1: 5, 2: [6], 3: (7, 8)}
    counted = answer_probes(model, counting, [2, 3], candidates=said)
    with torch.no_grad():
        for row in answers.rows:
            prompt = digits.pair(row.length)[row.changed].unsqueeze(0)
            logits = model(prompt, return_type="logits")[0, -1]
            assert row.answered == int(logits[17] > logits[23])
            assert row.log_probability == pytest.approx(float(logits.log_softmax(-1)[17 if row.changed else 23]), abs=1e-4)
        for row in counted.rows:
            prompt = counting.sequence(row.length).tolist()
            logs = model(torch.tensor([[*prompt, 7]]), return_type="logits")[0].log_softmax(-1)
            scores = {1: float(logs[-2, 5]), 2: float(logs[-2, 6]), 3: float(logs[-2, 7] + logs[-1, 8])}
            assert row.answered == max(scores, key=scores.__getitem__)
            assert row.log_probability == pytest.approx(scores[row.expected], abs=1e-4)
    with pytest.raises(ValueError, match="candidates: got no token ids for a model without tokenizer; allowed: a dictionary"):
        answer_probes(model, counting, [2])
    with pytest.raises(ValueError, match="by: got 'generation' for a model without tokenizer; allowed: 'logits'"):
        answer_probes(model, counting, [2], by="generation")


def test_samples_and_tables(model):
    before = state(model)
    found = probe(model, "bernoulli", samples=3, seed=1)
    answers = answer_probes(model, found, [6, 2])
    assert same_state(before, state(model))
    table = answers.to_dataframe()
    assert list(zip(table["length"], table["sample"], strict=True)) == list(itertools.product((2, 6), (0, 1, 2)))
    assert table["expected"].tolist() == [found.answer(length, sample) for length in (2, 6) for sample in range(3)]
    assert (table["absolute_error"] == (table["answered"] - table["expected"]).abs()).all()
    summary = answers.summary()
    assert summary["n"].tolist() == summary["n_answered"].tolist() == [3, 3]
    assert summary["accuracy"].tolist() == pytest.approx(list(answers.accuracy.values()))
    errors = table["absolute_error"].to_numpy().reshape(2, 3)
    assert list(answers.mean_absolute_error.values()) == pytest.approx(errors.mean(1).tolist())
    right = int(table["correct"].sum())
    assert repr(answers).endswith(f"bernoulli by logits: {right} of 6 right, lengths 2 to 6)")


def test_default_candidates_are_few_where_numbers_are_large(model):
    found = probe(model, "count-ones")

    def numbers(*expected):
        return set(_spellings(model, found, None, expected))

    assert numbers(3, 12) == {*range(18)}
    assert numbers(58) == {*range(64)}
    assert numbers(59) == {*range(65)}
    wanted = {*range(65), 100, 1000, 128, 256, 512, 1024, *range(95, 106), 50, 200, *range(995, 1006), 500, 1100}
    assert numbers(1000, 100) == wanted
    lengths = [round(2 ** (step / 4)) for step in range(4, 53)]
    assert len(numbers(*lengths)) < 500
    assert set(lengths) <= numbers(*lengths)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("name", "lengths", "options", "message"),
    [
        ("count-ones", [3], {"by": "chance"}, "by: got 'chance'; allowed: 'logits', 'generation'"),
        ("count-ones", [], {}, "lengths: got none; allowed: "),
        ("count-ones", [63], {}, "lengths: got 63, whose longest sequence has 65 tokens; allowed: .* at most 64"),
        (
            "count-ones",
            [62],
            {},
            "lengths: got 62, whose longest sequence has 63 tokens; allowed: .* at most 62 .* room for an answer",
        ),
        ("count-ones", [3], {"candidates": [1, 2]}, "candidates: got none for 3, a right answer; allowed: "),
        ("count-ones", [3], {"candidates": [3, -1]}, "candidates: got -1; allowed: numbers from 0 on"),
        ("count-ones", [3], {"candidates": {3: 101}}, "candidates: got 101; allowed: token ids, 0 to 100"),
        ("count-ones", [3], {"candidates": {3: 9, 4: 9}}, "candidates: got the tokens \\[9\\] for 3 and 4; allowed: different"),
        ("copy-last", [3], {"candidates": [0, 1, 2]}, "candidates: got 2 with 'copy-last'; allowed: 0 and 1"),
        ("count-ones", [3], {"by": "generation", "candidates": [3]}, "candidates: got some with by='generation'; allowed: None"),
        ("count-ones", [3], {"by": "generation", "max_new_tokens": 0}, "max_new_tokens: got 0; allowed: at least 1"),
    ],
)
def test_bad_input_is_named(model, name, lengths, options, message):
    with pytest.raises(ValueError, match=message):
        answer_probes(model, probe(model, name), lengths, **options)


def test_probes_by_name(as_users_run_it):
    from sd_lens.models.loading import load

    assert [row.length for row in answer_probes(load("tiny"), "copy-last", [2]).rows] == [2]
    with pytest.raises(ValueError, match=r"^probe: got int; allowed: a Probe or its name"):
        answer_probes(load("tiny"), 3, [2])
