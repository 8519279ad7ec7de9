"""Which sublayer of an explosion or decay block writes the high-norm tokens' large norm.

At a block, the projection of the residual stream on the defect direction splits exactly into what was there before, what the
attention adds and what the FFN adds, because ``resid_post = resid_pre + attn_out + mlp_out``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from sd_lens.models import hook_names
from sd_lens.models.batches import Batch, batches
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.running import run_batches
from sd_lens.tracing.defects import Defects

PARTS = ("before", "attention", "ffn")


@dataclass(frozen=True)
class SublayerShare:
    """How one block's step along the defect direction is made up, averaged over the high-norm tokens.

    Attributes:
        block: The block.
        before: Projection of the stream entering it.
        attention: Projection of what its attention adds.
        ffn: Projection of what its FFN adds.
        after: Projection of the stream leaving it, measured at its own hook point.
    """

    block: int
    before: float
    attention: float
    ffn: float
    after: float

    @property
    def residual(self) -> float:
        """What the three parts leave unexplained of ``after``: rounding."""
        return self.after - self.before - self.attention - self.ffn

    @property
    def ffn_share(self) -> float:
        """The FFN's share of the block's step, above 1 where the attention works against it; NaN where there is no step."""
        step = self.attention + self.ffn
        return self.ffn / step if step else float("nan")

    @property
    def main_part(self) -> str:
        """``"attention"`` or ``"ffn"``, whichever adds more in the direction of the step."""
        return "ffn" if self.ffn_share >= 0.5 else "attention"


@dataclass(frozen=True)
class SublayerAttribution:
    """The steps of some blocks along the defect direction.

    Attributes:
        model_name: The model.
        shares: One entry per block.
        n_tokens: High-norm tokens averaged over.
    """

    model_name: str
    shares: tuple[SublayerShare, ...]
    n_tokens: int

    def to_dataframe(self) -> pd.DataFrame:
        """One row per block."""
        return pd.DataFrame([vars(s) | {"residual": s.residual, "ffn_share": s.ffn_share} for s in self.shares])

    def __repr__(self) -> str:
        steps = ", ".join(f"block {s.block}: {s.main_part}" for s in self.shares)
        return f"SublayerAttribution({self.model_name}: {steps or 'no blocks'})"


def attribute_sublayers(
    model: TransformerLensModel, defects: Defects, *, batch_tokens: int = 4096, max_prompts: int = 32
) -> SublayerAttribution:
    """Splits the step that each explosion and decay block makes along the defect direction over its sublayers.

    Args:
        model: The model that was traced.
        defects: From `find_defects`, of a trace with a direction.
        batch_tokens: Largest number of tokens run at once.
        max_prompts: The first so many prompts with a high-norm token are run once more.

    Returns:
        The shares, one entry per explosion and decay block; none where nothing was found.

    Raises:
        ValueError: Something was found but the trace has no direction.

    Example:
        >>> from sd_lens.models.planted import planted
        >>> from sd_lens.tracing.defects import find_defects
        >>> from sd_lens.tracing.norms import trace_norms
        >>> model = planted().model
        >>> attribute_sublayers(model, find_defects(trace_norms(model, torch.arange(10).unsqueeze(0))))
        SublayerAttribution(planted: block 1: ffn, block 4: ffn)
    """
    trace, blocks = defects.trace, sorted({*defects.explosion_blocks, *defects.decay_blocks})
    if (model.cfg.n_layers, model.cfg.d_model) != (trace.n_blocks, trace.d_model) or int(trace.tokens.max()) >= model.cfg.d_vocab:
        raise ValueError(
            f"model: got one of {model.cfg.n_layers} blocks, width {model.cfg.d_model} and {model.cfg.d_vocab} tokens; allowed: the model "
            f"that was traced ({trace.model_name}: {trace.n_blocks} blocks, width {trace.d_model})"
        )
    if int(trace.tokens.min()) < 0:
        raise ValueError("defects: their trace does not know its token ids; allowed: one from trace_norms, or with tokens given")
    if not blocks:
        return SublayerAttribution(trace.model_name, (), 0)
    if trace.direction is None:
        raise ValueError("defects: their trace has no direction; allowed: a trace from trace_norms with direction_prompts above 0")
    high = trace.high_norm(defects.min_ratio).any(0)
    prompts = torch.unique(trace.prompt[high])[:max_prompts]
    index = torch.isin(trace.prompt, prompts).nonzero().flatten()
    sequences = [trace.tokens[trace.prompt == prompt] for prompt in prompts]
    names = (hook_names.resid_pre, hook_names.attn_out, hook_names.mlp_out, hook_names.resid_post)
    points = [name(block) for block in blocks for name in names]
    unit = trace.direction.direction.double()
    sums = torch.zeros(len(points), dtype=torch.float64)

    def project(batch: Batch) -> Callable[[int, Tensor], None]:
        chosen = high[index[batch.flat]] & batch.mask

        def receive(point: int, stream: Tensor) -> None:
            sums[point] += (stream[chosen.to(stream.device)].double().sum(0).cpu() @ unit).item()

        return receive

    stop = blocks[-1] + 1 if blocks[-1] + 1 < trace.n_blocks else None
    run_batches(model, batches(sequences, batch_tokens=batch_tokens), points, project, stop_at=stop, label="attribution")
    n_tokens = int(high[index].sum())
    means = (sums / n_tokens).reshape(len(blocks), len(names)).tolist()
    shares = (SublayerShare(block, *values) for block, values in zip(blocks, means, strict=True))
    return SublayerAttribution(trace.model_name, tuple(shares), n_tokens)
