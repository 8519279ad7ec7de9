"""Does a checkpoint folder hold every weight of its model, in the right shape and as plain numbers?

Loading fills a weight that the files lack with random numbers and goes on, and it reads packed numbers as if they were weights: a
damaged or quantised copy would be analysed as if it had been trained like that. Headers tell, so no weight is read for the answer.

The model is built from its configuration on the meta device, where tensors have shapes but no numbers. What the files call a tensor is
transformers' knowledge, where the blocks are is that of TransformerLens' adapter; nothing here knows an architecture.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sd_lens.models.shards import FLOATS, Shards

Read = Callable[[str], Tensor]
"""Gives a tensor by the name it is stored under."""

_WHOLE = "; allowed: a checkpoint with every weight of its model"
_PLAIN = "; allowed: weights in float32, bfloat16, float16 or float64, not quantised"


def require_plain(folder: Path, shards: Shards) -> None:
    """Raises `ValueError` where the config.json of a folder says that its weights are quantised."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantised = config.get("quantization_config") or config.get("compression_config")
    if quantised and shards.tensors:
        method = quantised.get("quant_method", "unnamed") if isinstance(quantised, dict) else quantised
        packed = [name for name, stored in shards.tensors.items() if stored.kind not in FLOATS]
        name = (packed or list(shards.tensors))[0]
        stored = shards.tensors[name]
        raise ValueError(f"model: {stored.file} holds {name} as {stored.kind}, quantised ({method}, says config.json){_PLAIN}")


class Blueprint(NamedTuple):
    """A model without numbers.

    Attributes:
        model: The Hugging Face model on the meta device.
        architecture: The name under which TransformerLens knows it.
        blocks: Where its blocks are, such as ``"model.layers"``; None where they are in no single stack.
        cfg: TransformerLens' configuration of it.
    """

    model: Any
    architecture: str
    blocks: str | None
    cfg: Any


def draw(folder: Path) -> Blueprint:
    """The model of a folder without numbers, made without running code from the folder.

    Raises:
        Exception: Whatever the libraries below say of a configuration that is wrong, unknown to them, or asks for code of its own.
    """
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources import build_bridge_config_from_hf
    from transformer_lens.model_bridge.sources.transformers import (
        determine_architecture_from_hf_config,
        get_hf_model_class_for_architecture,
    )
    from transformers import AutoConfig

    # The steps of TransformerBridge.boot_transformers, which itself would ask for a tokenizer and fill every weight.
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not hasattr(config, "pad_token_id"):
        config.pad_token_id = None
    architecture = determine_architecture_from_hf_config(config)
    bridge_config = build_bridge_config_from_hf(config, architecture, str(folder), torch.float32)
    adapter = ArchitectureAdapterFactory.select_architecture_adapter(bridge_config)
    options: dict[str, Any] = {"config": config}
    with TemporaryDirectory() as empty:  # some adapters import code from the folder they are given, without asking
        adapter.prepare_loading(empty, options)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = get_hf_model_class_for_architecture(architecture).from_config(options["config"], trust_remote_code=False)
    mapping = adapter.component_mapping or {}
    return Blueprint(model.eval(), architecture, str(mapping["blocks"].name) if "blocks" in mapping else None, adapter.cfg)


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

    def convert(self, target: str, sources: list[tuple[str, str | None]], read: Read, config: Any) -> dict[str, Tensor]:
        """The tensors that the sources of ``target`` make: itself, and others where a stored tensor is split."""
        name, pattern = sources[0]
        if pattern is None:
            return {target: read(name)}
        converter: Any = copy.deepcopy(self._by_pattern[pattern])
        for name, pattern in sources:
            converter.add_tensor(target, name, pattern, partial(read, name))
        made = converter.convert(target, config=config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


class Contents:
    """What the files of a folder hold of a model: its tensors by the names that they have in the model."""

    def __init__(self, shards: Shards, model: Any):
        """Takes the files and the model, on the meta device, that they are of."""
        self._shards, self._config = shards, model.config
        # A tied weight is one parameter under several names, of which the files may hold any.
        self._needed = model.state_dict(keep_vars=True)
        self._optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
        self._conversion = _Conversion(model)
        self._plan = self._conversion.plan(shards.tensors)

    def __iter__(self) -> Iterator[str]:
        """Names, in the model, of what the files hold; besides its tensors there may be others that it has no use for."""
        return iter(self._plan)

    def read(self, targets: Iterable[str], reading: Callable[[list[str]], AbstractContextManager[Read]]) -> dict[str, Tensor]:
        """The tensors of some names, converted by transformers' rules.

        Args:
            targets: Names in the model.
            reading: Opens the files for some stored names.

        Raises:
            ValueError: What is stored cannot be converted.
        """
        found: dict[str, Tensor] = {}
        for target in targets:
            sources = self._plan[target]
            try:
                # Files are opened for each target anew, so that what is read to be converted does not stay mapped with the rest.
                with reading([name for name, _ in sources]) as read:
                    found.update(self._conversion.convert(target, sources, read, self._config))
            except (RuntimeError, IndexError, KeyError) as error:
                raise ValueError(
                    f"model: {self._origin(sources)} cannot be made into {target} ({reason(error)}){_WHOLE}"
                ) from error
        return found

    def require_whole(self, within: str = "") -> None:
        """Raises `ValueError` unless the headers promise every tensor of the model, in the right shape and as plain numbers.

        Args:
            within: Where to look, for what is read from files part by part: only at tensors whose names begin like this, and these must
                be stored themselves, neither tied to others nor left to the model's defaults.
        """
        wanted = {key: value for key, value in self._needed.items() if key.startswith(within)}
        found = self.read(self._of_use(within), lambda _: nullcontext(self._outlined))
        held = {id(wanted[key]) for key in found.keys() & wanted.keys()}
        for key, value in wanted.items():
            if key in found:
                self._require_fitting(key, found[key], value)
            elif within or not (id(value) in held or any(re.search(pattern, key) for pattern in self._optional)):
                raise ValueError(f"model: {self._shards.listing} has no {key}{_WHOLE}")

    def _of_use(self, within: str) -> Iterator[str]:
        """What to convert: layers for the prediction of later tokens, say, are stored with a model that has none."""
        stacks = {key.rpartition(".")[0] for key in self._needed}
        return (target for target in self._plan if target.startswith(within) and target.rpartition(".")[0] in stacks)

    def _outlined(self, name: str) -> Tensor:
        return torch.empty(self._shards.tensors[name].shape, device="meta")

    def _require_fitting(self, key: str, found: Tensor, wanted: Tensor) -> None:
        sources = self._plan.get(key, [])
        if found.shape != wanted.shape:
            raise ValueError(
                f"model: {self._origin(sources)} is {tuple(found.shape)}; allowed: {tuple(wanted.shape)}, by config.json, for {key}"
            )
        for name, _ in sources:
            stored = self._shards.tensors[name]
            if wanted.is_floating_point() and stored.kind not in FLOATS:
                raise ValueError(f"model: {stored.file} holds {name} as {stored.kind}{_PLAIN}")

    def _origin(self, sources: list[tuple[str, str | None]]) -> str:
        """Where tensors are stored, for a message."""
        names = [name for name, _ in sources]
        if not names:
            return str(self._shards.listing)
        more = f" with {len(names) - 1} more" if len(names) > 1 else ""
        lost = "".join(f" without {name}" for name in _gaps(names)[:1])
        return f"{names[0]} of {self._shards.tensors[names[0]].file}{more}{lost}"


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:300]


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
