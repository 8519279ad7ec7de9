import itertools
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
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
}
UNKNOWN = {
    "relu cubed": lambda x: torch.relu(x) ** 3,
    "quick gelu with another constant": lambda x: x * torch.sigmoid(1.7 * x),
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
        *((ACT2FN[hf], hf) for hf in ("silu", "gelu", "quick_gelu", "relu", "relu2")),
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


def test_no_two_known_activations_could_be_taken_for_each_other():
    grid = torch.linspace(-8, 8, 641)
    values = {name: activation(grid) for name, activation in KNOWN.items()}
    for first, second in itertools.combinations(values, 2):
        assert (values[first] - values[second]).abs().max() > 4e-4, (first, second)


def _accepting(dtype, fn):
    def picky(x):
        if x.dtype != dtype:
            raise TypeError(f"expected {dtype}, got {x.dtype}")
        return fn(x)

    return picky


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_function_that_takes_half_precision_only_is_named_too(name, dtype):
    assert identify(_accepting(dtype, KNOWN[name])) is KNOWN[name]


def test_a_function_that_takes_none_of_our_inputs_is_kept_as_it_is():
    fn = _accepting(torch.int8, torch.relu)
    assert identify(fn).name == "other"
    assert identify(fn).fn is fn


class OnMeta(torch.nn.Module):
    """Has a parameter without numbers, as in a model that is only an outline."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.empty(1, device="meta"))

    def forward(self, x):
        return torch.where(x > 0, x, self.slope * x)


def test_a_function_with_parameters_that_are_not_there_is_kept_as_it_is():
    fn = OnMeta()
    assert identify(fn).fn is fn


@pytest.mark.parametrize(("fn", "name"), [(torch.nn.SiLU(inplace=True), "silu"), (torch.nn.ReLU(inplace=True), "relu")])
def test_a_function_that_works_in_place_is_named(fn, name):
    assert identify(fn) is KNOWN[name]


@pytest.mark.parametrize("fn", [lambda x: x * x.softmax(-1), lambda x: x.cumsum(-1)], ids=["solu", "cumsum"])
def test_a_function_that_is_not_element_wise_is_refused(fn):
    with pytest.raises(ValueError, match=r"activation: got <function .* mixes the numbers it is given; allowed: element-wise"):
        identify(fn)


@pytest.mark.parametrize("family", [f for f in zoo.FAMILIES.values() if not f.moe], ids=lambda f: f.name)
def test_every_architecture_has_its_activation_identified(family):
    assert weights_of(zoo.cached(family.name))[0].ffn.activation is KNOWN[family.activation]
