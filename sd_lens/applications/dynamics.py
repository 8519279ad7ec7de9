"""How a model's defect direction comes about in training: the same tokens in one checkpoint after the other.

The last checkpoint says which tokens of the prompts have a high norm, and after which blocks. In every checkpoint the mean of the
residual vectors of these tokens there is taken (in the last it is the defect direction of Wang et al., ICML 2025, arXiv 2502.07004,
section 3), so that there are angles also before anything explodes. One model is in memory at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.applications.checkpoints import Checkpoint, CheckpointLike, require_same, series
from sd_lens.applications.stability import CheckpointState, DirectionStability
from sd_lens.linear.angles import acute_angle
from sd_lens.models import hook_names
from sd_lens.models.batches import Batch, batches
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.running import run_batches
from sd_lens.models.tokens import Prompts, tokenize
from sd_lens.tracing.arguments import require_whole
from sd_lens.tracing.defects import Defects, find_defects
from sd_lens.tracing.direction import DefectDirection, DirectionAccumulator
from sd_lens.tracing.norms import trace_norms
from sd_lens.tracing.prompts import default_prompts
from sd_lens.tracing.trace import MIN_RATIO, NormTrace, require_ratio


def direction_stability(
    checkpoints: CheckpointLike | Sequence[CheckpointLike],
    prompts: Prompts | None = None,
    *,
    steps: Sequence[int] | None = None,
    prepend_bos: bool | None = None,
    min_ratio: float = MIN_RATIO,
    batch_tokens: int = 4096,
    dtype: torch.dtype = torch.float32,
    progress: bool | None = None,
    **boot: Any,
) -> DirectionStability:
    """When the explosion emerges in training, and how its direction settles.

    Args:
        checkpoints: The checkpoints in order of training: folders, hub names with or without a revision
            (``"EleutherAI/pythia-70m@step1000"``), ``"tiny"``, or ready models. A folder without a config.json stands for the
            folders in it that hold one and are named after a step (``step-00250``, ``checkpoint-500``), sorted by step.
        prompts: Strings or token ids, the same for all; default: built-in texts.
        steps: Training step of each; default: what the names say.
        prepend_bos: Passed to the tokenisation of strings; None is the model's default.
        min_ratio: Least norm of a high-norm token, as a multiple of the other tokens' median.
        batch_tokens: Largest number of tokens run at once.
        dtype: What loaded models' weights are converted to.
        progress: Whether to show a progress bar; None shows one on a terminal or in a notebook once the work takes seconds.
        **boot: Passed on to `TransformerBridge.boot_transformers` for models that are loaded (``device``, ...).

    Returns:
        One row per checkpoint, and the emergence. Where the last checkpoint has no high-norm token the angles are NaN.

    Raises:
        ValueError: There are fewer than two checkpoints; one is unusable, or has another width, depth or tokenizer than the last;
            steps do not grow; prompts or an argument are unusable. The message names the checkpoint.
        FileNotFoundError: A folder does not exist.

    Example:
        >>> from sd_lens.models.planted import planted
        >>> early, late = planted().model, planted().model
        >>> _ = early.original_model.model.layers[1].mlp.down_proj.weight.data.zero_()  # the explosion block writes nothing yet
        >>> found = direction_stability([early, late], torch.arange(10).unsqueeze(0), steps=[100, 200])
        >>> found.emergence.step, [state.max_ratio > 1000 for state in found.states]
        (200, [False, True])
    """
    require_ratio(min_ratio)
    require_whole("batch_tokens", batch_tokens, 1)
    found = series(checkpoints, steps)
    if boot and all(one.ready for one in found):
        raise ValueError(f"boot options: got {', '.join(sorted(boot))} with ready models; allowed: none")
    options = _Options(prompts, prepend_bos, min_ratio, batch_tokens, dtype, boot)
    # The last goes first: it says which tokens are followed.
    last = _reference(found[-1], options)
    rows = list[_Row]()
    hidden = None if progress is None else not progress
    for one in tqdm(found[:-1], desc="checkpoints", unit="checkpoint", delay=2.0, disable=hidden, leave=False):
        rows.append(_row(one, last, options))
        _let_go(one)
    return _result(found, [*rows, last.row], last, options)


@dataclass(frozen=True)
class _Options:
    prompts: Prompts | None
    prepend_bos: bool | None
    min_ratio: float
    batch_tokens: int
    dtype: torch.dtype
    boot: dict[str, Any]

    def sequences(self, model: TransformerLensModel) -> list[Int[Tensor, "_"]]:
        if self.prompts is None:
            return default_prompts(model, prepend_bos=self.prepend_bos)
        return tokenize(model, self.prompts, prepend_bos=self.prepend_bos)


@dataclass(frozen=True)
class _Row:
    """What is kept of a checkpoint."""

    defects: Defects
    mean: DefectDirection | None
    others: DefectDirection | None


@dataclass(frozen=True)
class _Reference:
    """The last checkpoint: its tokens and where they are high."""

    label: str
    sequences: list[Int[Tensor, "_"]]
    shape: tuple[int, int]
    high: Bool[Tensor, "point token"]
    row: _Row


def _reference(last: Checkpoint, options: _Options) -> _Reference:
    with _naming(last):
        model = last.model(dtype=options.dtype, boot=options.boot)
    sequences = options.sequences(model)  # the caller's prompts, not the checkpoint, are to blame here
    with _naming(last):
        defects = _defects(model, sequences, options)
        high = defects.trace.high_norm(options.min_ratio)
        row = _Row(defects, *_means(model, defects.trace, high, options))
    shape = int(model.cfg.d_model), int(model.cfg.n_layers)
    del model
    _let_go(last)
    return _Reference(last.label, sequences, shape, high, row)


def _row(one: Checkpoint, last: _Reference, options: _Options) -> _Row:
    with _naming(one):
        model = one.model(dtype=options.dtype, boot=options.boot)
    require_same("d_model", int(model.cfg.d_model), one.label, last.shape[0], last.label)
    require_same("blocks", int(model.cfg.n_layers), one.label, last.shape[1], last.label)
    with _naming(one):
        sequences = options.sequences(model)
    _require_same_tokens(one.label, sequences, last)
    with _naming(one):
        defects = _defects(model, sequences, options)
        return _Row(defects, *_means(model, defects.trace, last.high, options))


def _let_go(one: Checkpoint) -> None:
    if not one.ready:
        gc.collect()  # bridges are cyclic: without it the next model would be loaded beside this one


class _naming:
    """Complaints about a checkpoint begin with its name."""

    def __init__(self, checkpoint: Checkpoint):
        self._label = checkpoint.label

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, where: Any) -> None:
        if isinstance(error, ValueError):
            raise ValueError(f"checkpoints: {self._label}: {error}") from error


def _require_same_tokens(label: str, sequences: Sequence[Tensor], last: _Reference) -> None:
    for prompt, (ours, theirs) in enumerate(zip(sequences, last.sequences, strict=False)):
        if not torch.equal(ours, theirs):
            raise ValueError(
                f"checkpoints: {label} makes other tokens of prompt {prompt} than {last.label} ({ours[:8].tolist()} against {theirs[:8].tolist()} at "
                "its beginning); allowed: checkpoints with one tokenizer"
            )


def _defects(model: TransformerLensModel, sequences: list[Tensor], options: _Options) -> Defects:
    trace = trace_norms(
        model,
        sequences,
        batch_tokens=options.batch_tokens,
        min_ratio=options.min_ratio,
        direction_prompts=len(sequences),
        progress=False,
    )
    return find_defects(trace, min_ratio=options.min_ratio)


def _means(
    model: TransformerLensModel, trace: NormTrace, high: Bool[Tensor, "point token"], options: _Options
) -> tuple[DefectDirection | None, DefectDirection | None]:
    """Mean residual vectors of given tokens at given points, and of the other tokens at these points, summed inside the hooks."""
    used = high.any(1).nonzero().flatten().tolist()
    if not used:
        return None, None
    anywhere = high.any(0)
    prompts = torch.unique(trace.prompt[anywhere])
    index = torch.isin(trace.prompt, prompts).nonzero().flatten()  # from tokens of these prompts to tokens of the trace
    these, others = (DirectionAccumulator(len(used), trace.d_model, min_ratio=options.min_ratio) for _ in range(2))

    def accumulate(batch: Batch) -> Callable[[int, Tensor], None]:
        where = index[batch.flat]
        ordinary = ~anywhere[where] & batch.mask

        def receive(point: int, stream: Tensor) -> None:
            these.add(point, stream, high[used[point], where] & batch.mask, anywhere[where] & batch.mask)
            others.add(point, stream, ordinary, ordinary)

        return receive

    points = hook_names.residual_points(trace.n_blocks)
    stop = used[-1] if used[-1] < trace.n_blocks else None
    work = batches([trace.tokens[trace.prompt == prompt] for prompt in prompts], batch_tokens=options.batch_tokens)
    run_batches(model, work, [points[point] for point in used], accumulate, stop_at=stop, progress=False)
    return these.result(), others.result()


def _result(found: list[Checkpoint], rows: list[_Row], last: _Reference, options: _Options) -> DirectionStability:
    trace = last.row.defects.trace
    states = [
        _state(one, row, last.row, previous, last.high) for one, row, previous in zip(found, rows, [None, *rows[:-1]], strict=True)
    ]
    nowhere = torch.full((trace.d_model,), float("nan"))
    return DirectionStability(
        model_name=last.label,
        d_model=trace.d_model,
        n_blocks=trace.n_blocks,
        states=tuple(states),
        directions=torch.stack([nowhere if row.mean is None else row.mean.direction for row in rows]),
        n_prompts=trace.n_prompts,
        n_tokens=trace.norms.shape[1],
        n_vectors=int(last.high.sum()),
        min_ratio=options.min_ratio,
    )


def _state(one: Checkpoint, row: _Row, last: _Row, previous: _Row | None, high: Bool[Tensor, "point token"]) -> CheckpointState:
    defects, trace = row.defects, row.defects.trace
    own_high = trace.high_norm(defects.min_ratio).any(0)
    return CheckpointState(
        label=one.label,
        step=one.step,
        found=defects.found,
        explosion_block=defects.main_block,
        explosion_blocks=defects.explosion_blocks,
        max_ratio=float(trace.ratios[1:].max()),
        n_high=int(own_high.sum()),
        n_same=int((own_high & high.any(0)).sum()),
        norm=float(trace.norms[high].mean()),
        ratio=float(trace.ratios[high].mean()),
        mean_pairwise_angle_deg=float("nan") if row.mean is None else row.mean.mean_pairwise_angle_deg,
        angle_to_last_deg=_angle(row.mean, last.mean),
        angle_to_previous_deg=_angle(row.mean, None if previous is None else previous.mean),
        others_angle_to_last_deg=_angle(row.others, last.others),
        own_angle_to_last_deg=_angle(defects.direction, last.defects.direction),
    )


def _angle(a: DefectDirection | None, b: DefectDirection | None) -> float:
    """Angle between two directions that have a sign, 0° to 180°; NaN where one is missing."""
    if a is None or b is None:
        return float("nan")
    x, y = a.direction.double(), b.direction.double()
    if torch.equal(x, y):
        return 0.0  # not what rounding leaves of it
    acute = float(acute_angle(x, y))
    return acute if float(x @ y) >= 0 else 180.0 - acute
