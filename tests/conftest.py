"""What all tests share: no network, one thread, reproducible random examples, planted models."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jaxtyping
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("suite")

PLANTED = [(architecture, pathway) for architecture in ("llama", "gpt2", "gpt_neox") for pathway in ("head", "embedding")]


@pytest.fixture(scope="session", params=PLANTED, ids="-".join)
def planted_model(request):
    """A `Planted` of each architecture and pathway, with grouped heads where there can be; leave it as you found it."""
    from sd_lens.models.planted import planted

    architecture, pathway = request.param
    return planted(architecture, pathway=pathway, n_kv_heads=2 if architecture == "llama" else None)


@pytest.fixture
def as_users_run_it():
    """Without the type checks of the test run, which would catch an argument of the wrong type before the package does."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
