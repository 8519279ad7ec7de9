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
from sd_lens.applications.signature_files import is_signature_file
from sd_lens.applications.signing import require_method, signature
from sd_lens.linear.angles import acute_angle
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import Prompts
from sd_lens.models.weights import ModelWeights
from sd_lens.tracing.trace import MIN_RATIO, require_ratio

Item = Signature | TransformerLensModel | ModelWeights | str | os.PathLike[str]


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
        items: Signatures, files written by `Signature.save` (by their ``.json``), models, checkpoint folders, hub names or ``"tiny"``.
        names: What they are called in the result; default: the models' names, with method or number where they are not different.
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
    return compare(signatures, names=names)


def compare(signatures: Sequence[Signature], *, names: Sequence[str] | None = None) -> SignatureDistances:
    """The same of signatures that are there already.

    Args:
        signatures: At least one.
        names: What they are called; default: see `signature_distances`.
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
        raise FileNotFoundError(f"model: no folder {name!r}; allowed: 'tiny', a folder with a checkpoint, a hub name or a model")
    if name != "tiny" and folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"model: folder {folder} has no config.json; allowed: a folder with a Hugging Face checkpoint")
    return name


def _pair(a: Signature, b: Signature, name_a: str, name_b: str) -> SignaturePair:
    reason = _obstacle(a, b, name_a, name_b)
    nan = float("nan")
    if reason:
        return SignaturePair(name_a, name_b, nan, "cannot be compared", reason, nan, nan, nan)
    angle = float(acute_angle(cast(Tensor, a.direction), cast(Tensor, b.direction)))
    chance = chance_angle(a.d_model)
    return SignaturePair(
        a=name_a,
        b=name_b,
        angle_deg=angle,
        verdict=chance.verdict(angle),
        because="",
        chance_mean_deg=chance.mean_deg,
        chance_std_deg=chance.std_deg,
        probability=chance_probability(angle, a.d_model),
    )


def _obstacle(a: Signature, b: Signature, name_a: str, name_b: str) -> str:
    """Why two signatures have no angle; empty if they do."""
    without = [name for one, name in ((a, name_a), (b, name_b)) if not one.found]
    if without:
        return f"no defect was found in {' or '.join(without)}"
    if a.d_model != b.d_model:
        return f"their widths differ ({a.d_model} and {b.d_model})"
    return "their width is 1" if a.d_model < 2 else ""


def _distinct(signatures: Sequence[Signature]) -> tuple[str, ...]:
    """Names that tell them apart: the model's, with the method where one model has several, with numbers where that does not do."""
    names = [one.model_name for one in signatures]
    methods = {name: {one.method for one in signatures if one.model_name == name} for name in names}
    names = [f"{name} ({one.method})" if len(methods[name]) > 1 else name for name, one in zip(names, signatures, strict=True)]
    labels: list[str] = []
    for name in names:
        label, number = name, 2
        while label in labels:
            label, number = f"{name} ({number})", number + 1
        labels.append(label)
    return tuple(labels)
