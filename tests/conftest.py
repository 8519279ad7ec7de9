"""What all tests share: no network, one thread, reproducible random examples, planted models."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jaxtyping
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("suite")

LIKE_ANOTHER = frozenset(
    (
        "llama_bias",
        "mistral",
        "qwen2",
        "gemma3",
        "olmo",
        "nemotron",
        "qwen3_moe",
        "olmoe",
        "gpt2_quick_gelu",
        "gpt_neox_sequential",
        "phi",
        "falcon_new",
    )
)
"""Architectures of the zoo that TransformerLens bridges with the same code as another one there."""


def pytest_addoption(parser):
    parser.addoption("--few-families", action="store_true", help="of architectures bridged by the same code, test one")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported stays: the garbage collector need not go through it again and again, which takes it a tenth of the run."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000, 20, 20)
        gc.enable()


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--few-families"):
        return
    left = [item for item in items if not LIKE_ANOTHER.intersection(_texts(item))]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(left)])
    items[:] = left


def _texts(item):
    """The strings that a test is parametrised with."""
    return [value for value in getattr(getattr(item, "callspec", None), "params", {}).values() if isinstance(value, str)]


PLANTED = [(architecture, pathway) for architecture in ("llama", "gpt2", "gpt_neox") for pathway in ("head", "embedding")]


@pytest.fixture(scope="session", params=PLANTED, ids="-".join)
def planted_model(request):
    """A `Planted` of each architecture and pathway, with grouped heads where there can be; leave it as you found it."""
    from shared import planted

    architecture, pathway = request.param
    return planted(architecture, pathway=pathway, n_kv_heads=2 if architecture == "llama" else None)


@pytest.fixture
def loaded_once(monkeypatch):
    """The shipped model is loaded once for all tests that ask for this, however often they or what they call load it."""
    import shared

    import sd_lens
    from sd_lens.models import loading

    for place in (loading, sd_lens):
        monkeypatch.setattr(place, "load", shared.load)


@pytest.fixture
def as_users_run_it():
    """Without the type checks of the test run, which would catch an argument of the wrong type before the package does."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
