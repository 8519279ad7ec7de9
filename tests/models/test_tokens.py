import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer import tiny_tokenizer, with_tokenizer

from sd_lens.models.tokens import decode_each, tokenize

READERS = ["llama", "gpt2"] + ["hooked_llama"] * (zoo.HookedTransformer is not None)
"""Models that read text. In their tokenizer "a" is 4, "b" is 5 and so on; 0, 1, 2 are BOS, EOS and padding."""


def reader(name):
    if not name.startswith("hooked"):
        return with_tokenizer(name)
    model = zoo.build(name)
    model.set_tokenizer(tiny_tokenizer())
    return model


@pytest.fixture(scope="module", params=READERS)
def model(request):
    return reader(request.param)


def ids(sequences):
    assert all(sequence.dtype == torch.long and sequence.ndim == 1 for sequence in sequences)
    return [sequence.tolist() for sequence in sequences]


def test_text_gets_the_ids_and_the_bos_of_the_models_own_conventions(model):
    assert ids(tokenize(model, "ab")) == [[0, 4, 5]]
    assert ids(tokenize(model, ["c", "ab", "c"])) == [[0, 6], [0, 4, 5], [0, 6]]
    assert ids(tokenize(model, ("c", "ab"), prepend_bos=True)) == [[0, 6], [0, 4, 5]]
    assert ids(tokenize(model, ["c", "ab"], prepend_bos=False)) == [[6], [4, 5]]
    model.cfg.default_prepend_bos = False
    try:
        assert ids(tokenize(model, "ab")) == [[4, 5]]
    finally:
        model.cfg.default_prepend_bos = True


def test_ids_are_taken_as_they_are():
    model = zoo.cached("gpt2")
    rows = torch.tensor([[5, 2, 2], [2, 2, 7]])
    assert ids(tokenize(model, rows)) == [[5, 2, 2], [2, 2, 7]]  # no tokenizer, no padding
    assert ids(tokenize(model, [row for row in rows.int()], prepend_bos=True)) == [[5, 2, 2], [2, 2, 7]]
    assert ids(tokenize(model, [torch.tensor([9]), rows[0]])) == [[9], [5, 2, 2]]
    assert ids(tokenize(model, rows[:1])) == [[5, 2, 2]]


@pytest.mark.usefixtures("as_users_run_it")
def test_a_one_dimensional_tensor_is_one_prompt():
    assert ids(tokenize(zoo.cached("gpt2"), torch.tensor([5, 6, 7]))) == [[5, 6, 7]]


@given(texts=st.lists(st.text("abcdef. ", min_size=1, max_size=8), min_size=1, max_size=5))
@settings(max_examples=20)
@pytest.mark.parametrize("name", READERS)
def test_the_padded_tensor_of_to_tokens_gives_what_the_strings_give(name, texts):
    model = _READ.setdefault(name, reader(name))
    assert ids(tokenize(model, model.to_tokens(texts))) == ids(tokenize(model, texts))


_READ = {}


def test_padding_with_the_bos_leaves_the_first_token(model):
    kept = model.tokenizer.pad_token
    model.tokenizer.pad_token = model.tokenizer.bos_token
    try:
        assert ids(tokenize(model, torch.tensor([[0, 4, 5, 0, 0], [0, 0, 0, 0, 0], [0, 4, 0, 5, 6]]))) == [
            [0, 4, 5],
            [0],
            [0, 4, 0, 5, 6],
        ]
    finally:
        model.tokenizer.pad_token = kept


def test_padding_on_the_left_is_refused(model):
    with pytest.raises(ValueError, match=r"^prompts: got token ids padded on the left; allowed: padding on the right"):
        tokenize(model, torch.tensor([[2, 2, 0, 4], [0, 4, 5, 6]]))


BAD = {
    "no prompt": ([], "got no prompt"),
    "empty text": ("", "got an empty prompt"),
    "an empty text among others": (["ab", ""], "got an empty prompt"),
    "no rows": (torch.zeros(0, 3, dtype=torch.long), r"got a tensor of shape \(0, 3\)"),
    "no columns": (torch.zeros(2, 0, dtype=torch.long), "prompt 0 is empty"),
    "an empty tensor among others": ([torch.tensor([4]), torch.tensor([], dtype=torch.long)], "prompt 1 is empty"),
    "three dimensions": (torch.zeros(1, 2, 3, dtype=torch.long), r"got a tensor of shape \(1, 2, 3\)"),
    "no dimension": (torch.tensor(3), r"got a tensor of shape \(\)"),
    "floats": (torch.ones(1, 3), "prompt 0 has dtype torch.float32"),
    "truth values": (torch.ones(1, 3, dtype=torch.bool), "prompt 0 has dtype torch.bool"),
    "complex": (torch.ones(1, 3, dtype=torch.complex64), "prompt 0 has dtype torch.complex64"),
    "beyond the vocabulary": (torch.tensor([[4, 101]]), "prompt 0 has token ids 4 to 101; allowed: 0 to 100"),
    "below the vocabulary": ([torch.tensor([4]), torch.tensor([-1, 5])], "prompt 1 has token ids -1 to 5; allowed: 0 to 100"),
    "too long": (torch.ones(1, 65, dtype=torch.long), "prompt 0 has 65 tokens; allowed: at most 64"),
    "too long as text": ("a" * 64, "prompt 0 has 65 tokens; allowed: at most 64"),
    "mixed": (["ab", torch.tensor([4])], "got a list of Tensor, str"),
    "lists of ids": ([[4, 5], [6]], "got a list of list"),
    "ids": ([4, 5], "got a list of int"),
    "nothing": (None, "got NoneType"),
    "a number": (7, "got int"),
}


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("what", BAD)
def test_what_is_no_prompt_is_refused_with_what_is_allowed(model, what):
    prompts, reason = BAD[what]
    with pytest.raises(ValueError, match=f"^prompts: .*{reason}") as error:
        tokenize(model, prompts)
    assert "allowed: " in str(error.value)


def test_text_needs_a_tokenizer():
    for text in ("ab", ["ab"], ""):
        with pytest.raises(ValueError, match=r"^prompts: got text for a model without tokenizer; allowed: token ids"):
            tokenize(zoo.cached("llama"), text)


def test_ids_read_as_text(model):
    assert decode_each(model, [4, 5, 0, 4, 2]) == ["a", "b", "<bos>", "a", "<pad>"]
    assert decode_each(zoo.cached("gpt2"), [4, 0]) == ["<4>", "<0>"]


def test_the_longest_and_the_shortest_prompts_pass(model):
    assert ids(tokenize(model, torch.full((1, 64), 100))) == [[100] * 64]
    assert ids(tokenize(model, [torch.tensor([0])])) == [[0]]
