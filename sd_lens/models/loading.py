"""From a name, a folder or a ready model to a TransformerLens model that the analyses may trust.

Norms and singular vectors belong to the weights as they were trained. Folding a norm's gain into the next matrix, or centring
what a layer writes, changes both, so a model processed like that is refused rather than analysed wrongly.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sd_lens.models.checkpoint import CheckpointWeights
from sd_lens.models.completeness import Contents, draw, reason, require_plain
from sd_lens.models.live import LiveWeights
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.quiet import quiet
from sd_lens.models.shards import FLOATS, INDEX, SINGLE, find_shards, weight_map
from sd_lens.models.weights import FFNWeights, ModelWeights

TINY = Path(__file__).parent / "tiny"
"""Folder of the small trained model that ships with the package."""


class ModelStateWarning(UserWarning):
    """The model was handed over in a state that sd_lens had to change."""


def load(
    model: str | os.PathLike[str] | TransformerLensModel = "tiny", *, dtype: torch.dtype = torch.float32, **boot: Any
) -> TransformerLensModel:
    """A TransformerLens model with the weights it was trained with, in eval mode.

    Args:
        model: ``"tiny"`` for the model that ships with sd_lens, a folder with a Hugging Face checkpoint, a name on the hub, with or without
            a revision (``"owner/name@step1000"``), or a TransformerLens model, which is checked and passed through.
        dtype: What a loaded model's weights are converted to; a ready model keeps its own.
        **boot: Passed on to `TransformerBridge.boot_transformers` (``device``, ``trust_remote_code``, ...).

    Returns:
        The model. One that was in training mode has been put into eval mode, which is said in a `ModelStateWarning`.

    Raises:
        ValueError: The model is not a TransformerLens model, has folded or centred weights, or is not a causal decoder; the folder
            has no config.json or an unusable one; a file or tensor of the folder is missing, damaged, quantised or of the wrong shape;
            no model of this name can be had; a revision is given twice.
        FileNotFoundError: The folder does not exist.

    Example:
        >>> load("tiny").cfg.model_name
        'tiny'
    """
    if isinstance(model, str | os.PathLike):
        with quiet():
            loaded: Any = _boot(os.fspath(model), dtype, boot)
    else:
        if boot:
            raise ValueError(f"boot options: got {', '.join(sorted(boot))} with a ready model; allowed: none")
        loaded = model
    require_usable(loaded)
    if getattr(loaded, "training", False):
        if not isinstance(model, str | os.PathLike):
            message = "the model was in training mode; sd_lens has put it into eval mode"
            warnings.warn(message, ModelStateWarning, stacklevel=2)
        loaded.eval()
    return loaded


def _boot(name: str, dtype: torch.dtype, boot: dict[str, Any]) -> Any:
    folder, shown = _find(name)
    if folder is None:
        hub, revision = _hub_name(name)
        if revision and "revision" in boot:
            raise ValueError(f"revision: got {boot['revision']!r} with {name!r}, which names one; allowed: one of the two")
        return _boot_from(hub, dtype, boot | ({"revision": revision} if revision else {}), shown=shown)
    _require_whole(folder, _require_decoder(folder), shown, trusted=bool(boot.get("trust_remote_code")))
    return _boot_from(str(folder), dtype, boot, shown=shown)


def _find(name: str) -> tuple[Path | None, str]:
    """The folder that a name means, None for a hub name, and what the model is to be called."""
    if name == "tiny":
        return TINY, name
    folder = Path(os.path.expanduser(name))  # unlike Path.expanduser it leaves a user nobody knows as it stands
    if not name:
        raise FileNotFoundError("model: got an empty name; allowed: 'tiny', a folder with a checkpoint, a hub name or a model")
    if folder.is_dir():
        return folder, folder.resolve().name
    if folder.exists():
        raise ValueError(f"model: {name} is a file; allowed: 'tiny', a folder with a checkpoint, a hub name or a model")
    if _is_path(name):
        raise FileNotFoundError(f"model: no folder {name!r}; allowed: 'tiny', a folder with a checkpoint, a hub name or a model")
    return None, name


def _is_path(name: str) -> bool:
    """Hub names are ``name`` or ``owner/name``; whatever has more separators, or begins like a path, was meant as one."""
    return name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name


def _hub_name(name: str) -> tuple[str, str | None]:
    """The name on the hub and the revision, if one stands behind an ``@``."""
    hub, at, revision = name.partition("@")
    if at and not (hub and revision):
        raise ValueError(f"model: got {name!r}; allowed: a hub name and a revision, as in owner/name@step1000")
    return hub, revision or None


def _require_decoder(folder: Path) -> dict[str, Any]:
    """The configuration of a folder, unless it is of no causal decoder."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"model: folder {folder} has no config.json; allowed: a folder with a Hugging Face checkpoint")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"model: {path} is not valid JSON ({error}); allowed: a Hugging Face config.json") from None
    if not isinstance(config, dict):
        raise ValueError(f"model: {path} holds no JSON object; allowed: a Hugging Face config.json")
    names = [str(name) for name in config.get("architectures") or ()]
    if config.get("is_encoder_decoder") or any("MaskedLM" in name or name == "BertModel" for name in names):
        raise ValueError(f"model: {folder} holds {', '.join(names or ['an encoder'])}; allowed: causal decoders")
    return config


def _require_whole(folder: Path, config: dict[str, Any], shown: str, *, trusted: bool) -> None:
    """Raises `ValueError` where files are damaged, incomplete or quantised; whether blocks can be read is not asked here."""
    shards = find_shards(folder)
    if trusted and config.get("auto_map"):
        return  # only the folder's own code knows what it needs
    if shards is not None:
        require_plain(folder, shards)
    try:
        model = draw(folder).model
        contents = None if shards is None else Contents(shards, model)
    except Exception as error:
        if "trust_remote_code" in str(error):  # loading would ask on the terminal
            raise ValueError(
                f"model: {shown!r} needs code from its folder ({reason(error)}); "
                "allowed: a model that transformers knows by itself, or trust_remote_code=True"
            ) from error
        return  # what is wrong with such a folder, loading it will say
    if contents is not None:
        contents.require_whole()


def _boot_from(source: str, dtype: torch.dtype, boot: dict[str, Any], *, shown: str) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    options = {"device": "cpu"} | boot
    try:
        model = TransformerBridge.boot_transformers(source, dtype=dtype, **options)
    except Exception as error:  # a folder or name can be wrong in as many ways as there are libraries below
        raise _not_loaded(shown, error) from error
    # Bridges name a local checkpoint by its whole path, which says more about the machine than about the model.
    model.cfg.model_name = shown
    return model


def _not_loaded(shown: str, error: Exception) -> ValueError:
    return ValueError(f"model: {shown!r} could not be loaded ({reason(error)}); allowed: 'tiny', a checkpoint folder or a hub name")


def require_usable(model: Any) -> None:
    """Raises `ValueError` unless the model is a TransformerLens decoder with the weights it was trained with."""
    if not isinstance(model, TransformerLensModel):
        raise ValueError(
            f"model: got {type(model).__name__}; allowed: a TransformerLens model (TransformerBridge, or HookedTransformer on 3.9)"
        )
    if getattr(model.cfg, "attention_dir", "causal") != "causal" or _is_encoder_decoder(model):
        raise ValueError("model: got an encoder (its tokens see those after them); allowed: causal decoders")
    processed = _processing(model)
    if processed:
        raise _processed(processed)


def _processed(how: str) -> ValueError:
    return ValueError(
        f"model: its weights are {how}, which changes norms and singular vectors; allowed: unprocessed weights (boot without "
        "weight processing, or with enable_compatibility_mode(no_processing=True))"
    )


def _is_encoder_decoder(model: Any) -> bool:
    config = getattr(getattr(model, "original_model", None), "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))


def _processing(model: Any) -> str:
    """What was done to the weights after training, or an empty string."""
    if getattr(model, "_weights_processed", False):
        return "folded or centred"
    if str(getattr(model.cfg, "normalization_type", "")).endswith("Pre"):
        return "folded (the norms have no gain any more)"
    return _CENTRED if _is_centred(LiveWeights(model)) else ""


_CENTRED = "centred (what the layers write has mean zero)"


def _is_centred(weights: ModelWeights) -> bool:
    # Only models with a LayerNorm are ever centred: it leaves their output unchanged, as an RMSNorm would not.
    try:
        block = weights[0]
    except ValueError:  # norms can be traced where weights cannot be read, and such blocks are never processed
        return False
    norm = block.ffn.norm or block.attention.norm
    if not isinstance(block.ffn, FFNWeights) or norm is None or norm.kind != "layer":
        return False
    stored = block.ffn.W_out[:256]
    rows = stored.float()
    rounding = max(1e-5, 0.5 * torch.finfo(stored.dtype).eps)  # of a mean that was zero before it was stored
    return bool(rows.mean(-1).abs().max() < rounding * rows.abs().mean()) and bool(rows.abs().max() > 0)


def weights_of(model: str | os.PathLike[str] | TransformerLensModel, *, dtype: torch.dtype | None = None) -> ModelWeights:
    """The blocks of a model as `BlockWeights`, read one at a time.

    From a folder or a hub name no model is loaded: each block is read from the safetensors files when it is asked for, so that models
    larger than memory can be looked at. A sharded checkpoint needs no more memory than its largest block.

    Args:
        model: A TransformerLens model, or ``"tiny"``, a folder with a Hugging Face checkpoint (safetensors, one file or sharded, in
            float16, bfloat16, float32 or float64), or a name on the hub, with or without a revision (``"owner/name@step1000"``).
        dtype: What weights read from files are converted to; by default they keep the type they are stored in. A ready model keeps its
            own.

    Returns:
        A sequence of blocks: ``len()``, indexing, iteration, ``d_model``.

    Raises:
        ValueError: The model is not a causal TransformerLens decoder with unprocessed weights; a file or tensor of the folder is
            missing, damaged, quantised or of the wrong shape; no model of this name can be had; or a dtype was given with a ready model.
        FileNotFoundError: The folder does not exist.

    Example:
        >>> weights_of(load("tiny"))[0].ffn.gated
        True
        >>> weights_of("tiny")[0].attention.W_O.dtype
        torch.float16
    """
    if isinstance(model, str | os.PathLike):
        return _weights_in(os.fspath(model), dtype)
    if dtype is not None:
        raise ValueError(f"dtype: got {dtype} with a ready model; allowed: none, as it keeps its own")
    require_usable(model)
    return LiveWeights(model)


def _weights_in(name: str, dtype: torch.dtype | None) -> CheckpointWeights:
    if dtype is not None and dtype not in FLOATS.values():
        raise ValueError(f"dtype: got {dtype}; allowed: {', '.join(map(str, FLOATS.values()))}")
    folder, shown = _find(name)
    folder = folder or _fetched(name)
    _require_decoder(folder)
    weights = CheckpointWeights(folder, name=shown, dtype=dtype)
    if not weights.has_rms_norms and _is_centred(weights):  # with RMSNorms reading a block for this would be in vain
        raise _processed(_CENTRED)
    return weights


def _fetched(name: str) -> Path:
    """The folder in the cache of the hub that holds a model's configuration and safetensors, downloaded where they were not there."""
    from huggingface_hub import snapshot_download

    hub, revision = _hub_name(name)
    try:
        folder = Path(snapshot_download(hub, revision=revision, allow_patterns=["config.json", INDEX]))
        index = folder / INDEX
        files = sorted(set(weight_map(index).values())) if index.is_file() else [SINGLE]
        return Path(snapshot_download(hub, revision=revision, allow_patterns=files))
    except Exception as error:
        raise _not_loaded(name, error) from error


@contextmanager
def inference(model: Any) -> Iterator[None]:
    """Runs the body without gradients and in eval mode, and gives every module its own mode back."""
    # A bridge keeps the Hugging Face model, with dropout modules of its own, out of its module tree.
    parts = [part for part in (model, getattr(model, "original_model", None)) if isinstance(part, nn.Module)]
    training = [module for part in parts for module in part.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
