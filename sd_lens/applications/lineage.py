"""Whose child a checkpoint is: angles between signatures, beside what chance would make of them."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sd_lens.applications.chance import chance_angle, chance_probability
from sd_lens.applications.distances import SignatureDistances, SignaturePair
from sd_lens.applications.signature import Method, Signature
from sd_lens.applications.signature_files import halves, is_signature_file
from sd_lens.applications.signing import require_method, signature
from sd_lens.linear.angles import acute_angle
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import Prompts
from sd_lens.models.weights import ModelWeights
from sd_lens.tracing.trace import MIN_RATIO, require_ratio

Item = Signature | TransformerLensModel | ModelWeights | str | os.PathLike[str]


_ALLOWED = "allowed: 'tiny', a folder with a Hugging Face checkpoint, a hub name, a saved signature or a model"


def signature_distances(
    items: Sequence[Item],
    *,
    names: Sequence[str] | None = None,
    method: Method | None = None,
    prompts: Prompts | None = None,
    min_ratio: float = MIN_RATIO,
    batch_tokens: int = 4096,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
) -> SignatureDistances:
    """Angles between the signatures of several models, the tree they make, and what they say of every pair.

    Models are looked at one after the other: one that was loaded here is let go before the next one is.

    Args:
        items: Signatures, files written by `Signature.save` (with or without their ending), models, checkpoint folders, hub names (with a
            revision as in ``"owner/name@step1000"``) or ``"tiny"``.
        names: What they are called in the result; default: the models' names. Where these are not different, folders and files are called
            by as much of the end of their paths as tells them apart; else method or number are added.
        method: How signatures are taken where they are not given, see `signature`.
        prompts: What to measure on, for the method ``"activations"``.
        min_ratio: Least norm of a high-norm token, as a multiple of the other tokens' median.
        batch_tokens: Largest number of tokens run at once.
        device: Where models run that are loaded here; default: the CPU.
        dtype: What their weights are converted to.
        progress: Whether to show progress bars.

    Returns:
        Matrix, verdicts and tree. Models of different widths, and those without a defect, are not comparable: their angles are NaN.

    Raises:
        ValueError: There is no item, a signature was edited by hand, a folder has no config.json, or an option is unusable.
        FileNotFoundError: A file or folder does not exist.

    Example:
        >>> from sd_lens.models.planted import planted
        >>> models = [planted(n_blocks=3, decay_block=2, seed=seed).model for seed in (0, 0, 1)]
        >>> found = signature_distances(models, method="weights")
        >>> [pair.verdict for pair in found.pairs]
        ['same lineage', 'unrelated', 'unrelated']
    """
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise ValueError(f"items: got {type(items).__name__}; allowed: a list of signatures, their files, models, folders or names")
    if not items:
        raise ValueError("items: got none; allowed: at least one signature, file, model, folder or name")
    if names is not None and (len(names) != len(items) or len(set(names)) != len(names)):
        raise ValueError(f"names: got {len(set(names))} different names for {len(items)} items; allowed: one for each")
    require_method(method)
    require_ratio(min_ratio)
    ready = [_ready(item) for item in items]  # files are read before any model runs: they are quick to complain
    signatures = []
    for item in ready:
        if isinstance(item, Signature):
            signatures.append(item)
            continue
        named = isinstance(item, str | os.PathLike)
        chosen = require_method(method, weights=isinstance(item, ModelWeights))
        run = chosen == "activations"
        signatures.append(
            signature(
                item,
                method=chosen,
                prompts=prompts if run else None,
                min_ratio=min_ratio,
                batch_tokens=batch_tokens,
                device=device if named else None,
                dtype=dtype if named else None,
                progress=progress,
            )
        )
        if named:
            gc.collect()  # a bridge holds itself in circles
    return compare(signatures, names=_distinct(signatures, [_place(item) for item in items]) if names is None else names)


def compare(signatures: Sequence[Signature], *, names: Sequence[str] | None = None) -> SignatureDistances:
    """The same of signatures that are there already.

    Args:
        signatures: At least one.
        names: What they are called; default: the models' names, with method or number where they are not different.
    """
    labels = tuple(names) if names is not None else _distinct(signatures)
    n = len(signatures)
    angles = torch.full((n, n), float("nan"), dtype=torch.float64)
    for row, one in enumerate(signatures):
        if one.found:
            angles[row, row] = 0.0
    pairs = []
    for row in range(n):
        for column in range(row + 1, n):
            pair = _pair(signatures[row], signatures[column], labels[row], labels[column])
            angles[row, column] = angles[column, row] = pair.angle_deg
            pairs.append(pair)
    return SignatureDistances(labels, tuple(signatures), angles, tuple(pairs))


def _ready(item: Any) -> Any:
    """An item that can be worked on: saved signatures are read, folders looked at."""
    if isinstance(item, Signature | ModelWeights) or not isinstance(item, str | os.PathLike):
        return item
    name = os.fspath(item)
    if is_signature_file(name):
        return Signature.load(name)
    folder = Path(os.path.expanduser(name))
    if not folder.exists() and (name.startswith((".", "~", "/")) or name.count("/") > 1):
        raise FileNotFoundError(f"model: no folder {name!r}; {_ALLOWED}")
    if name != "tiny" and folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"model: folder {folder} has no config.json; {_ALLOWED}")
    return name


def _pair(a: Signature, b: Signature, name_a: str, name_b: str) -> SignaturePair:
    reason = _obstacle(a, b, name_a, name_b)
    nan = float("nan")
    if reason:
        return SignaturePair(name_a, name_b, nan, "cannot be compared", reason, nan, nan, nan)
    angle = float(acute_angle(cast(Tensor, a.direction), cast(Tensor, b.direction)))
    chance = chance_angle(a.d_model)
    verdict, note = chance.verdict(angle), ""
    if verdict != "same lineage" and a.of_other_tokens_than(b):
        verdict = "undecided"
        note = f"of different tokens: {a.kind}; {b.kind}; their directions may differ in one lineage"
    return SignaturePair(
        a=name_a,
        b=name_b,
        angle_deg=angle,
        verdict=verdict,
        because="",
        chance_mean_deg=chance.mean_deg,
        chance_std_deg=chance.std_deg,
        probability=chance_probability(angle, a.d_model),
        note=note,
    )


def _obstacle(a: Signature, b: Signature, name_a: str, name_b: str) -> str:
    """Why two signatures have no angle; empty if they do."""
    without = [name for one, name in ((a, name_a), (b, name_b)) if not one.found]
    if without:
        return f"no defect was found in {' or '.join(without)}"
    if a.d_model != b.d_model:
        return f"their widths differ ({a.d_model} and {b.d_model})"
    return "their width is 1" if a.d_model < 2 else ""


def _place(item: Any) -> Path | None:
    """Where an item lies, if it is a folder or a file; of a saved signature without its ending."""
    if not isinstance(item, str | os.PathLike) or os.fspath(item) == "tiny":
        return None
    name = os.fspath(item)
    if is_signature_file(name):
        return halves(name)[0].resolve().with_suffix("")
    folder = Path(os.path.expanduser(name))
    return folder.resolve() if folder.is_dir() else None


def _distinct(signatures: Sequence[Signature], places: Sequence[Path | None] | None = None) -> tuple[str, ...]:
    """Names that tell them apart: the model's or the end of its path, with method or number where that does not do."""
    names = [one.model_name for one in signatures]
    if places is not None:
        names = _told_by_path(names, places)
    methods = {name: {one.method for one, other in zip(signatures, names, strict=True) if other == name} for name in names}
    names = [f"{name} ({one.method})" if len(methods[name]) > 1 else name for name, one in zip(names, signatures, strict=True)]
    labels: list[str] = []
    for name in names:
        label, number = name, 2
        while label in labels:
            label, number = f"{name} ({number})", number + 1
        labels.append(label)
    return tuple(labels)


def _told_by_path(names: Sequence[str], places: Sequence[Path | None]) -> list[str]:
    """Names; but where several paths go by one name, the shortest end of each path that no other of them has."""
    told = list(names)
    for number, (name, place) in enumerate(zip(names, places, strict=True)):
        others = {other for own, other in zip(names, places, strict=True) if own == name and other is not None} - {place}
        if place is None or not others:
            continue
        length = 1
        while any(other.parts[-length:] == place.parts[-length:] for other in others):
            length += 1
        told[number] = Path(*place.parts[-length:]).as_posix()
    return told
