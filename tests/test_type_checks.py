"""The test run's type checker: functions defined anew are checked by what they are annotated with each time."""

import jaxtyping
import pytest
import torch
import type_checks
from jaxtyping import Float, jaxtyped
from torch import Tensor
from type_checks import checked


def defined(hint, returned=None):
    @jaxtyped(typechecker=checked)
    def inner(x: hint, *, more: int = 0) -> returned:
        return None if returned is None else x

    return inner


def test_each_definition_has_its_own_checks():
    number, vector = defined(int), defined(Float[Tensor, "n"])
    number(3)
    vector(torch.ones(3))
    for function, wrong in ((number, torch.ones(3)), (vector, 3), (vector, torch.ones(3, 3)), (defined(int), "text")):
        with pytest.raises(jaxtyping.TypeCheckError):
            function(wrong)
    with pytest.raises(jaxtyping.TypeCheckError):
        number(3, more="text")


def test_what_is_returned_is_checked_too():
    assert defined(int, int)(3) == 3
    with pytest.raises(jaxtyping.TypeCheckError):
        defined(int, str)(3)


def test_the_same_definition_is_asked_for_once(monkeypatch):
    asked = []
    monkeypatch.setattr(type_checks, "beartype", lambda function: asked.append(function) or function)
    for _ in range(3):
        defined(Float[Tensor, "only here"])
    assert len(asked) == 2  # for the arguments, and for what is returned
