"""What hooks know of a pass: against the ids and positions that the test itself put in."""

from __future__ import annotations

import pytest
import torch
import zoo
from tokenizer import tiny_tokenizer, with_tokenizer

from sd_lens.models.passes import IdWatcher, PassStart, has_id, padding_id

TOKENS = torch.tensor([[7, 8, 7, 9, 10, 8], [8, 11, 12, 7, 9, 9]])
SETS = ((8, 9), (7,), ())


def wanted(tokens):
    return [torch.isin(tokens, torch.tensor(some, dtype=torch.long)).tolist() for some in SETS]


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_ids_are_seen_on_every_architecture(family):
    model = zoo.cached(family)
    watcher = IdWatcher(model, *SETS)
    assert watcher.known(2, 6) is None
    with torch.no_grad():
        model.run_with_hooks(TOKENS, fwd_hooks=watcher.hooks())
    assert [found.tolist() for found in watcher.known(2, 6)] == wanted(TOKENS)
    assert watcher.known(2, 5) is None  # of another pass
    watcher.done()
    assert watcher.known(2, 6) is None


@pytest.mark.parametrize("family", [name for name in ("llama", "gpt2", "hooked_llama", "hooked_gpt2") if name in zoo.FAMILIES])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_ids_are_seen_in_every_precision(family, dtype):
    model = zoo.build(family, dtype=dtype)
    watcher = IdWatcher(model, *SETS)
    with torch.no_grad():
        model.run_with_hooks(TOKENS, fwd_hooks=watcher.hooks(), stop_at_layer=1)
    assert [found.tolist() for found in watcher.known(2, 6)] == wanted(TOKENS)


@pytest.mark.parametrize("family", [name for name in ("llama", "gpt2", "hooked_llama", "hooked_gpt2") if name in zoo.FAMILIES])
def test_ids_are_seen_while_a_model_generates(family):
    """HookedTransformer embeds the tokens outside of the pass, so that its hook of the embedding is never reached."""
    model = with_tokenizer(family) if zoo.FAMILIES[family].generation == "bridge" else zoo.build(family)
    model.set_tokenizer(tiny_tokenizer()) if family.startswith("hooked") else None
    watcher, start, seen, starts = IdWatcher(model, range(50)), PassStart(model, 2), [], []

    def ask(stream, hook):
        seen.append(watcher.known(*stream.shape[:2])[0])
        starts.append(start.start)

    # Padding on the left moves the positions that are added to embeddings.
    tokens = torch.tensor([[7, 8, 60, 9, 10], [zoo.PAD, zoo.PAD, 11, 70, 8]])
    with torch.no_grad(), model.hooks(fwd_hooks=[*watcher.hooks(), *start.hooks(), ("blocks.2.hook_resid_post", ask)]):
        out = model.generate(tokens, max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens")
    assert torch.equal(torch.cat(seen, dim=1), out[:, :-1] < 50)
    assert 0 < int((out[:, 5:-1] < 50).sum()) < 8
    assert starts == [0, 5, 6, 7, 8]


@pytest.mark.parametrize("family", [name for name in ("llama", "gpt2", "hooked_llama", "hooked_gpt2") if name in zoo.FAMILIES])
def test_no_pass_of_the_model_is_made_to_know_ids(family):
    """The caller's hooks would see it."""
    model, seen = zoo.cached(family), []
    watched = ("hook_embed", "blocks.0.hook_resid_pre")
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, lambda value, hook: seen.append(hook.name)) for name in watched]):
        watcher = IdWatcher(model, *SETS)
        with model.hooks(fwd_hooks=watcher.hooks()):
            assert not seen
            model(TOKENS)
    assert len(seen) == 2


@pytest.mark.skipif("hooked_gpt2" not in zoo.FAMILIES, reason="HookedTransformer is gone in TransformerLens 4")
def test_a_stream_of_the_callers_has_no_ids():
    model = zoo.cached("hooked_gpt2")
    watcher = IdWatcher(model, *SETS)
    with torch.no_grad():
        stream = model(TOKENS, stop_at_layer=1)
        model.run_with_hooks(stream, start_at_layer=0, fwd_hooks=watcher.hooks())
        assert watcher.known(2, 6) is None
        model.run_with_hooks(stream, start_at_layer=1, fwd_hooks=watcher.hooks())
        assert watcher.known(2, 6) is None


def test_embeddings_that_differ_little_are_told_apart_and_none_may_be_zero():
    """Padding ids of Hugging Face models have an embedding of zeros."""
    table = torch.zeros(3, 4)
    table[1], table[2] = 1e-4, 1.01e-4
    tokens = torch.tensor([[0, 1, 2]])
    for added in (torch.zeros(1, 1, 4), torch.full((1, 3, 4), 1e-4)):
        for id_ in range(3):
            assert has_id(table[tokens] + added, table[id_ : id_ + 1], added).tolist() == [[id_ == 0, id_ == 1, id_ == 2]]
    assert not has_id(table[tokens], table[:0], torch.zeros(1, 1, 4)).any()


def test_padding_is_known_unless_a_prompt_may_begin_with_it():
    assert padding_id(zoo.cached("llama")) is None
    model = with_tokenizer("llama")
    assert padding_id(model) == zoo.PAD
    model.tokenizer.pad_token = "<bos>"
    assert padding_id(model) == zoo.BOS


def test_a_window_that_is_full_is_counted_on():
    """By hand: patterns as a cache limited to a window of 5 makes them, one without, and a new sequence."""

    def starts(start, passes):
        found = []
        for queries, keys in passes:
            start.hooks()[0][1](torch.zeros(1, 1, queries, keys), hook=None)
            found.append(start.start)
            start.done(queries)
        return found

    sliding = [(3, 3), (1, 4), (1, 5), (1, 5), (2, 6), (1, 5), (4, 4), (1, 5), (1, 5)]
    assert starts(PassStart(zoo.cached("mistral"), 1), sliding) == [0, 3, 4, 5, 6, 8, 0, 4, 5]
    assert starts(PassStart(zoo.cached("gemma2"), 0), sliding) == [0, 3, 4, 5, 6, 8, 0, 4, 5]
    full = [(3, 3), (1, 4), (1, 5), (1, 6), (1, 7), (1, 5)]  # the last from a cache that was kept
    for model, block in ((zoo.cached("gemma2"), 1), (zoo.cached("llama"), 1)):
        assert starts(PassStart(model, block), full) == [0, 3, 4, 5, 6, 4]
