"""What a single weight of an FFN's output matrix is called: in TransformerLens, and in the Hugging Face model behind it.

Libraries keep that matrix with neurons in rows (TransformerLens, the Conv1D of GPT-2) or in columns (``nn.Linear``), alone or stacked
with other experts', under many names. None of this is looked up in a table: a parameter's memory and strides say which of its
entries a weight is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from sd_lens.models.live import LiveWeights
from sd_lens.models.loading import require_usable
from sd_lens.models.modules import tensor_of
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.weights import FFNWeights, MoEWeights

Expert = int | Literal["shared"] | None
"""Which of a block's feed-forward layers: an expert by its number, the one that every token goes through, None in a dense block."""

_WRAPPER = re.compile(r"(?<![^.])_original_component\.")  # what bridges put around the modules of a Hugging Face model


class EntryNames(NamedTuple):
    """What one weight is called.

    Attributes:
        tl: In the TransformerLens model, such as ``"blocks.1.mlp.W_out[7890, 2533]"``.
        hf: In the ``state_dict()`` of the Hugging Face model, such as ``"model.layers.1.mlp.down_proj.weight[2533, 7890]"``; None where
            there is no such model, or the weight is no entry of its parameters.
    """

    tl: str
    hf: str | None


def entry_names(model: TransformerLensModel, block: int, neuron: int, dim: int, *, expert: Expert = None) -> EntryNames:
    """Names of the weight from one neuron of an FFN to one dimension of the residual stream, indexed as each library has it.

    The Hugging Face names are those of the model in memory. A checkpoint's files may have others: older ones keep experts one by one,
    which transformers stacks when it loads them.

    Args:
        model: A TransformerLens model.
        block: The block.
        neuron: The neuron, a row of ``W_out``.
        dim: The dimension of the residual stream, a column of ``W_out``.
        expert: Of a mixture of experts: which, or ``"shared"``.

    Returns:
        The names.

    Raises:
        ValueError: There is no such block, expert, neuron or dimension.

    Example:
        >>> from sd_lens.models.loading import load
        >>> entry_names(load("tiny"), 2, 205, 18)
        EntryNames(tl='blocks.2.mlp.W_out[205, 18]', hf='model.layers.2.mlp.down_proj.weight[18, 205]')
    """
    require_usable(model)
    weights = LiveWeights(model)[block]
    W_out = ffn_of(weights.ffn, expert).W_out
    for name, index, size in (("neuron", neuron, W_out.shape[0]), ("dim", dim, W_out.shape[1])):
        if not 0 <= index < size:
            raise ValueError(f"{name}: got {index}; allowed: 0 to {size - 1}")
    entry = W_out[neuron, dim]
    loaded: Any = model
    mlp = f"blocks.{weights.block}.mlp"
    places = [f"{mlp}.W_out"]
    if expert == "shared":
        places = [f"{mlp}.shared_expert.W_out"]
    elif expert is not None:  # bridges keep the stack of transformers, HookedTransformer has a module for every expert
        places = [f"{mlp}.experts.down_proj", f"{mlp}.experts.{expert}.W_out.weight"]
    found = _find(entry, ((place, tensor) for place in places if (tensor := _at(loaded, place)) is not None))
    return EntryNames(found or f"{places[0]}[{neuron}, {dim}]", _hugging_face(loaded, entry))


def ffn_of(ffn: FFNWeights | MoEWeights, expert: Expert) -> FFNWeights:
    """One feed-forward layer of a block.

    Args:
        ffn: The block's FFN or mixture.
        expert: Which layer of it.

    Raises:
        ValueError: There is none of this name.
    """
    if isinstance(ffn, FFNWeights):
        if expert is not None:
            raise ValueError(f"expert: got {expert!r} of a block that is no mixture of experts; allowed: None")
        return ffn
    if expert == "shared" and ffn.shared is not None:
        return ffn.shared
    if isinstance(expert, int) and 0 <= expert < len(ffn.experts):
        return ffn.experts[expert]
    shared = "" if ffn.shared is None else ", or 'shared'"
    raise ValueError(f"expert: got {expert!r}; allowed: 0 to {len(ffn.experts) - 1}{shared}")


def _hugging_face(model: Any, entry: Tensor) -> str | None:
    from transformers import PreTrainedModel

    original = getattr(model, "original_model", None)
    if not isinstance(original, PreTrainedModel):  # TransformerLens' native models have names of their own
        return None
    return _find(entry, ((_WRAPPER.sub("", name), parameter.detach()) for name, parameter in original.named_parameters()))


def _find(entry: Tensor, tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the tensor that holds an entry in its memory, with the entry's index there."""
    for name, tensor in tensors:
        index = _index_of(entry, tensor)
        if index is not None:
            return f"{name}[{', '.join(map(str, index))}]"
    return None


def _index_of(entry: Tensor, tensor: Tensor) -> tuple[int, ...] | None:
    """Where in a tensor a single number lies, or None if it does not."""
    if (tensor.device, tensor.dtype) != (entry.device, entry.dtype) or tensor.numel() == 0:
        return None
    left, odd = divmod(entry.data_ptr() - tensor.data_ptr(), entry.element_size())
    if left < 0 or odd:
        return None
    index = [0] * tensor.ndim
    for axis in sorted(range(tensor.ndim), key=tensor.stride, reverse=True):
        if tensor.shape[axis] > 1 and tensor.stride(axis) > 0:  # along other axes there is but one place in memory
            index[axis], left = divmod(left, tensor.stride(axis))
    inside = all(at < size for at, size in zip(index, tensor.shape, strict=True))
    return tuple(index) if inside and left == 0 else None


def _at(model: Any, path: str) -> Tensor | None:
    """The tensor at a dotted path, None where it leads nowhere."""
    *owners, name = path.split(".")
    owner = model
    for step in owners:
        try:
            owner = owner[int(step)] if step.isdigit() else getattr(owner, step)
        except (AttributeError, TypeError, IndexError):
            return None
    return tensor_of(owner, name)
