"""After any analysis, also one that was interrupted, a model is as it was before."""

import random

import numpy as np
import pytest
import torch
import zoo
from recording import same_state, state
from streams import ragged

from sd_lens.anatomy import anatomy
from sd_lens.applications.dynamics import direction_stability
from sd_lens.applications.quantization import quantization_study
from sd_lens.applications.signing import signature
from sd_lens.findings import analyse
from sd_lens.interventions.consequences import consequences
from sd_lens.interventions.patching import patch_sweep
from sd_lens.interventions.subspace import ExplosionSubspace
from sd_lens.linear.directions import directions_of
from sd_lens.linear.inputs import GaussianInput
from sd_lens.linear.linearize import linearize
from sd_lens.linear.measured import measure_inputs
from sd_lens.linear.trigger import trigger_direction
from sd_lens.models.check import check
from sd_lens.models.loading import weights_of
from sd_lens.models.planted import planted
from sd_lens.pathways import pathways
from sd_lens.propagation.answering import answer_probes
from sd_lens.propagation.collapse import collapse_curve
from sd_lens.propagation.probes import probe
from sd_lens.propagation.sensitivity import sensitivity
from sd_lens.propagation.squashing import squashing_bound
from sd_lens.spectrum import block_directions
from sd_lens.tracing.attribution import attribute_norm, attribute_trigger
from sd_lens.tracing.census import massive_activations
from sd_lens.tracing.confirmation import confirm_in_context
from sd_lens.tracing.defects import defect_direction, find_defects
from sd_lens.tracing.delimiters import token_pathways
from sd_lens.tracing.monitor import NormMonitor
from sd_lens.tracing.norms import measure_direction, trace_norms
from sd_lens.tracing.pathways import scan_vocabulary
from sd_lens.tracing.patterns import head_patterns
from sd_lens.tracing.repetition import repeated_tokens
from sd_lens.tracing.sinks import sink_attention
from sd_lens.tracing.sublayers import attribute_sublayers
from sd_lens.tracing.super_weights import super_weights

pytestmark = pytest.mark.usefixtures("as_users_run_it")  # the type checks of the test run draw random numbers

PROMPTS = [torch.tensor([5, 5, 9, 11, 12]), torch.tensor([7, 8, 9])]


def monitor(model):
    watching = NormMonitor(model)
    with watching.attached():
        model(PROMPTS[0].unsqueeze(0))
    model.run_with_hooks(PROMPTS[1].unsqueeze(0), fwd_hooks=watching.fwd_hooks())
    return watching.result()


def subspace_of(model, rank=2):
    return ExplosionSubspace.at(model, 1, rank=rank, delimiters=[9])


MAKERS = {
    "ablate": lambda subspace, **where: subspace.ablate(**where),
    "ablate to a mean": lambda subspace, **where: subspace.ablate(mean=PROMPTS, **where),
    "patch": lambda subspace, **where: subspace.patch(PROMPTS[0].unsqueeze(0), **where),
    "steer": lambda subspace, **where: subspace.steer(-2.0, **where),
    "steer to a target": lambda subspace, **where: subspace.steer(target=3.0, **where),
    "random control": lambda subspace, **where: subspace.ablate(**where).control(3),
}
WHERE = {
    "trigger": {},
    "direction, initial": {"side": "direction", "positions": "initial"},
    "both, delimiters": {"side": "both", "positions": "delimiters"},
    "both, a mask": {"side": "both", "positions": torch.tensor([[True, False, True, True, False]])},
}


def intervened(make, where):
    """A run with the hooks attached, and one with them handed over."""

    def run(model, found):
        intervention = MAKERS[make](subspace_of(model), **WHERE[where])
        with torch.no_grad():
            with intervention.attached():
                model(PROMPTS[0].unsqueeze(0))
            return model.run_with_hooks(PROMPTS[0].unsqueeze(0), fwd_hooks=intervention.fwd_hooks())

    return run


@pytest.fixture(scope="module")
def found():
    model = planted(n_kv_heads=2).model
    trace = trace_norms(model, PROMPTS)
    return trace, find_defects(trace), scan_vocabulary(model, ids=range(9), control=0)


ANALYSES = {
    "trace_norms": lambda model, found: trace_norms(model, PROMPTS, batch_tokens=5),
    "trace_norms, stopped": lambda model, found: trace_norms(model, PROMPTS, stop_at=3),
    "defect_direction": lambda model, found: defect_direction(model, PROMPTS),
    "measure_direction": lambda model, found: measure_direction(model, found[0]),
    "check": lambda model, found: check(model),
    "attribute_sublayers": lambda model, found: attribute_sublayers(model, found[1]),
    "NormMonitor": lambda model, found: monitor(model),
    "analyse": lambda model, found: analyse(model, PROMPTS),
    "block_directions": lambda model, found: block_directions(model, blocks=[1], prompts=PROMPTS, inputs="measured"),
    "GaussianInput.measure": lambda model, found: GaussianInput.measure(model, PROMPTS, 2),
    "attribute_norm": lambda model, found: attribute_norm(model, PROMPTS, neurons=True, by_key=True),
    "attribute_trigger": lambda model, found: attribute_trigger(model, PROMPTS, neurons=True, rows="tokens"),
    "massive_activations": lambda model, found: massive_activations(model, PROMPTS),
    "super_weights": lambda model, found: super_weights(model, PROMPTS),
    "scan_vocabulary, initial": lambda model, found: scan_vocabulary(model, ids=range(9), control=4),
    "scan_vocabulary, no attention": lambda model, found: scan_vocabulary(model, "no_attention", ids=range(9), block=2),
    "scan_vocabulary, second": lambda model, found: scan_vocabulary(model, "second", block=1, batch_tokens=7),
    "confirm_in_context": lambda model, found: confirm_in_context(model, found[2], k=2),
    "token_pathways": lambda model, found: token_pathways(model, PROMPTS),
    "sink_attention": lambda model, found: sink_attention(model, PROMPTS),
    "repeated_tokens": lambda model, found: repeated_tokens(model, [5, 6], n=5),
    "head_patterns": lambda model, found: head_patterns(model, PROMPTS[0]),
    "measure_inputs": lambda model, found: measure_inputs(model, PROMPTS, [0, 2]),
    "anatomy": lambda model, found: anatomy(model, PROMPTS),
    "pathways": lambda model, found: pathways(model, PROMPTS, max_ids=12),
    "ExplosionSubspace.at": lambda model, found: ExplosionSubspace.at(model),
    "coefficients": lambda model, found: subspace_of(model).coefficients(PROMPTS),
    "coefficients in the stream": lambda model, found: subspace_of(model).coefficients(PROMPTS, side="direction"),
    "patch, prepared": lambda model, found: subspace_of(model).patch(PROMPTS, side="both"),
    "ablate to a mean, prepared": lambda model, found: subspace_of(model).ablate(mean=PROMPTS, side="both"),
    **{f"{make}, {where}": intervened(make, where) for make in MAKERS for where in WHERE},
    "patch_sweep": lambda model, found: patch_sweep(model, [PROMPTS[0]], [PROMPTS[0].flip(0)], controls=1, rank=2),
    "patch_sweep, heads": lambda model, found: patch_sweep(
        model, [PROMPTS[0]], [PROMPTS[0].flip(0)], controls=1, heads=True, metric="loss"
    ),
    "consequences": lambda model, found: consequences(model, PROMPTS, controls=1, where=("initial",), generate=[PROMPTS[1]]),
}
TEXT = torch.arange(40) * 7 % 97
ANALYSES |= {
    "quantization_study": lambda model, found: quantization_study(
        model, TEXT, window=16, stride=12, each_block=False, granularities=["per_tensor", "per_token"]
    ),
    "signature": lambda model, found: signature(model, prompts=PROMPTS),
    "direction_stability": lambda model, found: direction_stability([model, model], PROMPTS),
}
ONES = {"zero": 5, "one": 6}
ANALYSES |= {
    "collapse_curve": lambda model, found: collapse_curve(
        model, probe(model, symbols=ONES), [1, 3], intervention=subspace_of(model).ablate(side="both")
    ),
    "collapse_curve, not shared": lambda model, found: collapse_curve(
        model, probe(model, symbols=ONES), [1, 3], shared=False, metrics=["kl", "linf"]
    ),
    "sensitivity": lambda model, found: sensitivity(model, PROMPTS[0], of="logits", sources=[0, 2]),
    "sensitivity, estimated": lambda model, found: sensitivity(model, PROMPTS[0], method="hutchinson", n_probes=2),
    "squashing_bound": lambda model, found: squashing_bound(model, PROMPTS[0]),
    "answer_probes": lambda model, found: answer_probes(model, probe(model, "copy-last", symbols=ONES), [2, 3]),
}
WEIGHTS_ONLY = {
    "signature, from weights": lambda model, found: signature(weights_of(model)),
    "directions_of": lambda model, found: directions_of(weights_of(model), blocks=[1]),
    "linearize": lambda model, found: linearize(weights_of(model)[1]).block.to_dense(),
    "trigger_direction": lambda model, found: trigger_direction(weights_of(model)[1]),
    "ExplosionSubspace.at a block": lambda model, found: subspace_of(model),
    "interventions, prepared": lambda model, found: [
        (made.fwd_hooks(), made.control(), made + made)
        for made in (MAKERS[name](subspace_of(model), **where) for name in ("ablate", "steer") for where in WHERE.values())
    ],
    "response_curve": lambda model, found: subspace_of(model).response_curve(),
    "probe_singular_vectors": lambda model, found: subspace_of(model).probe_singular_vectors(4),
}


def caller(model, interrupted_by=None, at="blocks.1.hook_resid_post", on=1):
    """Puts a permanent and a temporary hook of the caller's on a model; gives what they write into."""
    calls = {"permanent": 0, "temporary": 0}

    def permanent(value, hook):
        calls["permanent"] += 1

    def temporary(value, hook):
        calls["temporary"] += 1
        if interrupted_by is not None and calls["temporary"] == on:
            raise interrupted_by("by the caller's hook")

    model.add_hook("blocks.0.hook_resid_pre", permanent, is_permanent=True)
    model.add_hook(at, temporary)
    return calls


def random_states():
    legacy = np.random.get_state()  # noqa: NPY002  # the global state is what must not move
    return torch.get_rng_state().tolist(), random.getstate(), [np.asarray(part).tolist() for part in legacy]


def everything(model):
    """What `recording.state` keeps, and the modes of a bridge's Hugging Face model, which is no part of its module tree."""
    original = getattr(model, "original_model", None)
    hidden = [] if original is None else [module.training for module in original.modules()]
    return state(model) | {"hidden training": hidden}


def fresh_model():
    """In a mixture of modes and with some gradients switched off, as callers may have it."""
    model = planted(n_kv_heads=2).model
    model.train()
    model.blocks[1].eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
    return model


@pytest.fixture(scope="module")
def model():
    return fresh_model()


def still_firing(model, calls):
    before = dict(calls)
    with torch.no_grad():
        model(PROMPTS[0].unsqueeze(0))
    return {name: calls[name] - before[name] for name in calls} == {"permanent": 1, "temporary": 1}


@pytest.mark.parametrize("name", [*ANALYSES, *WEIGHTS_ONLY])
def test_after_an_analysis(name, model, found):
    model.reset_hooks(including_permanent=True)
    calls = caller(model)
    before, randomness = everything(model), random_states()
    result = (ANALYSES | WEIGHTS_ONLY)[name](model, found)
    assert result is not None
    assert same_state(before, everything(model))
    assert random_states() == randomness
    assert (calls["permanent"] > 0) == (name in ANALYSES)  # the caller's hooks fired in it, too
    # Passes that only ask about the embedding end before the block that the temporary hook is in.
    assert (calls["temporary"] > 0) == (calls["permanent"] > 0)
    assert calls["temporary"] <= calls["permanent"]
    assert still_firing(model, calls)
    with torch.no_grad():
        assert not model(PROMPTS[0].unsqueeze(0)).requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ANALYSES)
def test_after_an_interrupted_analysis(name, error, model, found):
    model.reset_hooks(including_permanent=True)
    calls = caller(model, interrupted_by=error)
    before, randomness = everything(model), random_states()
    with pytest.raises(error, match="by the caller's hook"):
        ANALYSES[name](model, found)
    assert calls["temporary"] == 1
    assert same_state(before, everything(model))
    assert random_states() == randomness
    assert torch.is_grad_enabled()
    assert still_firing(model, calls)


@pytest.mark.parametrize("on", [2, 3])
@pytest.mark.parametrize("name", ["patch_sweep", "consequences", "analyse", "quantization_study"])
def test_after_an_analysis_interrupted_where_its_own_hooks_are_attached(name, on, model, found):
    model.reset_hooks(including_permanent=True)
    calls = caller(model, interrupted_by=KeyboardInterrupt, on=on)
    before, randomness = everything(model), random_states()
    with pytest.raises(KeyboardInterrupt, match="by the caller's hook"):
        ANALYSES[name](model, found)
    assert calls["temporary"] == on
    assert same_state(before, everything(model))
    assert random_states() == randomness
    assert still_firing(model, calls)


UNPLANTED = {
    "trace_norms": lambda model, tokens: trace_norms(model, tokens),
    "measure_direction": lambda model, tokens: measure_direction(model, trace_norms(model, tokens), min_ratio=1.1),
    "check": lambda model, tokens: check(model),
    "analyse": lambda model, tokens: analyse(model, tokens),
    "attribute_norm": lambda model, tokens: attribute_norm(
        model, tokens, block=1, direction=torch.ones(model.cfg.d_model), neurons=[0]
    ),
    "scan_vocabulary": lambda model, tokens: scan_vocabulary(model, "no_attention", ids=range(5), block=1),
    "ablate, attached": lambda model, tokens: steered(model, tokens),
    "patch_sweep": lambda model, tokens: patch_sweep(
        model, [tokens[0]], [tokens[0].flip(0)], subspace=subspace_of(model), blocks=[1], positions=[0, 2], controls=1, metric="kl"
    ),
}


def steered(model, tokens):
    intervention = subspace_of(model).steer(2.0, side="both", positions="delimiters")
    with torch.no_grad(), intervention.attached():
        model(tokens[0].unsqueeze(0))


@pytest.mark.parametrize("error", [None, RuntimeError])
@pytest.mark.parametrize(
    "family", [name for name in ("gpt2", "gemma2", "mixtral", "falcon", "hooked_llama", "hooked_gpt2") if name in zoo.FAMILIES]
)
def test_on_other_families(family, error):
    model, tokens = zoo.build(family).train(), ragged(zoo.VOCAB, (4, 6))
    for analysis in UNPLANTED.values():
        model.reset_hooks(including_permanent=True)
        calls = caller(model, interrupted_by=error)
        before, randomness = everything(model), random_states()
        if error is None:
            analysis(model, tokens)
        else:
            with pytest.raises(error, match="by the caller's hook"):
                analysis(model, tokens)
        assert same_state(before, everything(model))
        assert random_states() == randomness
        assert calls["temporary"] > 0
        assert still_firing(model, calls)


def test_an_interrupted_run_leaves_a_surrounding_context_of_hooks_alone():
    model, calls = zoo.build("llama"), []

    def interrupt(stream, hook):
        if len(calls) == 3:
            raise RuntimeError("by the caller's hook")

    hooks = [
        ("blocks.0.hook_resid_pre", lambda stream, hook: calls.append(1)),
        ("blocks.2.attn.hook_z", interrupt),
    ]
    tokens = torch.stack(ragged(zoo.VOCAB, (4, 4)))
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        trace_norms(model, tokens, batch_tokens=4)
        assert len(calls) == 2
        with pytest.raises(RuntimeError, match="by the caller's hook"):
            trace_norms(model, tokens)
        model(tokens)
        assert len(calls) == 4
    model(tokens)
    assert len(calls) == 4


def test_reading_a_model_does_not_change_what_it_computes():
    truth = planted("gpt2", pathway="embedding")
    tokens = torch.stack(ragged(97, (6, 6)))
    with torch.no_grad():
        before = truth.model(tokens)
        analyse(truth.model, tokens)
        assert torch.equal(truth.model(tokens), before)
