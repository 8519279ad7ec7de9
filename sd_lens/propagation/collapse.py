"""Representational collapse: how far apart a model keeps the last tokens of two different inputs, as they get longer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from sd_lens.interventions.intervention import Intervention
from sd_lens.models import hook_names
from sd_lens.models.last_tokens import LOGITS, can_share, last_tokens
from sd_lens.models.loading import require_usable
from sd_lens.models.precision import dtype_name, require_runnable, running_in
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.windows import sliding_window
from sd_lens.propagation.arguments import require_intervention
from sd_lens.propagation.curve import LAYER, CollapseCurve, Line
from sd_lens.propagation.pair_distances import ABSOLUTE, PREDICTIONS, distance, require_metrics
from sd_lens.propagation.probes import Probe, as_probe, require_lengths
from sd_lens.tracing.arguments import require_block, require_whole

FINAL = "final"
"""The layer after the final norm: what the next token is predicted from."""
LONGEST = 8192
"""Where default lengths end in models of longer context."""


def collapse_curve(
    model: TransformerLensModel,
    probe: Probe | str = "repeat-last",
    lengths: Sequence[int] | None = None,
    *,
    layers: Sequence[LAYER] | LAYER = FINAL,
    metrics: Sequence[str] | str = ("linf", "linf_heads"),
    dtypes: Sequence[str | torch.dtype] | str | torch.dtype = ("float32", "bfloat16"),
    intervention: Intervention | None = None,
    shared: bool | None = None,
    batch_tokens: int = 4096,
    progress: bool | None = None,
) -> CollapseCurve:
    """Distance between the last tokens of a probe's pairs, over the length, as the model computes it in each precision.

    Theorem 4.2 of Barbero et al. (Transformers need glasses!, 2024): where positions fade with distance, the last tokens of a sequence and
    of the same with its last token once more come together as the sequence grows, and below a precision's epsilon are one to the model.

    The model is really run in each precision (one block's weights converted at a time), and what sequences share is run once: the
    cost is about that of one pass over the longest sequence per sample and precision, whatever the number of lengths, and memory is that
    of its keys and values (see `last_tokens`). The last token of either sequence of a pair is then computed by the same kernels.

    Args:
        model: A TransformerLens model.
        probe: A `Probe`, or a name (see `probe`) for one without separators and question.
        lengths: Lengths of the pairs' first sequences, in content elements; None for about four per doubling up to the model's context, or 8192.
        layers: Blocks, whose output is meant, or ``"final"``, after the final norm.
        metrics: Names of `sd_lens.propagation.pair_distances.METRICS`: ``"linf"``, ``"l2"``, ``"l1"``, each also with ``"_heads"``, ``"relative"``,
            ``"cosine"``, ``"kl"``, ``"argmax"``. ``"kl"`` and ``"argmax"`` are of the model's predictions, whatever the layers.
        dtypes: Precisions: float64, float32, bfloat16, float16. Weights are converted from what the model holds. What transformers computes in
            float32 whatever the model's precision (norms, softmax, angles of rotary positions) it computes in float32 here, too: in a
            float64 run some rounding is float32's.
        intervention: What to change in the passes, such as ``ExplosionSubspace.at(model).ablate()``.
        shared: Whether to run what sequences share once; None: where the model can, which is tried. A model with a sliding window
            and an intervention is run without, as hooks cannot tell there where in a sequence a pass goes on.
        batch_tokens: Largest number of tokens in a batch where nothing is shared.
        progress: Whether to show a progress bar; None shows one once the work takes seconds.

    Returns:
        The curve.

    Raises:
        ValueError: A length is beyond the model's context, a layer, metric or probe is unknown, the vocabulary lacks the probe's symbols, the
            machine cannot run a dtype, or the intervention is one of another model.

    Example:
        >>> from sd_lens.models.loading import load
        >>> model = load("tiny")
        >>> curve = collapse_curve(model, "count-ones", [1, 4, 16, 64], dtypes="float32")
        >>> curve.to_dataframe().query("metric == 'linf'")["mean"].is_monotonic_decreasing
        True
    """
    require_usable(model)
    chosen = require_metrics(metrics)
    places = _require_layers(model, layers)
    types = require_runnable(model, [dtypes] if isinstance(dtypes, str | torch.dtype) else list(dtypes))
    require_whole("batch_tokens", batch_tokens, 1)
    require_intervention(model, intervention)
    probe = as_probe(model, probe)
    ordered = default_lengths(model, probe) if lengths is None else require_lengths(model, probe, lengths)
    if shared is None:
        shared = (intervention is None or sliding_window(model) is None) and can_share(model)

    points, wanted = _points(model, places, chosen)
    pairs = [probe.pair(length, sample) for sample in range(probe.samples) for length in ordered]
    sequences = [sequence for pair in pairs for sequence in pair]
    values: dict[Line, Tensor] = {}
    equal: dict[tuple[str, LAYER], Tensor] = {}
    sizes: dict[Line, float] = {}
    for dtype in types:
        tally = _Tally(len(pairs), points, wanted, int(model.cfg.d_head))
        with running_in(model, dtype) if dtype != _own(model) else nullcontext():
            last_tokens(
                model,
                sequences,
                list(points.values()),
                tally.receive,
                edits=[] if intervention is None else intervention.fwd_hooks(),
                shared=shared,
                batch_tokens=batch_tokens,
                progress=progress,
                label=f"{probe.name} in {dtype_name(dtype)}",
            )
        for (layer, metric), parts in tally.distances.items():
            sizes[dtype_name(dtype), layer, metric] = tally.sizes[layer, metric] / len(pairs)
            values[dtype_name(dtype), layer, metric] = torch.stack(parts).view(probe.samples, len(ordered), -1)
        for layer, same in tally.equal.items():
            equal[dtype_name(dtype), layer] = torch.tensor(same).view(probe.samples, len(ordered))
    return CollapseCurve(
        model_name=str(model.cfg.model_name),
        n_blocks=int(model.cfg.n_layers),
        probe=probe.records(),
        lengths=ordered,
        values=values,
        equal=equal,
        sizes=sizes,
        edited=None if intervention is None else intervention.name,
        shared=shared,
    )


def default_lengths(model: TransformerLensModel, probe: Probe) -> tuple[int, ...]:
    """About four lengths per doubling, up to the longest that fits into the model's context, or `LONGEST`.

    Args:
        model: The model.
        probe: The probe.
    """
    steps = [round(2 ** (step / 4)) for step in range(8, 4 * LONGEST.bit_length() - 3)]
    # With nothing before it a token repeated is the same twice, whatever the model.
    grid = [*((1,) if probe.before else ()), 2, 3, *(length for length in steps if 4 <= length <= LONGEST)]
    context = int(getattr(model.cfg, "n_ctx", None) or LONGEST)
    fitting = [length for length in dict.fromkeys(grid) if length <= context and probe.longest([length]) <= context]
    return require_lengths(model, probe, fitting or [2])


def _own(model: Any) -> torch.dtype | None:
    """The precision that all of a model's weights have; None where they differ."""
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return kinds.pop() if len(kinds) == 1 else None


def _require_layers(model: TransformerLensModel, layers: Any) -> tuple[LAYER, ...]:
    chosen = (layers,) if isinstance(layers, int | str) else tuple(layers)
    if not chosen:
        raise ValueError(f"layers: got none; allowed: blocks 0 to {int(model.cfg.n_layers) - 1}, or {FINAL!r}")
    for layer in chosen:
        require_block(layer, int(model.cfg.n_layers), names=(FINAL,), argument="layers")
    return tuple(dict.fromkeys(chosen))


def _points(
    model: TransformerLensModel, layers: Sequence[LAYER], metrics: Sequence[str]
) -> tuple[dict[LAYER, str], dict[LAYER, list[str]]]:
    """The hook point of every layer, and what is measured there."""
    norms = [metric for metric in metrics if metric not in PREDICTIONS]
    predictions = [metric for metric in metrics if metric in PREDICTIONS]
    points: dict[LAYER, str] = {}
    wanted: dict[LAYER, list[str]] = {}
    for layer in layers if norms else ():
        points[layer] = hook_names.resid_post(layer) if isinstance(layer, int) else hook_names.unembed_in()
        wanted[layer] = norms
    if predictions:
        points[LOGITS], wanted[LOGITS] = LOGITS, predictions
    return points, wanted


class _Tally:
    """Distances of pairs; of each pair no more is kept than the one of its two vectors that came first."""

    def __init__(self, n_pairs: int, points: dict[LAYER, str], wanted: dict[LAYER, list[str]], d_head: int):
        self._layers = list(points)
        self._waiting: dict[tuple[int, int], tuple[int, Tensor]] = {}
        self._metrics = {(layer, metric): distance(metric, d_head) for layer in points for metric in wanted[layer]}
        self.distances: dict[tuple[LAYER, str], list[Tensor]] = {key: [torch.empty(0)] * n_pairs for key in self._metrics}
        self.sizes: dict[tuple[LAYER, str], float] = dict.fromkeys(self._metrics, 0.0)
        self.equal: dict[LAYER, list[bool]] = {layer: [False] * n_pairs for layer in points}

    def receive(self, number: int, point: int, vector: Tensor) -> None:
        pair, second = divmod(number, 2)
        if (pair, point) not in self._waiting:
            self._waiting[pair, point] = (second, vector.detach().clone())
            return
        _, other = self._waiting.pop((pair, point))
        first, last = (other, vector) if second else (vector, other)
        layer = self._layers[point]
        self.equal[layer][pair] = bool(torch.equal(first, last))
        for (place, metric), measure in self._metrics.items():
            if place == layer:
                self.distances[place, metric][pair] = measure(first, last).cpu()
                if metric in ABSOLUTE:
                    self.sizes[place, metric] += measure(first, torch.zeros_like(first)).mean().item()
