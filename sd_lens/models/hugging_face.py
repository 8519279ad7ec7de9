"""The Hugging Face model behind a bridge: found, as transformers builds it, and copied free of the bridge."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sd_lens.models.protocol import TransformerLensModel


def hugging_face_of(model: Any) -> Any:
    """The Hugging Face model behind a bridge.

    Raises:
        ValueError: There is none.
    """
    from transformers import PreTrainedModel

    hf = getattr(model, "original_model", None)
    if not isinstance(hf, PreTrainedModel):
        raise ValueError(
            f"model: got {type(model).__name__}, whose projections are no layers of a Hugging Face model; allowed: a TransformerBridge around "
            "one, which sd_lens.load gives on every TransformerLens"
        )
    return hf


def pristine(hf: Any) -> Any:
    """The same architecture as transformers itself builds it, on the meta device: every layer under its own name, no numbers."""
    with torch.device("meta"):
        return type(hf)(hf.config)


def plain_copy(model: TransformerLensModel) -> Any:
    """A Hugging Face model with the weights of a bridge's, free of the bridge; needs the memory of a second model.

    Args:
        model: A `TransformerBridge` around a Hugging Face model.

    Returns:
        The model, in eval mode, of the same type, device and precision.
    """
    hf = hugging_face_of(model)
    state = {unwrapped(name): tensor for name, tensor in hf.state_dict().items()}
    parameter = next(hf.parameters())
    with torch.random.fork_rng(devices=[]):  # a model is drawn at random before it gets its weights
        copy = type(hf)(hf.config).to(device=parameter.device, dtype=parameter.dtype)
    wanted = copy.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    if missing:
        raise ValueError(
            f"model: its bridge holds {missing[0]} in another form than transformers; allowed: models whose layers it keeps whole "
            "(no fused queries, keys and values)"
        )
    copy.load_state_dict({name: state[name] for name in wanted})
    # Buffers that no checkpoint holds, such as rotary frequencies, are more precise than the weights of a model in half precision.
    kept = {unwrapped(name): buffer for name, buffer in hf.named_buffers(remove_duplicate=False)}
    for name, buffer in copy.named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(copy.get_submodule(owner), leaf, kept[name].clone() if name in kept else buffer)
    return copy.eval()


def pristine_names(hf: Any) -> tuple[str, ...]:
    """Names of all linear layers as transformers itself builds the model."""
    return tuple(name for name, module in pristine(hf).named_modules() if is_linear(module))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is ``nn.Linear`` or GPT-2's ``Conv1D``, which is the same with its matrix transposed."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def as_linear(module: nn.Module) -> nn.Linear:
    """A linear layer as ``nn.Linear``: itself, or what GPT-2's ``Conv1D`` computes."""
    if isinstance(module, nn.Linear):
        return module
    stored: Any = module
    d_in, d_out = stored.weight.shape
    linear = nn.Linear(d_in, d_out, device=stored.weight.device, dtype=stored.weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(stored.weight.T)
        linear.bias.copy_(stored.bias)
    return linear.requires_grad_(False)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's ``Conv1D``."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def unwrapped(name: str) -> str:
    """A module's name without the bridge's wrappers."""
    return ".".join(step for step in name.split(".") if step != "_original_component")
