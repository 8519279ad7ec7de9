"""Every token scored once, with the context that its window gives it, against loops over tokens and TransformerLens' own loss."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import zoo
from tokenizer import tiny_tokenizer

from sd_lens.applications.perplexity import mean_loss, windows_of
from sd_lens.applications.quantizing import logits_of
from sd_lens.applications.texts import default_text
from sd_lens.models.loading import load

BOS = 0


@functools.cache
def model():
    """A random model with a tokenizer whose BOS is `BOS`."""
    built = zoo.build("llama")
    built.tokenizer = tiny_tokenizer()
    return built


def ids(n, seed=0):
    return torch.randint(zoo.SPECIAL, zoo.VOCAB, (n,), generator=torch.Generator().manual_seed(seed))


def one_by_one(text, window, stride, bos):
    """Loss of every token scored, each from a pass over its own context."""
    front = [] if bos is None else [bos]
    holds = window - len(front)
    losses = []
    for target in range(len(text)):
        # the first window that ends behind it
        number = max(0, math.ceil((target + 1 - holds) / stride))
        context = [*front, *text[number * stride : target].tolist()]
        if context:
            with torch.no_grad():
                predicted = model()(torch.tensor([context]))[0, -1].double()
            losses.append(-predicted.log_softmax(0)[text[target]].item())
    return losses


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize(("n", "window", "stride"), [(23, 8, None), (23, 8, 3), (22, 7, 6), (14, 7, 1), (8, 8, None), (17, 2, 1)])
def test_token_by_token(n, window, stride, prepend_bos):
    text = ids(n)
    windows = windows_of(model(), text, window=window, stride=stride, prepend_bos=prepend_bos)
    wanted = one_by_one(text, window, window - 1 if stride is None else stride, BOS if prepend_bos else None)
    assert len(wanted) == windows.n_scored == n - (not prepend_bos)
    for batch_tokens in (1, 3 * window, 10**6):
        got = mean_loss(logits_of(model()), windows, batch_tokens=batch_tokens)
        assert got == pytest.approx(sum(wanted) / len(wanted), rel=1e-6)
    for rows, _ in windows.batches(10**6):
        assert rows.shape[1] <= window
        assert bool((rows[:, 0] == BOS).all()) == prepend_bos
        assert not bool((rows[:, 1:] == BOS).any())


def test_transformer_lens_own_loss():
    text = ids(31)
    for prepend_bos in (True, False):
        windows = windows_of(model(), text, window=31 + prepend_bos, prepend_bos=prepend_bos)
        whole = torch.tensor([[BOS] * prepend_bos + text.tolist()])
        with torch.no_grad():
            wanted = float(model()(whole, return_type="loss"))
        assert mean_loss(logits_of(model()), windows) == pytest.approx(wanted, rel=1e-6)


def test_a_model_that_knows_the_text_has_perplexity_one():
    text = torch.arange(50) + zoo.SPECIAL  # every token is followed by the next id

    def next_id(rows):
        following = torch.where(rows == BOS, zoo.SPECIAL, rows + 1) % zoo.VOCAB
        return torch.nn.functional.one_hot(following, zoo.VOCAB) * 100.0

    for stride in (1, 4, 9):
        windows = windows_of(model(), text, window=10, stride=stride, prepend_bos=False)
        assert mean_loss(next_id, windows) == 0
    # behind BOS stands another token in every window but the first: 100 too low
    windows = windows_of(model(), text, window=11, stride=10)
    assert mean_loss(next_id, windows) == pytest.approx(100 * 4 / 50)


def test_defaults_are_the_models_own():
    tiny = load("tiny")
    windows = windows_of(tiny, default_text())
    assert (windows.length, windows.stride, windows.bos) == (128, 127, tiny.tokenizer.bos_token_id)
    by_template = tiny.tokenizer(default_text())["input_ids"]
    assert by_template[0] == windows.bos
    assert windows.n_text == windows.n_scored == len(by_template) - 1
    assert windows.ids[:, 1:].flatten().tolist() == by_template[1 : 1 + 127 * len(windows.ids)]
    bare = windows_of(zoo.cached("llama"), ids(100))  # no tokenizer, and a context of 64
    assert (bare.length, bare.stride, bare.bos, bare.n_scored) == (64, 63, None, 99)


BAD = {
    "text: got 6 tokens; allowed: at least 7": {"text": ids(6), "window": 8},
    "text: got 0 tokens": {"text": ids(0), "window": 2},
    "text: got an empty text": {"text": " \n"},
    "window: got 65; allowed: 2 to 64": {"window": 65},
    "window: got 1; allowed: 2 to 64": {"window": 1},
    "stride: got 8; allowed: 1 to 7": {"window": 8, "stride": 8},
    "stride: got 0; allowed: 1 to 7": {"window": 8, "stride": 0},
    "text: got token ids -1 to 5; allowed: 0 to 100": {"text": torch.tensor([5, -1, 3])},
    "text: got token ids 5 to 101; allowed: 0 to 100": {"text": torch.tensor([5, 101])},
    "text: got a tensor of shape \\(1, 9\\)": {"text": ids(9).unsqueeze(0)},
    "text: got a tensor of shape \\(9,\\) and dtype torch.float32": {"text": ids(9).float()},
}


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(ValueError, match=f"^{message}"):
        windows_of(model(), **{"text": ids(99), **BAD[message]})


def test_models_without_tokenizer_or_bos():
    bare = zoo.cached("llama")
    with pytest.raises(ValueError, match=r"^text: got text for a model without tokenizer"):
        windows_of(bare, "some text")
    with pytest.raises(ValueError, match=r"^prepend_bos: got True for a model whose tokenizer has no BOS"):
        windows_of(bare, ids(99), prepend_bos=True)


def test_predictions_that_are_no_numbers():
    windows = windows_of(model(), ids(20), window=8)
    with pytest.raises(ValueError, match=r"^model: its predictions hold NaN"):
        mean_loss(lambda rows: torch.full((*rows.shape, zoo.VOCAB), math.nan), windows)
