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
        name: ``"silu"``, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"quick_gelu"`` (``x * sigmoid(1.702 x)``), ``"relu"``, ``"relu2"``
            (``relu(x)`` squared), or ``"other"`` for a function not among these.
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


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


KNOWN: dict[str, Activation] = {
    "silu": Activation("silu", F.silu),
    "gelu": Activation("gelu", F.gelu),
    "gelu_tanh": Activation("gelu_tanh", _gelu_tanh),
    "quick_gelu": Activation("quick_gelu", _quick_gelu),
    "relu": Activation("relu", F.relu),
    "relu2": Activation("relu2", _relu2),
}

# The two GELUs differ by up to 5e-4 and no two of the others by less; float32 rounding of any of them is below 1e-6, and a few parts
# in ten million of relu2's larger values.
_ATOL, _RTOL = 1e-5, 1e-6


def identify(fn: Callable[[Tensor], Tensor]) -> Activation:
    """Names an activation function by comparing its values with those of the known ones.

    Args:
        fn: Any element-wise callable on tensors, a module included. One that refuses float32 is given half precision, one with
            parameters is evaluated where they are.

    Returns:
        The known activation with the same values, else ``Activation("other", fn)``.

    Raises:
        ValueError: The function is not element-wise (a softmax, SoLU).

    Example:
        >>> identify(torch.nn.GELU(approximate="tanh")).name
        'gelu_tanh'
    """
    evaluated = _values(fn)
    if evaluated is not None:
        grid, values, rtol = evaluated
        for known in KNOWN.values():
            if torch.allclose(values, known(grid), rtol=rtol, atol=_ATOL):
                return known
        half = _values(fn, every=2)
        if half is not None and not torch.allclose(half[1], values[::2], rtol=rtol, atol=_ATOL):
            raise ValueError(f"activation: got {fn!r}, which mixes the numbers it is given; allowed: element-wise functions")
    return Activation("other", fn)


def _values(fn: Callable[[Tensor], Tensor], every: int = 1) -> tuple[Tensor, Tensor, float] | None:
    """A grid (of its points, one in ``every``), the function's values on it and their relative precision; None where it accepts no grid."""
    owned = [*fn.parameters(), *fn.buffers()] if isinstance(fn, torch.nn.Module) else []
    devices = {tensor.device for tensor in owned} or {torch.device("cpu")}
    if torch.cuda.is_available():  # pragma: no cover
        devices.add(torch.device("cuda"))
    for dtype, rtol in ((torch.float32, _RTOL), (torch.bfloat16, 2**-4), (torch.float16, 2**-7)):
        grid = torch.linspace(-8.0, 8.0, 641)[::every].to(dtype)
        for device in devices:
            try:
                with torch.no_grad():
                    values = fn(grid.to(device, copy=True)).cpu().float()  # a copy, since some work in place
            except Exception:  # kernels refuse a dtype or a device in many ways
                continue
            if values.shape == grid.shape:
                return grid.float(), values, rtol
    return None
