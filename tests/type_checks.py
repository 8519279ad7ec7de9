"""The type checker of the test run: beartype, which is asked once for what is defined again at every call."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, get_args, get_origin

from beartype import beartype
from jaxtyping import AbstractArray

_checked: dict[Hashable, Callable[..., Any]] = {}


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Beartype's checks of a function that jaxtyping has made of a signature, and that has no body of its own.

    Functions inside functions, such as hooks, are decorated anew whenever the outer one runs, which takes longer than what they
    do. What is checked depends on the signature alone.
    """
    if "<locals>" not in function.__qualname__:
        return beartype(function)
    signature = _signature(function)
    if signature not in _checked:
        _checked[signature] = beartype(function)
    return _checked[signature]


def _signature(function: Callable[..., Any]) -> Hashable:
    code = function.__code__
    return (
        (function.__module__, function.__qualname__),
        (code.co_varnames, code.co_posonlyargcount, code.co_argcount, code.co_kwonlyargcount, code.co_flags),
        (len(function.__defaults__ or ()), frozenset(function.__kwdefaults__ or ())),
        tuple((name, _same_if_equal(hint)) for name, hint in function.__annotations__.items()),
    )


def _same_if_equal(hint: Any) -> Hashable:
    """An annotation as a key: jaxtyping's arrays are another class each time that they are written."""
    if isinstance(hint, list):  # of a callable's arguments
        return tuple(map(_same_if_equal, hint))
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return (hint.dtype, _same_if_equal(hint.array_type), hint.dim_str)
    if get_origin(hint) is not None:
        return (get_origin(hint), tuple(map(_same_if_equal, get_args(hint))))
    return (type(hint), hint)
