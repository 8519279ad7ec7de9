"""`BlockWeights` read from a checkpoint folder, one block at a time: for models larger than memory.

To read a block, its tensors alone are taken from the files, TransformerLens' adapter is put over a model of this one block, and `live`
reads that as it reads any other model. What the files must hold, and under which names, is settled in `completeness`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd_lens.models.completeness import Contents, Read, draw, reason, require_plain
from sd_lens.models.live import LiveWeights
from sd_lens.models.shards import find_shards
from sd_lens.models.weights import BlockWeights, ModelWeights


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
        shards = find_shards(folder)
        if shards is None:
            others = sorted(path.name for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
            has = f"has {others[0]} but " if others else "has "
            raise ValueError(f"model: folder {folder} {has}no model.safetensors (nor its index); allowed: weights as safetensors")
        require_plain(folder, shards)
        try:
            model, self._architecture, path, self._cfg = draw(folder)
            if path is None:
                raise ValueError(f"{self._architecture} has no single stack of blocks")
            self._path = path
            self._contents = Contents(shards, model)
            self._blocks = list(model.get_submodule(path))
        except Exception as error:  # a configuration can be wrong in as many ways as there are libraries below
            raise ValueError(
                f"model: {name!r} could not be built from its config.json ({reason(error)}); "
                "allowed: a causal decoder that TransformerLens knows"
            ) from error
        self._shards = shards
        self._contents.require_whole(f"{path}.")
        _put(model, path, nn.ModuleList())
        self._frame = model
        self._targets: list[list[str]] = [[] for _ in self._blocks]
        inside = re.compile(re.escape(path) + r"\.(\d+)\.")
        for target in self._contents:
            match = inside.match(target)
            if match and int(match[1]) < len(self._blocks):
                self._targets[int(match[1])].append(target)

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
        prefix, wanted = f"{self._path}.{block}.", self._blocks[block].state_dict()
        read = self._contents.read(self._targets[block], self._reading)
        state = {key.removeprefix(prefix): value for key, value in read.items()}
        return self._bridged(block, {key: value for key, value in state.items() if key in wanted})

    @contextmanager
    def _reading(self, names: list[str]) -> Iterator[Read]:
        with self._shards.reading(names) as read:
            yield lambda name: read(name) if self._dtype is None else _cast(read(name), self._dtype)

    def _bridged(self, block: int, state: dict[str, Tensor]) -> BlockWeights:
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        module, model = copy.deepcopy(self._blocks[block]), copy.deepcopy(self._frame)
        module.load_state_dict(state, strict=False, assign=True)
        _put(model, self._path, nn.ModuleList([module]))
        # Adapters take joint projections apart while the bridge is built, so it is built over the block's own numbers, every time.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                bridge: Any = build_bridge_from_module(
                    model, architecture=self._architecture, hf_config=model.config, dtype=self._dtype or torch.float32, device="cpu"
                )
            except Exception as error:  # adapters refuse what they do not know in as many ways
                raise ValueError(
                    f"model: block {block} cannot be read ({reason(error)}); allowed: a causal decoder that TransformerLens knows"
                ) from error
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


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
