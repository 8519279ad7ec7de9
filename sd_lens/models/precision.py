"""A model run in another precision than it is held in, one block converted at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sd_lens.models.key_values import is_hooked
from sd_lens.models.protocol import TransformerLensModel

PRECISIONS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The precisions that models are run in, by name."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without ``torch.``.

    Args:
        dtype: The dtype.
    """
    return str(dtype).removeprefix("torch.")


def require_runnable(model: TransformerLensModel, dtypes: Sequence[Any], *, argument: str = "dtypes") -> list[torch.dtype]:
    """The dtypes, each tried on the model's device with the operations that transformers are made of.

    Args:
        model: The model.
        dtypes: Dtypes or their names.
        argument: What they were given as.

    Raises:
        ValueError: There is none, one is not known, or the machine cannot compute in it.
    """
    if isinstance(dtypes, str | torch.dtype):
        dtypes = [dtypes]
    found: list[torch.dtype] = []
    for given in dtypes:
        dtype: Any = PRECISIONS.get(given) if isinstance(given, str) else given
        if dtype not in PRECISIONS.values():
            shown = dtype_name(given) if isinstance(given, torch.dtype) else repr(given)
            raise ValueError(f"{argument}: got {shown}; allowed: {', '.join(PRECISIONS)}")
        try:
            _try(dtype, model.cfg.device)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{argument}: got {dtype_name(dtype)}, which {model.cfg.device} cannot run ({reason}); allowed: {', '.join(PRECISIONS)}, as far as the machine can"
            ) from error
        if dtype not in found:
            found.append(dtype)
    if not found:
        raise ValueError(f"{argument}: got none; allowed: some of {', '.join(PRECISIONS)}")
    return found


def _try(dtype: torch.dtype, device: Any) -> None:
    rows = torch.ones(4, 4, dtype=dtype, device=device)
    rows = nn.functional.embedding(torch.tensor([0, 1], device=device), rows)
    rows = nn.functional.layer_norm(rows, (4,)) @ torch.ones(4, 4, dtype=dtype, device=device)
    rows = nn.functional.silu(rows) * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1)
    torch.softmax(rows.unsqueeze(0) @ rows.unsqueeze(0).mT, -1).float().sum().item()


@contextmanager
def running_in(model: TransformerLensModel, dtype: torch.dtype) -> Iterator[None]:
    """Whatever runs the model in the body runs it in another precision; afterwards its weights are the same tensors as before.

    A block's weights are converted when a pass enters it and forgotten when it is left, so that one block's weights (and what does not
    belong to a block: embeddings and final norm) are in memory beyond the model. What transformers computes in float32 in models loaded
    in half precision, such as norms, the softmax and the angles of rotary positions, it computes in float32 here too, also in float64.

    Args:
        model: The model.
        dtype: The precision.

    Example:
        >>> import torch
        >>> from sd_lens.models.loading import load
        >>> model = load("tiny")
        >>> with torch.no_grad(), running_in(model, torch.bfloat16):
        ...     model(torch.tensor([[1, 25]])).dtype
        torch.bfloat16
        >>> next(model.parameters()).dtype
        torch.float32
    """
    loaded: Any = model
    blocks: list[nn.Module] = list(loaded.blocks)
    per_block = [_numbers(loaded, [block]) for block in blocks]
    in_blocks = {id(tensor) for tensors in per_block for tensor in tensors}
    others = [tensor for tensor in _numbers(loaded, _modules(loaded)) if id(tensor) not in in_blocks]
    before = loaded.cfg.dtype
    swapped: list[list[tuple[Tensor, Tensor]]] = [[] for _ in blocks]
    with ExitStack() as stack:
        loaded.cfg.dtype = dtype
        stack.callback(setattr, loaded.cfg, "dtype", before)
        stack.callback(_restore, _converted(others, dtype))
        for number, block in enumerate(blocks):

            def enter(module: nn.Module, args: Any, number: int = number) -> None:
                swapped[number] += _converted(per_block[number], dtype)

            def leave(module: nn.Module, args: Any, output: Any, number: int = number) -> None:
                _restore(swapped[number])

            stack.callback(_restore, swapped[number])
            stack.callback(block.register_forward_pre_hook(enter).remove)
            # Also where an exception ends the pass.
            stack.callback(block.register_forward_hook(leave, always_call=True).remove)
        yield


def _modules(model: Any) -> list[nn.Module]:
    # A bridge keeps the Hugging Face model out of its module tree.
    return [part for part in (model, getattr(model, "original_model", None)) if isinstance(part, nn.Module)]


def _numbers(model: Any, modules: Iterable[nn.Module]) -> list[Tensor]:
    """Weights in floating point, each once.

    Buffers are weights where their module has parameters (bridges give unembeddings a buffer of zeros as bias); elsewhere they are tables,
    such as the frequencies of rotary positions, which transformers keeps in float32. `HookedTransformer` keeps such tables as weights.
    """
    parts = [part for module in modules for part in module.modules()]
    tensors: list[Tensor] = [tensor for part in parts for tensor in part.parameters(recurse=False)]
    for part in parts:
        if is_hooked(model) or next(part.parameters(recurse=False), None) is not None:
            tensors.extend(part.buffers(recurse=False))
    return list({id(tensor): tensor for tensor in tensors if tensor.is_floating_point()}.values())


def _converted(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Converts tensors in their places; gives each with what it held."""
    held = [(tensor, tensor.data) for tensor in tensors if tensor.dtype != dtype]
    for tensor, data in held:
        tensor.data = data.to(dtype)
    return held


def _restore(held: list[tuple[Tensor, Tensor]]) -> None:
    while held:
        tensor, data = held.pop()
        tensor.data = data
