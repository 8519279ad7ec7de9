"""`BlockWeights` read from a checkpoint folder, one block at a time: for models larger than memory.

The model is built from its configuration on the meta device, where tensors have shapes but no numbers. To read a block, its tensors
alone are taken from the files, TransformerLens' adapter is put over a model of this one block, and `live` reads that as it reads any
other model. So nothing here knows an architecture: where the blocks are is the adapter's knowledge, what the files call a tensor is
transformers'.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sd_lens.models.live import LiveWeights
from sd_lens.models.shards import FLOATS, Shards, find_shards
from sd_lens.models.weights import BlockWeights, ModelWeights

_Read = Callable[[str], Tensor]
"""Gives a tensor by the name it is stored under."""


class _Blueprint(NamedTuple):
    """A model without numbers.

    Attributes:
        model: The Hugging Face model on the meta device.
        architecture: The name under which TransformerLens knows it.
        blocks: Where its blocks are, such as ``"model.layers"``.
        cfg: TransformerLens' configuration of it.
    """

    model: Any
    architecture: str
    blocks: str
    cfg: Any


def _blueprint(folder: Path) -> _Blueprint:
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources import build_bridge_config_from_hf
    from transformer_lens.model_bridge.sources.transformers import (
        determine_architecture_from_hf_config,
        get_hf_model_class_for_architecture,
    )
    from transformers import AutoConfig

    # The steps of TransformerBridge.boot_transformers, which itself would ask for a tokenizer and fill every weight.
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if not hasattr(config, "pad_token_id"):
        config.pad_token_id = None
    architecture = determine_architecture_from_hf_config(config)
    bridge_config = build_bridge_config_from_hf(config, architecture, str(folder), torch.float32)
    adapter = ArchitectureAdapterFactory.select_architecture_adapter(bridge_config)
    options: dict[str, Any] = {"config": config}
    adapter.prepare_loading(str(folder), options)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = get_hf_model_class_for_architecture(architecture).from_config(options["config"])
    mapping = adapter.component_mapping or {}
    if "blocks" not in mapping:
        raise ValueError(f"{architecture} has no single stack of blocks")
    return _Blueprint(model.eval(), architecture, str(mapping["blocks"].name), adapter.cfg)


class _Conversion:
    """How stored names and tensors become those of a model, by transformers' own rules.

    Names changed over the years, a base model's files leave out the first part of them, and experts are stored one by one but held as
    one tensor. Only `from_pretrained` does all this in public, and it fills what it is not given with random numbers, in memory. So
    this class, and nothing else, uses functions that transformers does not document.
    """

    def __init__(self, model: Any):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        places = {"base_model_prefix": model.base_model_prefix, "meta_state_dict": model.state_dict()}
        self._renamed = partial(rename_source_key, weight_renamings=renamings, weight_converters=converters, **places)
        self._prefixed = partial(rename_source_key, weight_renamings=[], weight_converters=[], **places)
        self._expected = places["meta_state_dict"]
        self._by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        self._order = dot_natural_key

    def plan(self, names: Iterable[str]) -> dict[str, list[tuple[str, str | None]]]:
        """The model's tensors, each with the stored names it is made of and the pattern of the converter that takes them."""
        plan: dict[str, list[tuple[str, str | None]]] = {}
        for name in sorted(names, key=self._order):  # experts are stacked in this order
            target, pattern = self._renamed(name)
            if target not in self._expected and name in self._expected:
                target, pattern = self._prefixed(name)
            plan.setdefault(target, []).append((name, pattern))
        return plan

    def convert(self, target: str, sources: list[tuple[str, str | None]], read: _Read, config: Any) -> dict[str, Tensor]:
        """The tensors that the sources of ``target`` make: itself, and others where a stored tensor is split."""
        name, pattern = sources[0]
        if pattern is None:
            return {target: read(name)}
        converter: Any = copy.deepcopy(self._by_pattern[pattern])
        for name, pattern in sources:
            converter.add_tensor(target, name, pattern, partial(read, name))
        made = converter.convert(target, config=config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


class CheckpointWeights(ModelWeights):
    """The blocks of a checkpoint folder.

    Everything that headers and configuration tell is checked at construction. Reading a block opens the files that hold its tensors and
    no other tensor is touched; once the block that was given is dropped, nothing of it is kept.
    """

    def __init__(self, folder: Path, *, name: str, dtype: torch.dtype | None = None):
        """Checks the folder and plans the reading.

        Args:
            folder: A folder with a config.json and safetensors.
            name: What the model is called in results.
            dtype: What tensors are converted to; by default each keeps the type it is stored in.

        Raises:
            ValueError: A file or tensor is missing, damaged, quantised or not of the shape that the configuration asks for, or no model
                can be built from the configuration.
        """
        self._name, self._dtype = name, dtype
        self._shards = _float_shards(folder)
        try:
            model, self._architecture, self._path, self._cfg = _blueprint(folder)
            self._conversion = _Conversion(model)
            self._blocks = list(model.get_submodule(self._path))
        except Exception as error:  # a configuration can be wrong in as many ways as there are libraries below
            raise ValueError(
                f"model: {name!r} could not be built from its config.json ({_reason(error)}); "
                "allowed: a causal decoder that TransformerLens knows"
            ) from error
        _put(model, self._path, nn.ModuleList())
        self._frame = model
        self._plans: list[dict[str, list[tuple[str, str | None]]]] = [{} for _ in self._blocks]
        inside = re.compile(re.escape(self._path) + r"\.(\d+)\.")
        for target, sources in self._conversion.plan(self._shards.tensors).items():
            match = inside.match(target)
            if match and int(match[1]) < len(self._blocks):
                self._plans[int(match[1])][target] = sources
        for block in range(len(self._blocks)):
            self._require_whole(block)

    @property
    def name(self) -> str:
        """What the model is called in results."""
        return self._name

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self._cfg.d_model)

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def has_rms_norms(self) -> bool:
        """Whether the configuration says that its norms do not subtract the mean."""
        return str(self._cfg.normalization_type).startswith("RMS")

    def _read(self, block: int) -> BlockWeights:
        return self._bridged(block, self._state(block, self._reading))

    @contextmanager
    def _reading(self, names: list[str]) -> Iterator[_Read]:
        with self._shards.reading(names) as read:
            yield lambda name: read(name) if self._dtype is None else _cast(read(name), self._dtype)

    def _state(self, block: int, reading: Callable[[list[str]], AbstractContextManager[_Read]]) -> dict[str, Tensor]:
        """The tensors of a block under the names that they have inside it."""
        prefix, state = f"{self._path}.{block}.", {}
        for target, sources in self._plans[block].items():
            try:
                # Files are opened for each target anew, so that what is read to be converted does not stay mapped with the rest.
                with reading([name for name, _ in sources]) as read:
                    made = self._conversion.convert(target, sources, read, self._frame.config)
            except (RuntimeError, IndexError, KeyError) as error:
                raise ValueError(
                    f"model: {self._origin(sources)} cannot be made into {target} ({_reason(error)}){_WHOLE}"
                ) from error
            state.update({key.removeprefix(prefix): value for key, value in made.items()})
        wanted = self._blocks[block].state_dict()
        return {key: value for key, value in state.items() if key in wanted}

    def _require_whole(self, block: int) -> None:
        """Raises `ValueError` unless the headers promise every tensor of a block, in the right shape and as plain numbers."""
        stored = self._shards.tensors
        wanted = self._blocks[block].state_dict()
        found = self._state(block, lambda _: nullcontext(lambda name: torch.empty(stored[name].shape, device="meta")))
        for key, value in wanted.items():
            target = f"{self._path}.{block}.{key}"
            sources = self._plans[block].get(target, [])
            if key not in found:
                raise ValueError(f"model: {self._shards.listing} has no {target}{_WHOLE}")
            if found[key].shape != value.shape:
                raise ValueError(
                    f"model: {self._origin(sources)} is {tuple(found[key].shape)}; "
                    f"allowed: {tuple(value.shape)}, by config.json, for {target}"
                )
            for name, _ in sources:
                if value.is_floating_point() and stored[name].kind not in FLOATS:
                    raise ValueError(f"model: {stored[name].file} holds {name} as {stored[name].kind}{_PLAIN}")

    def _origin(self, sources: list[tuple[str, str | None]]) -> str:
        """Where tensors are stored, for a message."""
        names = [name for name, _ in sources]
        if not names:
            return str(self._shards.listing)
        more = f" with {len(names) - 1} more" if len(names) > 1 else ""
        lost = "".join(f" without {name}" for name in _gaps(names)[:1])
        return f"{names[0]} of {self._shards.tensors[names[0]].file}{more}{lost}"

    def _bridged(self, block: int, state: dict[str, Tensor]) -> BlockWeights:
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        module, model = copy.deepcopy(self._blocks[block]), copy.deepcopy(self._frame)
        module.load_state_dict(state, strict=False, assign=True)
        _put(model, self._path, nn.ModuleList([module]))
        # Adapters take joint projections apart while the bridge is built, so it is built over the block's own numbers, every time.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            bridge: Any = build_bridge_from_module(
                model, architecture=self._architecture, hf_config=model.config, dtype=self._dtype or torch.float32, device="cpu"
            )
            bridge.add_module("blocks", nn.ModuleList([*(nn.Identity() for _ in range(block)), bridge.blocks[0]]))
            try:
                return LiveWeights(bridge)[block]
            finally:
                # A bridge holds itself in circles: without this its weights would stay until the next garbage collection.
                for parameter in [*bridge.parameters(), *model.parameters()]:
                    if not parameter.is_meta:
                        parameter.data = torch.empty(0, dtype=parameter.dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


_WHOLE = "; allowed: a checkpoint with every weight of its model"
_PLAIN = "; allowed: weights in float32, bfloat16, float16 or float64, not quantised"


def _float_shards(folder: Path) -> Shards:
    """The files of a folder, unless there are none or its config.json says that they are quantised."""
    shards = find_shards(folder)
    if shards is None:
        others = sorted(path.name for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        has = f"has {others[0]} but " if others else "has "
        raise ValueError(f"model: folder {folder} {has}no model.safetensors (nor its index); allowed: weights as safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantised = config.get("quantization_config") or config.get("compression_config")
    if quantised and shards.tensors:
        method = quantised.get("quant_method", "unnamed") if isinstance(quantised, dict) else quantised
        packed = [name for name, stored in shards.tensors.items() if stored.kind not in FLOATS]
        name = (packed or list(shards.tensors))[0]
        stored = shards.tensors[name]
        raise ValueError(f"model: {stored.file} holds {name} as {stored.kind}, quantised ({method}, says config.json){_PLAIN}")
    return shards


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def _gaps(names: list[str]) -> list[str]:
    """Names that a numbered series leaves out: of ``e.0.a, e.1.a, e.1.b`` it is ``e.0.b``."""
    parts = [name.split(".") for name in names]
    places = [
        place for place, values in enumerate(zip(*parts, strict=False)) if len(set(values)) > 1 and all(map(str.isdigit, values))
    ]
    if len(places) != 1:
        return []
    (place,) = places
    numbers = range(1 + max(int(part[place]) for part in parts))
    kinds = sorted({(tuple(part[:place]), tuple(part[place + 1 :])) for part in parts})
    series = [".".join((*before, str(number), *after)) for number in numbers for before, after in kinds]
    return [name for name in series if name not in names]
