"""Where high-norm tokens and information propagation meet: collapse and sensitivity with and without the explosion subspace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sd_lens.interventions.intervention import Intervention
from sd_lens.interventions.options import require_subspace
from sd_lens.interventions.sites import Side
from sd_lens.interventions.subspace import ExplosionSubspace
from sd_lens.models.loading import require_usable
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import Prompts
from sd_lens.propagation.arguments import one_prompt
from sd_lens.propagation.collapse import FINAL, collapse_curve
from sd_lens.propagation.critical import peak, summary
from sd_lens.propagation.curve import CollapseCurve
from sd_lens.propagation.pair_distances import ABSOLUTE
from sd_lens.propagation.probes import Probe, require_lengths
from sd_lens.propagation.probes import probe as make_probe
from sd_lens.propagation.sensitivity import Method, sensitivity
from sd_lens.propagation.sensitivity_result import Sensitivity
from sd_lens.tracing.arguments import require_seed
from sd_lens.tracing.defects import find_defects
from sd_lens.tracing.source import source_of

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

UNTOUCHED, ABLATED, CONTROL = "untouched", "ablated", "random control"


@dataclass(frozen=True, eq=False)
class PropagationConsequences:
    """Collapse and sensitivity of a model, and of the same without its explosion subspace.

    Attributes:
        model_name: The model.
        block: The explosion block.
        side: What was taken out.
        rank: How many singular vectors.
        metric: What collapse is measured by.
        curves: Collapse curves: ``"untouched"``, ``"ablated"``, and ``"random control 0"`` and so on, displacements of the same lengths along
            random directions.
        sensitivities: Sensitivity of the prompt's last token, of the same runs; empty where no prompt was given.
    """

    model_name: str
    block: int
    side: str
    rank: int
    metric: str
    curves: Mapping[str, CollapseCurve]
    sensitivities: Mapping[str, Sensitivity]

    def rows(self) -> list[dict[str, Any]]:
        """One row per run and precision."""
        rows = []
        start = peak(self.curves[UNTOUCHED], metric=self.metric, layer=FINAL)  # the same for all, so that exponents compare
        for run, curve in self.curves.items():
            for dtype in curve.dtypes:
                felt = self.sensitivities.get(run)
                rows.append(
                    {
                        "run": run,
                        **summary(curve, dtype, metric=self.metric, layer=FINAL, start=start),
                        "high_norm_share": None if felt is None else _part(felt, felt.share[0]),
                        "high_norm_relative_share": None if felt is None else _part(felt, _normalised(felt.relative[0])),
                        "first_norm": None if felt is None else felt.frobenius[0, 0].item(),
                        "total_norm": None if felt is None else felt.frobenius[0].square().sum().sqrt().item(),
                    }
                )
        return rows

    def to_dataframe(self) -> pd.DataFrame:
        """One row per run and precision.

        Distances at the shortest and longest length, critical lengths and decay. Of the sensitivity: the high-norm tokens' share of the sum of
        squares, per unit (``high_norm_share``) and per share of their length (``high_norm_relative_share``), the norm for the first
        token, and the root of the sum of squares over all tokens.
        """
        import pandas as pd

        return pd.DataFrame(self.rows()).astype({"below_epsilon": "Int64", "equal": "Int64"})

    def plot(self, dtype: str | None = None) -> go.Figure:
        """Collapse curves of all runs, and where there are sensitivities, those beside them.

        Args:
            dtype: Precision; None for the first.
        """
        from sd_lens.display.figures import propagation_panels

        return propagation_panels(self, dtype)

    def __repr__(self) -> str:
        frame = {row["run"]: row["longest"] for row in reversed(self.rows())}
        return (
            f"PropagationConsequences({self.model_name}, {self.side} of rank {self.rank} in block {self.block}: {self.metric} at length "
            f"{self.curves[UNTOUCHED].lengths[-1]} {frame[UNTOUCHED]:.3g} untouched, {frame[ABLATED]:.3g} ablated)"
        )


def propagation_consequences(
    model: TransformerLensModel,
    probe: Probe | str = "repeat-last",
    lengths: Sequence[int] | None = None,
    *,
    prompt: Prompts | None = None,
    subspace: ExplosionSubspace | None = None,
    rank: int = 2,
    side: Side = "both",
    metric: str = "linf",
    dtypes: Sequence[str | torch.dtype] = ("float32", "bfloat16"),
    method: Method = "exact",
    controls: int = 1,
    seed: int = 0,
    batch_tokens: int = 4096,
    progress: bool | None = None,
) -> PropagationConsequences:
    """What becomes of collapse and sensitivity without the explosion subspace, beside norm-matched random displacements.

    Args:
        model: A TransformerLens model.
        probe: A `Probe` or the name of one.
        lengths: Lengths in content elements; None as in `collapse_curve`.
        prompt: One prompt whose last token's sensitivity is measured; None for no sensitivity.
        subspace: The subspace; None for the one of the block that explodes on the built-in texts.
        rank: Its singular vectors, where none is given.
        side: What is taken out of all tokens: ``"trigger"``, ``"direction"`` or ``"both"``.
        metric: What collapse is measured by: one that a machine epsilon can be held against.
        dtypes: Precisions of the collapse curves; sensitivities are in the model's own.
        method: Whether sensitivities are ``"exact"`` or estimated (``"hutchinson"``), see `sensitivity`.
        controls: How many random displacements.
        seed: Of the first.
        batch_tokens: Largest number of tokens in a batch where sequences share nothing.
        progress: Whether to show progress bars.

    Returns:
        Curves and sensitivities of every run.

    Raises:
        ValueError: As `collapse_curve` and `sensitivity`; no block explodes and no subspace is given, or the subspace is one of another model.

    Example:
        >>> from sd_lens.models.loading import load
        >>> found = propagation_consequences(load("tiny"), "count-ones", [1, 8, 64], dtypes=["float32"])
        >>> list(found.curves)
        ['untouched', 'ablated', 'random control 0']
    """
    require_usable(model)
    require_seed(seed)
    require_subspace(model, subspace, rank, controls, batch_tokens)
    if metric not in ABSOLUTE:
        raise ValueError(f"metric: got {metric!r}; allowed: {', '.join(map(repr, ABSOLUTE))}")
    ids = None if prompt is None else one_prompt(model, prompt)
    if isinstance(probe, str):
        probe = make_probe(model, probe)
    if lengths is not None:
        lengths = require_lengths(model, probe, lengths)
    if subspace is None:
        subspace = _own_subspace(model, rank)
    ablate = subspace.ablate(side=side)
    runs: dict[str, Intervention | None] = {UNTOUCHED: None, ABLATED: ablate}
    runs |= {f"{CONTROL} {number}": ablate.control(seed + number) for number in range(controls)}
    curves = {
        run: collapse_curve(
            model, probe, lengths, metrics=metric, dtypes=dtypes, intervention=edit, batch_tokens=batch_tokens, progress=progress
        )
        for run, edit in runs.items()
    }
    felt: dict[str, Sensitivity] = {}
    if ids is not None:
        felt = {run: sensitivity(model, [ids], method=method, intervention=edit, progress=progress) for run, edit in runs.items()}
    return PropagationConsequences(str(model.cfg.model_name), subspace.block, side, subspace.rank, metric, curves, felt)


def _own_subspace(model: TransformerLensModel, rank: int) -> ExplosionSubspace:
    defects = find_defects(source_of(model, None, may_need=()).trace())
    if defects.main_block is None:
        raise ValueError("subspace: got None, and no block explodes; allowed: an ExplosionSubspace of this model, of any block")
    return ExplosionSubspace.at(model, rank=rank, defects=defects)


def _normalised(norms: torch.Tensor) -> torch.Tensor:
    return norms.square() / norms.square().sum()


def _part(felt: Sensitivity, shares: torch.Tensor) -> float:
    return shares[felt.high_norm].sum().item()
