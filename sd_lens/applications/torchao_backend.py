"""The same quantisation on real integer kernels: torchao's, on the Hugging Face model.

torchao quantises ``nn.Linear`` modules in place and for good, so that every set of spared projections takes a copy of the model. A copy is made,
evaluated and let go before the next one.

torchao's steps are 1/127.5 of the largest number, and its integers go from −128 to 127; those of the fake quantisation (see `int8`) are 1/127 and
leave −128 out. The two round differently by half a step at most, which moves perplexities by a few thousandths.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sd_lens.applications.calibration import Scales
from sd_lens.applications.int8 import Granularity, divided, multiplied
from sd_lens.applications.perplexity import Logits
from sd_lens.models.hugging_face import as_linear, plain_copy
from sd_lens.models.loading import inference
from sd_lens.models.projections import Projection
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.quiet import quiet


def require_torchao() -> None:
    """Raises `ValueError` where torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise ValueError("backend: got 'torchao', which is not installed; allowed: 'fake', or pip install 'sd-lens[quantization]'")


@contextmanager
def torchao_quantized(
    model: TransformerLensModel,
    chosen: Sequence[Projection],
    granularity: Granularity,
    *,
    spared: Collection[str] = (),
    scales: Scales | None = None,
) -> Iterator[Logits]:
    """A copy of a model whose projections torchao has quantised to eight bits.

    Args:
        model: The model, which is not touched. The copy takes as much memory again.
        chosen: The projections to quantise.
        granularity: What a range belongs to.
        spared: Names of projections that stay as they are.
        scales: SmoothQuant's, by label.

    Yields:
        A function from token ids to logits. Windows run one by one where ranges are per tensor: torchao's go over the whole batch.

    Raises:
        ValueError: torchao is not installed, or the bridge holds layers in another form than transformers.

    Example:
        >>> from sd_lens.models.loading import load
        >>> from sd_lens.models.projections import projections
        >>> model = load("tiny")
        >>> with torchao_quantized(model, projections(model)[:-1], "per_token") as logits:  # doctest: +SKIP
        ...     logits(torch.tensor([[1, 50, 60]])).shape
        torch.Size([1, 3, 1024])
    """
    require_torchao()
    copy = plain_copy(model)
    wanted = {one.name for one in chosen} - set(spared)
    by_name = {one.name: scales[one.label] for one in chosen if scales and one.label in scales and one.name in wanted}
    for name in wanted:
        linear = as_linear(copy.get_submodule(name))
        copy.set_submodule(name, _Smoothed(linear, by_name[name]) if name in by_name else linear)
    _quantize(copy, {f"{name}.linear" if name in by_name else name for name in wanted}, granularity)
    rows = 1 if granularity == "per_tensor" else None
    device = next(copy.parameters()).device

    def logits(ids: Int[Tensor, "window pos"]) -> Float[Tensor, "window pos d_vocab"]:
        with inference(copy):
            return torch.cat([copy(part, use_cache=False).logits for part in ids.to(device).split(rows or len(ids))])

    yield logits


class _Smoothed(nn.Module):
    """A linear layer with SmoothQuant's scales folded into its weights and taken out of its input."""

    def __init__(self, linear: nn.Linear, scales: Tensor):
        super().__init__()
        with torch.no_grad():
            linear.weight.copy_(multiplied(linear.weight, scales))
        self.linear = linear
        self.scales: Tensor
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(divided(x, self.scales))


def _quantize(copy: Any, names: set[str], granularity: Granularity) -> None:
    with quiet():
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, PerRow, PerTensor, quantize_

    config = Int8DynamicActivationInt8WeightConfig(granularity=PerTensor() if granularity == "per_tensor" else PerRow())
    quantize_(copy, config, filter_fn=lambda _module, name: name in names)
