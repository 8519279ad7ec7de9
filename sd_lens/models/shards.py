"""Which tensors do the safetensors files of a checkpoint folder hold, and where?

Only headers are read here, and nothing is unpickled: a folder with pickled weights alone counts as one without weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Names that a checkpoint's only file, or the list of its files, must have: what Hugging Face's own loading looks for."""

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The stored types that are weights as they are; all others are packed or scaled by a quantisation."""


@dataclass(frozen=True)
class Stored:
    """What a header says of one tensor.

    Attributes:
        file: The file that holds it.
        kind: Its type as safetensors writes it, such as ``"BF16"``.
        shape: Its shape.
    """

    file: Path
    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Shards:
    """The safetensors files of one folder.

    Attributes:
        listing: The index, or the only file: where every tensor ought to be named.
        tensors: What the files hold, by name.
    """

    listing: Path
    tensors: dict[str, Stored]

    @contextmanager
    def reading(self, names: list[str]) -> Iterator[Callable[[str], Tensor]]:
        """Opens the files that hold ``names``, and gives a function from one of these names to its tensor.

        The tensors given are mapped from the files, not copied. What was mapped goes when the tensors do, so files are opened for each
        block anew: one that stays open keeps every page in memory that was ever read from it.
        """
        with ExitStack() as stack:
            files = {file: stack.enter_context(_opened(file)) for file in {self.tensors[name].file for name in names}}
            yield lambda name: files[self.tensors[name].file].get_tensor(name)


def find_shards(folder: Path) -> Shards | None:
    """The files of a checkpoint folder, or None where it has no safetensors.

    Args:
        folder: The folder.

    Returns:
        Where every tensor is.

    Raises:
        ValueError: The index is damaged or names a file or tensor that is not there, or a file is damaged.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return Shards(single, _held(single))
    if not index.is_file():
        return None
    tensors: dict[str, Stored] = {}
    files: dict[str, dict[str, Stored]] = {}
    for name, file in weight_map(index).items():
        if file not in files:
            if not (folder / file).is_file():
                raise ValueError(f"model: {folder} lacks {file}, which its index names for {name}; allowed: a whole checkpoint")
            files[file] = _held(folder / file)
        if name not in files[file]:
            raise ValueError(f"model: {folder / file} lacks {name}, which {INDEX} says it holds; allowed: a whole checkpoint")
        tensors[name] = files[file][name]
    return Shards(index, tensors)


def weight_map(index: Path) -> dict[str, str]:
    """What an index says: the file of every tensor. Raises `ValueError` where it says nothing of the kind."""
    try:
        listed: Any = json.loads(index.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"model: {index} is not valid JSON ({error}); allowed: the index of a sharded checkpoint") from None
    mapping = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(file, str) for file in mapping.values()):
        raise ValueError(f"model: {index} has no weight_map from tensors to files; allowed: the index of a sharded checkpoint")
    return mapping


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        reason = _cut_off(file) or str(error)
        raise ValueError(f"model: {file} cannot be read ({reason}); allowed: a whole safetensors file") from None


def _held(file: Path) -> dict[str, Stored]:
    with _opened(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (not a mapping)
        return {name: Stored(file, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def _cut_off(file: Path) -> str:
    """Of a file that ends too early: the first tensor that it should still hold. Empty where the header itself is damaged."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            left = file.stat().st_size - 8 - length
            header = json.loads(stream.read(length)) if left >= 0 else {}
        header.pop("__metadata__", None)
        name, entry = min(
            ((name, entry) for name, entry in header.items() if entry["data_offsets"][1] > left),
            key=lambda item: item[1]["data_offsets"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    return f"it ends {entry['data_offsets'][1] - left} bytes before the end of {name}"
