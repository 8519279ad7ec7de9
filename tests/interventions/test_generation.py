"""Interventions while a model generates from a key-value cache: the same as recomputing every prefix without one."""

from __future__ import annotations

from typing import Any

import editing
import pytest
import torch
import zoo
from tokenizer import tiny_tokenizer, with_tokenizer

BLOCK = 1
NEW = 5  # beyond the window of those that have one
PROMPT = 4
MASK = torch.tensor([[True, False, True, False], [False, True, True, False]])
DELIMITERS = tuple(range(10, 60))
FAMILIES = [
    name for name in ("llama", "gpt2", "mistral", "gemma2", "hooked_llama", "hooked_gpt2", "hooked_mistral") if name in zoo.FAMILIES
]
WHERE = {"all": "all", "initial": "initial", "delimiters": "delimiters", "mask": MASK, "list": [1, 5, 7]}


def generator(family) -> Any:
    if zoo.FAMILIES[family].generation == "bridge":
        return zoo.cached(family)
    model = zoo.build(family)
    model.set_tokenizer(tiny_tokenizer())  # without one, positions are wrong when it generates from a cache
    return model


def made(model, which, side="both"):
    subspace = editing.random_subspace(model, BLOCK, delimiters=DELIMITERS)
    if which == "patch":
        return subspace.patch(zoo.tokens(model, 2, 11, seed=5), side=side)
    return subspace.steer(-3.0, side=side, positions=WHERE[which])


@torch.no_grad()
def without_cache(model, tokens, intervention, new=NEW):
    """The logits that the last tokens follow from, by one pass without a cache: no token sees those after it."""
    return model.run_with_hooks(tokens, fwd_hooks=intervention.fwd_hooks())[:, -1 - new : -1]


@torch.no_grad()
def from_cache(model, tokens, *, chunks=(PROMPT,), new=NEW):
    """Greedy tokens and the logits they follow from, with a cache: the prompt in chunks, then token by token."""
    steps, feeds = [], list(tokens.split(list(chunks), dim=1))
    if hasattr(model, "original_model"):
        options: dict[str, Any] = {"return_type": "logits_and_cache", "use_cache": True}
    else:
        from transformer_lens import TransformerLensKeyValueCache

        options = {"past_kv_cache": TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", len(tokens)), "prepend_bos": False}
    for step in range(len(feeds) - 1 + new):
        if "past_kv_cache" in options:  # which takes a padding id that was generated for padding on the left
            options["attention_mask"] = torch.ones_like(feeds[step])
        out = model(feeds[step], **options)
        if hasattr(model, "original_model"):
            out, options["past_key_values"] = out
        if step >= len(chunks) - 1:
            steps.append(out[:, -1])
            feeds.append(steps[-1].argmax(-1, keepdim=True))
            tokens = torch.cat([tokens, feeds[-1]], dim=1)
    return tokens, torch.stack(steps, dim=1)


def generate(model, tokens, **options):
    with torch.no_grad():
        return model.generate(
            tokens, max_new_tokens=NEW, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens", **options
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_from_a_cache_as_without_one(family):
    model = generator(family)
    tokens = zoo.tokens(model, 2, PROMPT)
    for which in (*WHERE, "patch"):
        intervention = made(model, which)
        with intervention.attached():
            out, steps = from_cache(model, tokens)
            generated = generate(model, tokens, prepend_bos=False)  # in the same context, and anew
        wanted = without_cache(model, out, intervention)
        torch.testing.assert_close(steps, wanted, rtol=1e-4, atol=1e-4)
        assert wanted.argmax(-1).tolist() == out[:, PROMPT:].tolist() == generated[:, PROMPT:].tolist()
        untouched = without_cache(model, out, editing.random_subspace(model, BLOCK).steer(1.0))
        assert float((wanted - untouched).abs().max()) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_in_chunks(family):
    model = generator(family)
    tokens = zoo.tokens(model, 2, 9)
    for which in ("initial", "list", "patch"):
        intervention = made(model, which)
        with intervention.attached():
            out, steps = from_cache(model, tokens, chunks=(6, 2, 1), new=1)
        torch.testing.assert_close(steps, without_cache(model, out, intervention, new=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_texts_of_different_lengths(family):
    """They are padded on the left; each is continued as it is alone."""
    model = with_tokenizer(family)
    texts = ["abcdef", "b", "cc"]
    for positions in ("initial", "delimiters"):
        ablate = editing.random_subspace(model, BLOCK, delimiters=DELIMITERS).steer(-3.0, side="both", positions=positions)
        with ablate.attached():
            together = generate(model, texts)
            for row, text in enumerate(texts):
                alone = generate(model, text)
                assert together[row, -alone.shape[1] :].tolist() == alone[0].tolist()


def test_a_row_that_is_filled_up_with_padding_gets_no_new_first_token():
    """A prompt of one token whose next is the padding id: at position 1 nothing is first."""
    model = with_tokenizer("llama")
    subspace = editing.random_subspace(model, BLOCK)
    tokens = torch.tensor([[7, zoo.PAD]])
    with torch.no_grad(), subspace.ablate(side="both", positions="initial").attached():
        _, past = model(tokens[:, :1], return_type="logits_and_cache", use_cache=True)
        continued = model(tokens[:, 1:], past_key_values=past, use_cache=True)
        whole = model(tokens)
    torch.testing.assert_close(continued[:, -1], whole[:, -1], rtol=1e-5, atol=1e-5)


def test_attached_before_the_window_is_full_counts_on():
    """Of a cache limited to a window, the place of a pass is known by those seen before."""
    model = zoo.cached("mistral")
    tokens = zoo.tokens(model, 2, zoo.WINDOW - 1)
    intervention = made(model, "list")
    with torch.no_grad():
        wanted = model.run_with_hooks(torch.cat([tokens, tokens], dim=1), fwd_hooks=intervention.fwd_hooks())
        _, past = model(tokens[:, :1], return_type="logits_and_cache", use_cache=True)
        with intervention.attached():  # position 1 is the first that is meant
            for feed in torch.cat([tokens[:, 1:], tokens], dim=1).split(1, dim=1):
                logits, past = model(feed, past_key_values=past, return_type="logits_and_cache", use_cache=True)
    torch.testing.assert_close(logits[:, -1], wanted[:, -1], rtol=1e-4, atol=1e-4)
