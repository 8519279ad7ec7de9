"""Results kept as one safetensors file, their labels in its metadata: nothing is unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sd_lens.models.files import require_writable, write_together


def write_labelled(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], labels: Mapping[str, Any]) -> None:
    """Writes tensors with their labels, whole or not at all.

    Args:
        path: The file; one that exists is replaced.
        kind: The class of the result.
        tensors: Its tensors.
        labels: What else it holds, as JSON can.

    Raises:
        ValueError: There can be no file there.
    """
    require_writable(path, argument="path")
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={_key(kind): json.dumps(labels)})
    write_together({Path(path): content})


def read_labelled(path: str | os.PathLike[str], kind: str, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `write_labelled` wrote.

    Args:
        path: The file.
        kind: The class of the result.
        what: The result in a word, for messages.

    Raises:
        ValueError: The file holds none.
        FileNotFoundError: There is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: no file {os.fspath(path)!r}; allowed: a file written by {kind}.save")
    try:
        with safe_open(path, framework="pt") as file:
            labels = json.loads((file.metadata() or {})[_key(kind)])
            if not isinstance(labels, dict):
                raise ValueError("labels of another kind")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, KeyError, ValueError):
        raise holds_none(path, kind, what) from None
    return tensors, labels


def holds_none(path: str | os.PathLike[str], kind: str, what: str) -> ValueError:
    """The complaint about a file that holds something else."""
    return ValueError(f"path: {os.fspath(path)} holds no {what}; allowed: a file written by {kind}.save")


def _key(kind: str) -> str:
    return f"sd_lens.{kind}"
