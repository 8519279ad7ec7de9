"""The linear projections of a model: which modules multiply with a matrix, what Hugging Face calls them, what they read.

Quantisers name the layers they treat or spare as the Hugging Face model does. A `TransformerBridge` holds that model's own layers, under
more names than one, and splits fused ones (GPT-2's ``c_attn``) into layers of its own; which layers really run is seen by running them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sd_lens.models.hugging_face import hugging_face_of, is_conv1d, is_linear, pristine_names, unwrapped
from sd_lens.models.loading import inference, require_usable
from sd_lens.models.protocol import TransformerLensModel

DOWN = "out"
"""What TransformerLens calls the projection from an FFN's neurons to the stream: ``down_proj``, ``c_proj``, ``fc2``, ..."""
_FIRST = frozenset({"q", "k", "v", "qkv", "gate", "in", "shared_expert_gate"})


@dataclass(frozen=True)
class Projection:
    """One linear layer of a model.

    Attributes:
        name: Its module's name in the Hugging Face model, such as ``"model.layers.1.mlp.down_proj"``.
        part: Of a fused layer, which TransformerLens splits, the part (``"q"``); else empty.
        block: The block it belongs to; None of the unembedding.
        norm: Which norm what it reads comes from, ``"ln1"`` or ``"ln2"``: projections of one block and norm read the same. Empty where it
            reads something else: heads' outputs, neurons, the final norm's answer.
        role: What TransformerLens calls it: ``"q"``, ``"k"``, ``"v"``, ``"o"``, ``"in"``, ``"gate"``, ``"out"`` (the down-projection),
            ``"unembed"``.
        module: The module that runs.
    """

    name: str
    part: str
    block: int | None
    norm: str
    role: str
    module: nn.Module

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """The matrix as ``nn.Linear`` keeps it, one row per output; a view of the module's own."""
        weight: Any = self.module.weight
        return weight.detach().T if is_conv1d(self.module) else weight.detach()

    @property
    def bias(self) -> Float[Tensor, "d_out"] | None:
        """What is added to the product, if anything."""
        bias: Any = self.module.bias
        return None if bias is None else bias.detach()

    @property
    def label(self) -> str:
        """The name, with the part of a fused layer."""
        return f"{self.name} ({self.part})" if self.part else self.name

    @property
    def is_conv1d(self) -> bool:
        """Whether its module is GPT-2's ``Conv1D``, which quantisers that look for ``nn.Linear`` pass over."""
        return is_conv1d(self.module)

    @property
    def is_down(self) -> bool:
        """Whether it leads from the neurons of a block's dense FFN to the stream."""
        return self.role == DOWN and self.block is not None


def projections(model: TransformerLensModel) -> tuple[Projection, ...]:
    """The linear layers of a model, block by block in the order in which they run, the unembedding last.

    Experts that transformers keep in one stacked parameter are no linear layers and are not among them, nor is what a mixture's router does.

    Args:
        model: A `TransformerBridge` around a Hugging Face model.

    Returns:
        The projections.

    Raises:
        ValueError: The model is not such a bridge.

    Example:
        >>> from sd_lens.models.loading import load
        >>> [p.name for p in projections(load("tiny")) if p.is_down][:2]
        ['model.layers.0.mlp.down_proj', 'model.layers.1.mlp.down_proj']
    """
    require_usable(model)
    bridge: Any = model
    hf = hugging_face_of(bridge)
    aliases: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in hf.named_modules(remove_duplicate=False):
        if is_linear(module):
            aliases.setdefault(id(module), (module, []))[1].append(unwrapped(name))
    names = pristine_names(hf)
    read = _run(bridge, {key: module for key, (module, _) in aliases.items()})
    used = [aliases[key] for key in read]
    direct = {id(module): next((alias for alias in own if alias in names), None) for module, own in used}
    fused = [name for name in names if name not in direct.values()]
    found = []
    for module, own in used:
        block, norm, role = _place(bridge, module, own)
        norm = norm if norm in read[id(module)] else ""  # OLMo 2, for one, reads the stream itself
        name = direct[id(module)]
        part = ""
        if name is None:
            name, part = _fused_name(own, fused), role
        found.append(Projection(name, part, block, norm, role, module))
    return tuple(sorted(found, key=lambda one: (one.block is None, one.block or 0)))


@contextmanager
def replaced(chosen: Sequence[Projection], forwards: Sequence[Any]) -> Iterator[None]:
    """Lets layers compute something else while the context is open; their weights are not touched.

    Args:
        chosen: The layers.
        forwards: For each, a function of its input.

    Yields:
        Nothing.
    """
    missing = object()
    before = [one.module.__dict__.get("forward", missing) for one in chosen]
    try:
        for one, forward in zip(chosen, forwards, strict=True):
            one.module.__dict__["forward"] = forward
        yield
    finally:
        for one, old in zip(chosen, before, strict=True):
            if old is missing:
                one.module.__dict__.pop("forward", None)
            else:
                one.module.__dict__["forward"] = old


def _run(model: Any, modules: dict[int, nn.Module]) -> dict[int, list[str]]:
    """Those of some modules that a forward pass of one token calls, in this order, and which of their block's norms' answers they read."""
    answers: dict[str, Tensor] = {}  # of the running block
    read: dict[int, list[str]] = {}

    def answer(name: str, _module: nn.Module, _args: Any, output: Tensor) -> None:
        answers[name] = output.detach().flatten()

    def note(key: int, _module: nn.Module, args: Any) -> None:
        read[key] = [name for name, output in answers.items() if torch.equal(output, args[0].detach().flatten())]

    handles = [module.register_forward_pre_hook(functools.partial(note, key)) for key, module in modules.items()]
    for block in model.blocks:
        for name in ("ln1", "ln2"):
            norm = getattr(block, name, None)
            if isinstance(norm, nn.Module):
                handles.append(norm.register_forward_hook(functools.partial(answer, name)))
    try:
        with inference(model):
            model(torch.zeros(1, 1, dtype=torch.long, device=model.cfg.device))
    finally:
        for handle in handles:
            handle.remove()
    return read


def _place(model: Any, module: nn.Module, names: Sequence[str]) -> tuple[int | None, str, str]:
    """Block, norm and role of a layer, by the bridge's tree of components."""
    for block, component in enumerate(model.blocks):
        path = _path(component, module)
        if path:
            sublayer, role = path[0], ".".join(path[1:]) or path[0]
            if path[-1] not in _FIRST:
                return block, "", role
            # Parallel blocks may have a single norm, which both sublayers read.
            return block, "ln2" if sublayer != "attn" and "ln2" in component.submodules else "ln1", role
    return None, "", "unembed" if _path(model.unembed, module) is not None else names[0].rsplit(".", 1)[-1]


def _path(component: Any, module: nn.Module) -> tuple[str, ...] | None:
    """The keys that lead from a component to the smallest one around a module; None where it is not inside."""
    if not any(one is module for one in component.modules()):
        return None
    for key, child in (getattr(component, "submodules", None) or {}).items():
        # Symbolic components have no module of their own: what they stand for are the bridge's attributes.
        below = _path(getattr(component, key, child), module) if isinstance(getattr(component, key, child), nn.Module) else None
        if below is not None:
            return key, *below
    return ()


def _fused_name(names: Sequence[str], fused: Sequence[str]) -> str:
    """The Hugging Face name of the fused layer that a bridge's own layer is a part of: the one in the same sublayer."""
    parents = {name.rsplit(".", 1)[0] for name in names}
    for name in fused:
        if name.rsplit(".", 1)[0] in parents:
            return name
    return names[0]
