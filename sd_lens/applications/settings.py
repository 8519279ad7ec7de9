"""What was recommended, as settings of the libraries that quantise for real."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from torch import nn

from sd_lens.applications.int8 import Granularity


def filter_fn(spared: Sequence[str], excluded: Sequence[str] = ()) -> Callable[[nn.Module, str], bool]:
    """Which modules of a Hugging Face model torchao is to quantise: its linear layers but for these.

    Args:
        spared: Names of projections to spare.
        excluded: Names of others that stay as they are, such as ``"lm_head"``.

    Returns:
        A function of a module and its name, for ``torchao.quantization.quantize_(..., filter_fn=...)``.

    Example:
        >>> keep = filter_fn(["model.layers.1.mlp.down_proj"], ["lm_head"])
        >>> keep(nn.Linear(1, 1), "model.layers.1.mlp.down_proj"), keep(nn.Linear(1, 1), "model.layers.2.mlp.down_proj")
        (False, True)
    """
    left = frozenset((*spared, *excluded))

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name not in left

    return chosen


def torchao_settings(spared: Sequence[str], excluded: Sequence[str], granularity: Granularity, alpha: float | None = None) -> str:
    """Python that quantises a Hugging Face model with torchao and spares these.

    Args:
        spared: Names of projections to spare.
        excluded: Names of others that stay as they are.
        granularity: What a range belongs to.
        alpha: SmoothQuant's migration strength, which torchao's plain int8 does not know: a comment says so. None for plain rounding.

    Returns:
        Source to paste: it defines ``filter_fn`` and quantises ``model``.

    Example:
        >>> print(torchao_settings(["model.layers.1.mlp.down_proj"], ["lm_head"], "per_token").splitlines()[0])
        import torch
    """
    kind = "PerTensor" if granularity == "per_tensor" else "PerRow"
    smooth = ""
    if alpha is not None:
        smooth = (
            f"# SmoothQuant (alpha {alpha:g}) is no part of this, which rounds to nearest: fold its scales into the model first, or use\n"
            "# torchao.prototype.smoothquant.\n"
        )
    return smooth + (
        "import torch\n"
        f"from torchao.quantization import Int8DynamicActivationInt8WeightConfig, {kind}, quantize_\n\n"
        f"spared = {_listed((*spared, *excluded))}\n\n\n"
        "def filter_fn(module, name):\n"
        "    return isinstance(module, torch.nn.Linear) and name not in spared\n\n\n"
        f"quantize_(model, Int8DynamicActivationInt8WeightConfig(granularity={kind}()), filter_fn=filter_fn)\n"
    )


def compressor_ignore(spared: Sequence[str], excluded: Sequence[str] = ()) -> list[str]:
    """The ``ignore`` list of llm-compressor: names of modules that stay as they are.

    Args:
        spared: Names of projections to spare.
        excluded: Names of others that stay as they are.

    Returns:
        The names, each once.
    """
    return list(dict.fromkeys((*excluded, *spared)))


def compressor_settings(spared: Sequence[str], excluded: Sequence[str], granularity: Granularity, alpha: float | None) -> str:
    """Python that defines llm-compressor's recipe and spares these.

    Args:
        spared: Names of projections to spare.
        excluded: Names of others that stay as they are.
        granularity: What a range belongs to. llm-compressor's ``"W8A8"`` has a range per token and output; a tensor-wise one is spelled out,
            with ranges of inputs that llm-compressor calibrates once, as its kernels want them.
        alpha: SmoothQuant's migration strength; None for plain rounding.

    Returns:
        Source to paste: it defines ``recipe``.

    Example:
        >>> print(compressor_settings([], ["lm_head"], "per_token", None).splitlines()[-1])
        recipe = [QuantizationModifier(targets="Linear", scheme="W8A8", ignore=ignore)]
    """
    lines = ["from llmcompressor.modifiers.quantization import QuantizationModifier"]
    steps = []
    if alpha is not None:
        lines.append("from llmcompressor.modifiers.smoothquant import SmoothQuantModifier")
        steps.append(f"SmoothQuantModifier(smoothing_strength={alpha:g})")
    lines += ["", f"ignore = {_listed(compressor_ignore(spared, excluded))}"]
    if granularity == "per_tensor":
        lines += [
            "# Ranges of inputs are calibrated once, as int8 kernels want them; the study took them anew in every window.",
            'int8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor"}',
            'group = {"targets": ["Linear"], "weights": int8, "input_activations": int8}',
        ]
        steps.append('QuantizationModifier(config_groups={"group_0": group}, ignore=ignore)')
    else:
        steps.append('QuantizationModifier(targets="Linear", scheme="W8A8", ignore=ignore)')
    return "\n".join([*lines, f"recipe = [{', '.join(steps)}]"]) + "\n"


def _listed(names: Sequence[str]) -> str:
    """A list of strings as Python source, one per line where there are several."""
    if len(names) < 2:
        return json.dumps(list(names))
    return "[\n" + "".join(f"    {json.dumps(name)},\n" for name in names) + "]"
