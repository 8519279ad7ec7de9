import gc
import weakref

import pytest
import torch
import zoo
from recording import same_state, state
from shared import planted
from streams import norms_alone, ragged, worst
from tokenizer import tiny_tokenizer, with_tokenizer

from sd_lens.tracing.defects import find_defects
from sd_lens.tracing.monitor import NormMonitor
from sd_lens.tracing.norms import trace_norms


def pair(length=6, seed=0):
    return torch.stack(ragged(zoo.VOCAB, (length, length), seed=seed))


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_norms_are_those_of_a_trace(family):
    model, tokens = zoo.cached(family), pair()
    monitor = NormMonitor(model)
    with torch.no_grad():
        model.run_with_hooks(tokens[:1], fwd_hooks=monitor.fwd_hooks())
        with monitor.attached() as entered:
            assert entered is monitor
            model(tokens[1:])
        model(tokens)  # no longer seen
    result = monitor.result(tokens)
    assert worst(result.norms, norms_alone(model, list(tokens))) < 1e-5
    wanted = trace_norms(model, tokens)
    assert result.texts == wanted.texts
    assert (result.n_blocks, result.d_model, result.model_name) == (wanted.n_blocks, wanted.d_model, wanted.model_name)


# TransformerLens 3.9's bridge of MPT forgets the key-value cache: each new token attends to itself only.
FORGETFUL = {"mpt"} if zoo.HookedTransformer is not None else set()


def reader(family):
    if zoo.FAMILIES[family].generation == "bridge":
        return zoo.cached(family)
    model = zoo.build(family)
    model.set_tokenizer(tiny_tokenizer())  # without one, positions are wrong when it generates from a cache
    return model


def generate(model, tokens, **options):
    with torch.no_grad():
        return model.generate(
            tokens, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens", prepend_bos=False, **options
        )


@pytest.mark.parametrize("family", [name for name in zoo.FAMILIES if name not in FORGETFUL])
def test_a_generation_from_a_cache_is_one_prompt_per_row(family):
    model = reader(family)
    monitor = NormMonitor(model)
    with monitor.attached():
        first = generate(model, pair(), max_new_tokens=5, use_past_kv_cache=True)
        second = generate(model, pair(3, seed=1)[:1], max_new_tokens=4, use_past_kv_cache=True)
    monitored = monitor.result()
    # The last token generated is never run.
    assert torch.bincount(monitored.prompt).tolist() == [10, 10, 6]
    assert worst(monitored.norms, norms_alone(model, [*first[:, :-1], second[0, :-1]])) < 1e-3


@pytest.mark.parametrize("family", [name for name in ("llama", "gpt2", "hooked_llama") if name in zoo.FAMILIES])
def test_a_generation_without_a_cache_is_one_prompt_per_step(family):
    model, tokens = zoo.cached(family), pair()
    monitor = NormMonitor(model)
    with monitor.attached():
        out = generate(model, tokens, max_new_tokens=3, use_past_kv_cache=False)
    result = monitor.result()
    assert torch.bincount(result.prompt).tolist() == [6, 6, 7, 7, 8, 8]
    assert worst(result.norms, norms_alone(model, [row[:length] for length in (6, 7, 8) for row in out])) < 1e-4


def test_tokens_label_a_generation():
    model = with_tokenizer("llama")
    monitor = NormMonitor(model)
    with monitor.attached():
        out = generate(model, model.to_tokens("ab"), max_new_tokens=3, use_past_kv_cache=True)
    trace = monitor.result(tokens=out)
    assert trace.tokens.tolist() == out[0, :-1].tolist()
    assert trace.texts[:3] == ("<bos>", "a", "b")
    unknown = monitor.result()
    assert unknown.tokens.tolist() == [-1] * 5
    assert unknown.texts == ("?",) * 5


def test_several_runs_with_different_batches_and_padding():
    model, monitor = zoo.cached("gpt2"), NormMonitor(zoo.cached("gpt2"))
    lengths = (5, 3, 7, 2, 6, 1)
    prompts = ragged(zoo.VOCAB, lengths)
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    assert repr(monitor) == "NormMonitor(0 runs seen)"
    with torch.no_grad():
        for rows, width in ((slice(0, 2), 5), (slice(2, 5), 7), (slice(5, 6), 1)):
            with monitor.attached():
                model(padded[rows, :width])
    assert repr(monitor) == "NormMonitor(3 runs seen)"
    mask = torch.arange(7) < torch.tensor(lengths).unsqueeze(1)
    trace = monitor.result(padded, mask=mask)
    assert worst(trace.norms, norms_alone(model, prompts)) < 1e-5
    assert torch.equal(trace.tokens, torch.cat(prompts))
    assert torch.bincount(trace.prompt).tolist() == list(lengths)
    unmasked = monitor.result()
    assert torch.bincount(unmasked.prompt).tolist() == [5, 5, 7, 7, 7, 1]
    assert torch.equal(unmasked.norms[:, :5], trace.norms[:, :5])
    monitor.reset()
    with pytest.raises(ValueError, match=r"^monitor: nothing was seen"):
        monitor.result()


def test_padding_on_the_left_is_masked_too():
    model, monitor = zoo.cached("llama"), NormMonitor(zoo.cached("llama"))
    tokens = pair(5)
    with monitor.attached(), torch.no_grad():
        model(tokens)
    mask = torch.tensor([[False, False, True, True, True], [True] * 5])
    trace = monitor.result(tokens, mask=mask)
    assert trace.position.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert trace.tokens.tolist() == [*tokens[0, 2:].tolist(), *tokens[1].tolist()]
    assert worst(trace.norms, norms_alone(model, list(tokens))[:, 2:]) < 1e-5


def test_what_does_not_fit_what_was_seen_is_refused():
    model, monitor = zoo.cached("gpt2"), NormMonitor(zoo.cached("gpt2"))
    with pytest.raises(ValueError, match=r"^monitor: nothing was seen; allowed: run the model with the hooks attached"):
        monitor.result()
    with monitor.attached(), torch.no_grad():
        model(pair(5))
    ones = torch.ones(2, 5, dtype=torch.bool)
    for tokens in (pair(4), pair(5)[:1], torch.cat([pair(5), pair(5)])):
        with pytest.raises(ValueError, match=r"^tokens: got shape .*; allowed: 2 rows of at least 5, as seen"):
            monitor.result(tokens)
    for mask in (ones[:, :4], ones[:1]):
        with pytest.raises(ValueError, match=r"^mask: got shape .*; allowed: 2 rows of at least 5, as seen"):
            monitor.result(mask=mask)
    ones[1] = False
    with pytest.raises(ValueError, match=r"^mask: .*row 1.*; allowed: "):
        monitor.result(mask=ones)
    longer = monitor.result(pair(9), mask=torch.ones(2, 5, dtype=torch.bool))  # a generation's ids go on
    assert torch.equal(longer.tokens, pair(9)[:, :5].flatten())


@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_no_model_is_refused():
    with pytest.raises(ValueError, match=r"^model: got Linear; allowed: a TransformerLens model"):
        NormMonitor(torch.nn.Linear(2, 2))


def test_beside_the_callers_own_hooks():
    model, tokens, calls = zoo.build("gpt2"), pair(), []
    monitor = NormMonitor(model)
    model.add_hook("blocks.0.hook_resid_pre", lambda stream, hook: calls.append("before") or stream * 3)
    with torch.no_grad(), monitor.attached():
        changed = model.run_with_cache(tokens)[1]["blocks.2.hook_resid_post"]
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_post", lambda stream, hook: calls.append("during"))])
    assert calls == ["before", "before", "during"]
    trace = monitor.result()
    assert trace.n_prompts == 4
    assert worst(trace.norms[-1, :12], changed.flatten(0, 1).norm(dim=-1)) < 1e-5  # the caller's change is seen
    with torch.no_grad():
        model(tokens)
    assert calls[3:] == ["before"]


@pytest.mark.parametrize("family", [name for name in ("llama", "gpt2", "hooked_gpt2") if name in zoo.FAMILIES])
def test_training_goes_on_undisturbed(family):
    model, tokens = zoo.build(family).train(), pair()
    model(tokens)[..., 0].sum().backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert wanted
    model.zero_grad()
    monitor, alive = NormMonitor(model), []
    with monitor.attached():
        with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda stream, hook: alive.append(weakref.ref(stream)))]):
            model(tokens)[..., 0].sum().backward()
        assert model.training
    for name, parameter in model.named_parameters():
        assert name not in wanted or torch.equal(parameter.grad, wanted[name])
    gc.collect()
    assert alive
    assert alive[0]() is None  # the graph's activations are gone, the norms have no hold on them
    trace = monitor.result(tokens)
    assert not trace.norms.requires_grad
    assert worst(trace.norms, norms_alone(model.eval(), list(tokens))) < 1e-5


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_no_hooks_are_left_and_what_was_seen_is_kept(error):
    model, tokens = zoo.build("llama"), pair()
    monitor = NormMonitor(model)
    before = state(model)

    def interrupt(stream, hook):
        raise error

    def run_twice():
        with torch.no_grad(), monitor.attached():
            model(tokens)
            model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", interrupt)])

    with pytest.raises(error):
        run_twice()
    assert same_state(before, state(model))
    trace = monitor.result()
    # The second run came as far as the end of block 0.
    assert worst(trace.norms, norms_alone(model, [*tokens, *tokens])[:2]) < 1e-5


@pytest.mark.skipif(zoo.HookedTransformer is None, reason="HookedTransformer alone starts at a later block without the first")
def test_a_run_from_a_later_block_leaves_what_was_seen_alone():
    model, monitor, tokens = zoo.cached("hooked_llama"), NormMonitor(zoo.cached("hooked_llama")), pair()
    with monitor.attached(), torch.no_grad():
        model(tokens)
        model(torch.randn(2, 6, zoo.D_MODEL), start_at_layer=1)
    assert worst(monitor.result().norms, norms_alone(model, list(tokens))) < 1e-5


def test_defects_are_found_in_a_generation():
    truth = planted()
    monitor = NormMonitor(truth.model)
    with monitor.attached():
        out = generate(truth.model, pair(4), max_new_tokens=4, use_past_kv_cache=True)
    defects = find_defects(monitor.result(out))
    assert (defects.explosion_blocks, defects.decay_blocks) == ((truth.explosion_block,), (truth.decay_block,))
    assert [(token.prompt, token.pos) for token in defects.tokens] == [(0, 0), (1, 0)]
