"""A signature on disk: labels as JSON, the vector beside them as safetensors, and a hash over both."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from sd_lens.models.files import require_writable, write_together

SCHEMA = "sd_lens.signature_file/1"
_HASH = "content_hash"
_HALVES = (".json", ".safetensors")


def content_hash(labels: Mapping[str, Any], direction: Float[Tensor, "d_model"] | None) -> str:
    """What two signatures share only if they say the same.

    Args:
        labels: Everything that is said of the direction.
        direction: The direction, float32.

    Returns:
        SHA-256 in hexadecimal, of the labels as JSON (ASCII, sorted keys, no spaces), a zero byte, and the vector's bytes, little-endian.
    """
    canonical = json.dumps(labels, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    vector = b"" if direction is None else direction.numpy().astype("<f4").tobytes()
    return hashlib.sha256(canonical.encode("ascii") + b"\0" + vector).hexdigest()


def halves(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The two files that a path means: given with either ending, or with none."""
    name = os.fspath(path)
    stem = next((name.removesuffix(ending) for ending in _HALVES if name.endswith(ending)), name)
    return Path(f"{stem}.json"), Path(f"{stem}.safetensors")


def is_signature_file(path: str) -> bool:
    """Whether a name is one of a saved signature, and not one of a model.

    Args:
        path: Either file's name, or what both are called without their ending, where both exist and no folder is called so; ``"tiny"`` is
            always the model.
    """
    if path.endswith(_HALVES):
        return True
    return path not in ("", "tiny") and not os.path.isdir(os.path.expanduser(path)) and all(half.is_file() for half in halves(path))


def write_signature(path: str | os.PathLike[str], labels: Mapping[str, Any], direction: Float[Tensor, "d_model"] | None) -> None:
    """Writes both files, or none.

    Args:
        path: Where, with either file's ending or with none.
        labels: Everything that is said of the direction.
        direction: The direction.

    Raises:
        ValueError: The folder does not exist or cannot be written to.
    """
    marked = {"schema": SCHEMA, **labels, _HASH: content_hash(labels, direction)}
    vector = to_bytes({} if direction is None else {"direction": direction.contiguous()}, metadata={_HASH: marked[_HASH]})
    listing, tensors = halves(path)
    for half in (listing, tensors):
        require_writable(half, argument="path")
    write_together({listing: (json.dumps(marked, indent=2, ensure_ascii=False) + "\n").encode(), tensors: vector})


def read_signature(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Float[Tensor, "d_model"] | None]:
    """Reads both files and checks their hash.

    Args:
        path: With either file's ending or with none.

    Returns:
        The labels and the direction.

    Raises:
        FileNotFoundError: Neither file is there.
        ValueError: One of them is missing, damaged or changed.
    """
    listing, tensors = halves(path)
    there = [half.is_file() for half in (listing, tensors)]
    if not any(there):
        raise FileNotFoundError(f"path: no file {os.fspath(path)!r}; allowed: a signature written by Signature.save")
    if not all(there):
        here, gone = (listing, tensors) if there[0] else (tensors, listing)
        raise ValueError(f"path: {here} has no {gone.name} beside it; allowed: both files that Signature.save writes")
    labels = _labels(listing)
    direction = _direction(tensors)
    claimed = labels.pop(_HASH, None)
    try:
        true = content_hash(labels, direction)
    except (ValueError, UnicodeEncodeError):  # NaN is no JSON that save writes
        true = ""
    if claimed != true:
        raise ValueError(
            f"path: hash mismatch: {listing} and {tensors.name} do not say what they said when they were saved; "
            "allowed: a signature as Signature.save wrote it"
        )
    if direction is not None and not math.isclose(float(direction.double().norm()), 1.0, abs_tol=1e-5):
        raise ValueError(f"path: {tensors} holds no unit vector; allowed: a signature written by Signature.save")
    return labels, direction


def _labels(listing: Path) -> dict[str, Any]:
    try:
        labels: Any = json.loads(listing.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"path: {listing} is not valid JSON ({error}); allowed: a signature written by Signature.save") from None
    schema = labels.pop("schema", None) if isinstance(labels, dict) else None
    if schema != SCHEMA:
        held = f"schema {schema!r}" if schema is not None else "no signature"
        raise ValueError(f"path: {listing} holds {held}; allowed: a signature written by Signature.save ({SCHEMA})")
    return labels


def _direction(tensors: Path) -> Tensor | None:
    try:
        held = from_bytes(tensors.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"path: {tensors} cannot be read ({error}); allowed: a signature written by Signature.save") from None
    if not held:
        return None
    direction = held.get("direction")
    if len(held) > 1 or direction is None or direction.ndim != 1 or direction.dtype != torch.float32:
        raise ValueError(f"path: {tensors} holds no direction; allowed: a signature written by Signature.save")
    return direction
