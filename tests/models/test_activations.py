import math

import pytest
import torch
import zoo
from transformers.activations import ACT2FN

from sd_lens.models.activations import KNOWN, identify
from sd_lens.models.loading import weights_of

# Written with math's scalars, as the textbooks do.
FORMULAS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
}
UNKNOWN = {
    "relu squared": lambda x: torch.relu(x) ** 2,
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "tanh": torch.tanh,
    "identity": lambda x: x,
    "leaky relu": torch.nn.LeakyReLU(0.01),
    "prelu, which has a parameter": torch.nn.PReLU(),
    "a hundredth of a per cent off silu": lambda x: 1.0001 * torch.nn.functional.silu(x),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_known_activation_has_its_textbook_values(name):
    grid = torch.linspace(-9, 9, 73, dtype=torch.float64)
    wanted = torch.tensor([FORMULAS[name](x) for x in grid.tolist()], dtype=torch.float64)
    torch.testing.assert_close(KNOWN[name](grid), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (torch.nn.SiLU(), "silu"),
        (torch.nn.GELU(), "gelu"),
        (torch.nn.GELU(approximate="tanh"), "gelu_tanh"),
        (torch.nn.ReLU(), "relu"),
        (lambda x: x.clamp(min=0), "relu"),
        (lambda x: x.double() * torch.special.ndtr(x.double()), "gelu"),
        *((ACT2FN[hf], "gelu_tanh") for hf in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")),
        *((ACT2FN[hf], hf) for hf in ("silu", "gelu", "relu")),
    ],
)
def test_activations_are_named_by_what_they_compute(fn, name):
    assert identify(fn) is KNOWN[name]


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_activation_is_kept_as_it_is(name):
    fn = UNKNOWN[name]
    found = identify(fn)
    assert found.name == "other"
    assert found.fn is fn
    x = torch.linspace(-3, 3, 7)
    assert torch.equal(found(x), fn(x))


@pytest.mark.parametrize("family", [f for f in zoo.FAMILIES.values() if not f.moe], ids=lambda f: f.name)
def test_every_architecture_has_its_activation_identified(family):
    assert weights_of(zoo.cached(family.name))[0].ffn.activation is KNOWN[family.activation]
