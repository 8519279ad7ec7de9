"""Which activation function a feed-forward layer really applies.

A model's configuration cannot be trusted for this (it reads ``relu`` on several architectures that use GELU), so the
function is identified by what it computes: the module's own callable is evaluated on a grid and compared with the known ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """An element-wise activation function and its name.

    Attributes:
        name: ``"silu"``, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"relu"``, or ``"other"`` for a function not among these.
        fn: The function itself.
    """

    name: str
    fn: Callable[[Tensor], Tensor]

    def __call__(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Applies the function element by element."""
        return self.fn(x)

    def __repr__(self) -> str:
        return f"Activation({self.name!r})"


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


KNOWN: dict[str, Activation] = {
    "silu": Activation("silu", F.silu),
    "gelu": Activation("gelu", F.gelu),
    "gelu_tanh": Activation("gelu_tanh", _gelu_tanh),
    "relu": Activation("relu", F.relu),
}

# The two GELUs differ by up to 5e-4, float32 rounding of either by less than 1e-6.
_TOLERANCE = 1e-5


def identify(fn: Callable[[Tensor], Tensor]) -> Activation:
    """Names an activation function by comparing its values with those of the known ones.

    Args:
        fn: Any element-wise callable on tensors, a module included.

    Returns:
        The known activation with the same values, else ``Activation("other", fn)``.

    Example:
        >>> identify(torch.nn.GELU(approximate="tanh")).name
        'gelu_tanh'
    """
    grid = torch.linspace(-8.0, 8.0, 641)
    with torch.no_grad():
        values = fn(grid)
    for known in KNOWN.values():
        if torch.allclose(values.float(), known(grid), rtol=0.0, atol=_TOLERANCE):
            return known
    return Activation("other", fn)
