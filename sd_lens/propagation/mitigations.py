"""What helps against collapse: separators, precision, and the sliding window of models that have one, in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sd_lens.models.loading import require_usable
from sd_lens.models.precision import PRECISIONS, dtype_name, require_runnable
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.windows import sliding_window, without_window
from sd_lens.propagation.collapse import FINAL, collapse_curve, default_lengths
from sd_lens.propagation.critical import peak, summary
from sd_lens.propagation.curve import LAYER, CollapseCurve
from sd_lens.propagation.pair_distances import ABSOLUTE
from sd_lens.propagation.probes import probe as make_probe
from sd_lens.propagation.probes import require_lengths
from sd_lens.tracing.arguments import require_whole

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class Setting:
    """One way to run a probe.

    Attributes:
        separator_every: After how many elements a separator stands; None for none.
        window: The sliding window, None where the model has none or it was switched off.
        curve: What came of it, in all precisions.
    """

    separator_every: int | None
    window: int | None
    curve: CollapseCurve

    def __str__(self) -> str:
        separators = "no separators" if self.separator_every is None else f"separator every {self.separator_every}"
        return separators + ("" if self.window is None else f", window {self.window}")


@dataclass(frozen=True, eq=False)
class Mitigations:
    """Collapse of one probe with and without what may help.

    Attributes:
        model_name: The model.
        name: The probe.
        metric: What distances are measured by.
        layer: Where.
        lengths: Lengths in content elements.
        settings: Separators and windows.
    """

    model_name: str
    name: str
    metric: str
    layer: LAYER
    lengths: tuple[int, ...]
    settings: tuple[Setting, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One row per setting and precision."""
        rows = []
        start = peak(self.settings[0].curve, metric=self.metric, layer=self.layer)  # the same for all, so that exponents compare
        for setting in self.settings:
            for dtype in setting.curve.dtypes:
                ends = summary(setting.curve, dtype, metric=self.metric, layer=self.layer, start=start)
                rounding = torch.finfo(PRECISIONS[dtype]).eps
                kept = ends["longest"] / ends["shortest"] if ends["shortest"] > rounding else float("nan")
                rows.append({"separator_every": setting.separator_every, "window": setting.window, **ends, "kept": kept})
        return rows

    def to_dataframe(self) -> pd.DataFrame:
        """One row per setting and precision: distance at the shortest and longest length, the share kept, critical lengths, decay exponent."""
        import pandas as pd

        frame = pd.DataFrame(self.rows())
        return frame.astype({name: "Int64" for name in ("separator_every", "window", "below_epsilon", "equal")})

    def plot(self, dtype: str | None = None) -> go.Figure:
        """Distance over length, one line per setting.

        Args:
            dtype: Precision; None for the first.
        """
        from sd_lens.display.figures import mitigation_lines

        return mitigation_lines(self, dtype)

    def __repr__(self) -> str:
        best = max(self.rows(), key=lambda row: row["longest"])
        separators = "no separators" if best["separator_every"] is None else f"a separator every {best['separator_every']}"
        return (
            f"Mitigations({self.name} on {self.model_name}: {len(self.settings)} settings, {self.metric} at length {self.lengths[-1]} largest with "
            f"{separators} in {best['dtype']}, {best['longest']:.3g})"
        )


def mitigations(
    model: TransformerLensModel,
    name: str = "repeat-last",
    lengths: Sequence[int] | None = None,
    *,
    every: Sequence[int] = (3,),
    dtypes: Sequence[str | torch.dtype] = ("bfloat16", "float32"),
    metric: str = "linf",
    layer: LAYER = FINAL,
    probe_options: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Mitigations:
    """Collapse of a probe as it is, with separators, in higher precision, and with the model's sliding window switched off where it has one.

    Barbero et al. (Transformers need glasses!, 2024) keep representations apart by a separator after every third digit, and name higher
    precision and sliding windows as remedies.

    Args:
        model: A TransformerLens model.
        name: One of `sd_lens.propagation.probes.PROBES`: ``"repeat-last"``, ``"count-ones"``, ``"bernoulli"``, ``"copy-first"``, ``"copy-last"``,
            ``"sum"`` or ``"count-word"``.
        lengths: Lengths in content elements; None for about four per doubling up to what fits with separators.
        every: After how many elements separators are put.
        dtypes: Precisions.
        metric: What distances are measured by: one that a machine epsilon can be held against.
        layer: A block, or ``"final"``.
        probe_options: Further options of `probe` (``separator``, ``before``, ``after``, ``symbols``, ...).
        progress: Whether to show progress bars.

    Returns:
        The table, and the curve of every setting.

    Raises:
        ValueError: As `probe` and `collapse_curve`; the metric is on another scale than a machine epsilon.

    Example:
        >>> from sd_lens.models.loading import load
        >>> table = mitigations(load("tiny"), "repeat-last", [2, 8, 32], dtypes=["bfloat16"]).to_dataframe()
        >>> table[["separator_every", "dtype"]].values.tolist()
        [[<NA>, 'bfloat16'], [3, 'bfloat16']]
    """
    require_usable(model)
    types = require_runnable(model, dtypes)
    if metric not in ABSOLUTE:
        raise ValueError(f"metric: got {metric!r}; allowed: {', '.join(map(repr, ABSOLUTE))}")
    for number in every:
        require_whole("every", number, 1)
    options = dict(probe_options or {})
    if "separator_every" in options:
        raise ValueError("probe_options: got separator_every; allowed: it is given as every")
    probes = [make_probe(model, name, separator_every=number, **options) for number in (None, *dict.fromkeys(every))]
    # The probe that takes most tokens bounds the lengths of all.
    fitting = [default_lengths(model, probe) if lengths is None else require_lengths(model, probe, lengths) for probe in probes]
    common = min(fitting, key=lambda each: each[-1])
    window = sliding_window(model)
    settings = []
    for width in (None,) if window is None else (window, None):
        with without_window(model) if window is not None and width is None else nullcontext():
            for probe in probes:
                curve = collapse_curve(
                    model,
                    probe,
                    common,
                    layers=layer,
                    metrics=metric,
                    dtypes=[dtype_name(dtype) for dtype in types],
                    progress=progress,
                )
                settings.append(Setting(probe.separator_every, width, curve))
    return Mitigations(str(model.cfg.model_name), name, metric, layer, common, tuple(settings))
