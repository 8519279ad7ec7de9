"""Norms of the residual stream after every block of a Llama, the quantity the whole training is watched by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM


@contextmanager
def recorded(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the outputs of modules while the context is open.

    ``output_hidden_states`` would not do: its last entry is taken after the final norm.

    Args:
        modules: The modules, in the order in which they run.

    Yields:
        A list that every forward pass appends one tensor per module to.
    """
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append((output if isinstance(output, Tensor) else output[0]).detach())

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def block_outputs(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Residual stream after every block.

    Args:
        model: The model.
        ids: Ids of shape (batch, place).

    Returns:
        Tensor of shape (block, batch, place, width).
    """
    with recorded(list(model.model.layers)) as outputs:
        model(input_ids=ids)
    return torch.stack(outputs)


def initial_and_median(model: LlamaForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Norm of the initial token and median norm of the others, after every block.

    Args:
        model: The model.
        ids: Ids of shape (batch, place).

    Returns:
        Mean norm at place 0 and median over all other places, each of shape (block,).
    """
    norms = block_outputs(model, ids).norm(dim=-1)
    return norms[:, :, 0].mean(1), norms[:, :, 1:].flatten(1).median(1).values
