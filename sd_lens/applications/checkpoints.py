"""Which checkpoints of a training run are meant, in what order, and whether they can be compared; nothing is loaded for it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from sd_lens.models.loading import TINY, load, require_usable
from sd_lens.models.protocol import TransformerLensModel

CheckpointLike = str | os.PathLike[str] | TransformerLensModel
"""``"tiny"``, a folder, a hub name, a hub name with a revision (``"owner/name@step1000"``), or a ready model."""

_STEP = re.compile(r"(?:step|checkpoint|ckpt|iter)s?[-_=]?(\d+)(?![A-Za-z0-9.])", re.IGNORECASE)
_WEIGHTS = ("*.safetensors", "*.bin")
_WIDTHS = ("hidden_size", "n_embd", "d_model")
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, not loaded.

    Attributes:
        label: What it is called in results; different for each of a series.
        step: Training step, None where it is not known.
        source: Folder, hub name or ready model.
        revision: Revision on the hub; None for the default one.
    """

    label: str
    step: int | None
    source: Any
    revision: str | None = None

    @property
    def ready(self) -> bool:
        """Whether it is a model already."""
        return not isinstance(self.source, str)

    def model(self, *, dtype: torch.dtype, boot: dict[str, Any]) -> TransformerLensModel:
        """The model, loaded unless it was one.

        Args:
            dtype: What a loaded model's weights are converted to.
            boot: Options of a loaded model.
        """
        if self.ready:
            require_usable(self.source)  # load would put it into eval mode for good
            return self.source
        revision = {} if self.revision is None else {"revision": self.revision}
        return load(self.source, dtype=dtype, **(boot | revision))

    @property
    def shape(self) -> tuple[int | None, int | None]:
        """Width and number of blocks, None where only loading would tell."""
        if self.ready:
            return int(self.source.cfg.d_model), int(self.source.cfg.n_layers)
        path = (TINY if self.source == "tiny" else Path(os.path.expanduser(self.source))) / "config.json"
        if self.revision is not None or not path.is_file():
            return None, None
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None, None  # loading will say what is wrong with it
        config = config if isinstance(config, dict) else {}
        width, depth = (
            next((config[name] for name in names if isinstance(config.get(name), int)), None) for names in (_WIDTHS, _DEPTHS)
        )
        return width, depth


def series(checkpoints: CheckpointLike | Sequence[CheckpointLike], steps: Sequence[int] | None = None) -> list[Checkpoint]:
    """The checkpoints that are meant, in order of training, after everything that can be checked without loading one.

    Args:
        checkpoints: The checkpoints. A folder without a config.json stands for those of its subfolders that have one and a step in
            their name, sorted by step; one with weights and a step in its name but no config.json is refused.
        steps: Their training steps; default: what their names say.

    Returns:
        Two or more, with labels that differ.

    Raises:
        ValueError: They are fewer than two, one is no checkpoint, their steps do not grow, or their widths or depths differ.
        FileNotFoundError: A folder does not exist.

    Example:
        >>> [found.step for found in series(["owner/name@step1000", "owner/name@step2000"])]
        [1000, 2000]
    """
    given = [checkpoints] if isinstance(checkpoints, str | os.PathLike | TransformerLensModel) else list(checkpoints)
    found = [one for item in given for one in _expanded(item)]
    if len(found) < 2:
        raise ValueError(f"checkpoints: got {len(found)}; allowed: two or more, or a folder that holds folders of checkpoints")
    found = _with_steps(_distinguished(found), steps)
    for argument, part in (("d_model", 0), ("blocks", 1)):
        known = [(one.shape[part], one.label) for one in found if one.shape[part] is not None]
        for size, label in known:
            require_same(argument, size, label, *known[-1])
    return found


def require_same(argument: str, size: int | None, label: str, wanted: int | None, last: str) -> None:
    """Raises `ValueError` unless a checkpoint is of the last one's size.

    Args:
        argument: What is compared.
        size: The checkpoint's.
        label: Its name.
        wanted: The last one's.
        last: The last one's name.
    """
    if size != wanted:
        raise ValueError(f"checkpoints: {label} has {argument} {size}; allowed: that of {last}, {wanted}")


def step_in(name: str) -> int | None:
    """The training step that a name tells: ``step-00250``, ``step1000``, ``checkpoint-500``, ``00250``; None where it tells none.

    Args:
        name: Name of a folder, or a revision.

    Example:
        >>> step_in("stage1-step5000-tokens21B"), step_in("checkpoint-500"), step_in("main")
        (5000, 500, None)
    """
    told = _STEP.search(name)
    if told is not None:
        return int(told.group(1))
    return int(name) if name.isdecimal() else None


def _expanded(item: Any) -> list[Checkpoint]:
    if not isinstance(item, str | os.PathLike):
        if not isinstance(item, TransformerLensModel):
            raise ValueError(f"checkpoints: got {type(item).__name__}; allowed: folders, hub names or TransformerLens models")
        name = str(getattr(item.cfg, "model_name", "model"))
        return [Checkpoint(name, step_in(name), item)]
    name = os.fspath(item)
    folder = Path(os.path.expanduser(name))
    if name == "tiny":
        return [Checkpoint(name, None, name)]
    if folder.is_dir():
        return _in_folder(folder)
    if folder.exists():
        raise ValueError(f"checkpoints: {name} is a file; allowed: folders, hub names or models")
    if name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name or not name:
        raise FileNotFoundError(f"checkpoints: no folder {name!r}; allowed: folders, hub names or models")
    hub, at, revision = name.partition("@")
    if at and not (hub and revision):
        raise ValueError(f"checkpoints: got {name!r}; allowed: a hub name and a revision, as in owner/name@step1000")
    return [Checkpoint(name, step_in(revision or hub.rpartition("/")[2]), hub, revision or None)]


def _in_folder(folder: Path) -> list[Checkpoint]:
    if (folder / "config.json").is_file():
        name = folder.resolve().name
        return [Checkpoint(name, step_in(name), str(folder))]
    named = sorted(path for path in folder.iterdir() if path.is_dir() and step_in(path.name) is not None)
    inside = [path for path in named if (path / "config.json").is_file()]
    for path in named:
        # Left out in silence it would be missing from the series, and the emergence could move to a later step.
        if path not in inside and any(next(path.glob(weights), None) is not None for weights in _WEIGHTS):
            raise ValueError(f"checkpoints: folder {path} holds weights but no config.json; allowed: step folders that hold both")
    if not inside:
        raise ValueError(
            f"checkpoints: folder {folder} has no config.json, nor has any folder in it that is named after a step; "
            "allowed: a folder with a Hugging Face checkpoint, or with folders such as step-500 that hold one each"
        )
    found = [Checkpoint(path.name, step_in(path.name), str(path)) for path in inside]
    return sorted(found, key=lambda one: (one.step or 0, one.label))


def _distinguished(found: list[Checkpoint]) -> list[Checkpoint]:
    """Labels that occur several times are numbered."""
    labels = [one.label for one in found]
    return [
        one if labels.count(one.label) == 1 else replace(one, label=f"{one.label} ({labels[: place + 1].count(one.label)})")
        for place, one in enumerate(found)
    ]


def _with_steps(found: list[Checkpoint], steps: Sequence[int] | None) -> list[Checkpoint]:
    if steps is not None:
        given = list(steps)
        if len(given) != len(found):
            raise ValueError(f"steps: got {len(given)}; allowed: one for each of {len(found)} checkpoints")
        for step in given:
            if not isinstance(step, int) or isinstance(step, bool) or step < 0:
                raise ValueError(f"steps: got {step!r}; allowed: whole numbers from 0")
        found = [replace(one, step=step) for one, step in zip(found, given, strict=True)]
    known = [one for one in found if one.step is not None]
    for before, after in pairwise(known):
        if (before.step or 0) >= (after.step or 0):
            raise ValueError(
                f"steps: got {after.step} ({after.label}) after {before.step} ({before.label}); allowed: steps that grow, from the first checkpoint to the last"
            )
    return found
