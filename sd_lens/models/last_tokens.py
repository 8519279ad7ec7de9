"""What a model makes of the last token of many sequences, where beginnings they share are run once.

In a causal model nothing a token sees depends on what follows it. So one pass over a sequence gives what its last token would be at
every shorter length, and of sequences that differ at the end only the ends need be run again, from the keys and values of what they share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.models import hook_names
from sd_lens.models.batches import batches
from sd_lens.models.key_values import cached_pass, empty, snapshot
from sd_lens.models.loading import inference
from sd_lens.models.prefix_tree import prefix_trees, walk
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.running import Hook

LOGITS = "logits"
"""Stands for the model's logits among hook points."""
SEGMENT = 512
"""Most tokens of one pass: an attention pattern of a block then has ``heads * 512 * length`` entries, whatever the length."""

Receive = Callable[[int, int, Float[Tensor, "_"]], None]
"""Called with the number of a sequence, the number of a point, and the last token's activation there."""


class _Enough(Exception):
    """Ends a pass before the unembedding, which for a large vocabulary costs most and whose result nobody wants."""


def last_tokens(
    model: TransformerLensModel,
    sequences: Sequence[Int[Tensor, "_"]],
    points: Sequence[str],
    receive: Receive,
    *,
    edits: Sequence[Hook] = (),
    shared: bool = True,
    batch_tokens: int = 4096,
    progress: bool | None = None,
    label: str = "sequences",
) -> None:
    """Hands over the activation of every sequence's last token at some hook points.

    Memory beyond the model: where beginnings are shared, the keys and values of the longest sequence (``2 * blocks * length * d_head *
    key-value heads`` numbers), one more of these for each place where a sequence branches from one that goes on (one in all for families
    of growing prefixes), and attention patterns of `SEGMENT` queries. Otherwise what a batch of ``batch_tokens`` tokens takes.

    Args:
        model: The model; its hooks and mode are as before afterwards, also after an error.
        sequences: Token ids, at least one in each.
        points: Hook points of activations (batch, pos, ...), or `LOGITS`.
        receive: Is given the activations, in no particular order.
        edits: Hooks that change activations; they come before those that read them.
        shared: Whether to run what sequences share once. Where not, they are run in batches of similar length.
        batch_tokens: Largest number of tokens in a batch where nothing is shared.
        progress: Whether to show a progress bar; None shows one once the work takes seconds.
        label: The progress bar's.
    """
    reader = _Reader([name for name in points if name != LOGITS])
    run = _run_shared if shared else _run_batches
    total = sum(len(sequence) for sequence in sequences)
    hidden = None if progress is None else not progress
    with inference(model), tqdm(total=total, desc=label, unit="token", delay=2.0, disable=hidden, leave=False) as bar:
        hooks = [*edits, *reader.hooks(points, stop=LOGITS not in points)]
        with model.hooks(fwd_hooks=hooks):  # pyright: ignore[reportAttributeAccessIssue]
            for ends, rows, logits in run(model, sequences, LOGITS in points, batch_tokens, bar):
                for number, (row, last) in zip(ends, rows, strict=True):
                    for point, name in enumerate(points):
                        value = logits if name == LOGITS else reader.seen.get(name)
                        if value is not None:
                            receive(number, point, value[row, last])
                reader.seen.clear()


def can_share(model: TransformerLensModel) -> bool:
    """Whether a model goes on from a key-value cache as it does without one, found by running six tokens both ways.

    Some take no cache, and some bridges count positions anew behind it.

    Args:
        model: The model.
    """
    # Different ids: among equal tokens attention gives the same whatever it looks at.
    sequence = torch.arange(6) * 7 % int(model.cfg.d_vocab)
    seen: list[Tensor] = []

    def run(shared: bool) -> None:
        # The shorter one cuts the longer in two.
        point = hook_names.resid_post(int(model.cfg.n_layers) - 1)
        receive: Receive = lambda number, _, value: seen.append(value.float()) if number else None  # noqa: E731
        last_tokens(model, [sequence[:4], sequence], [point], receive, shared=shared, progress=False)

    run(False)  # what goes wrong here is none of the cache's doing
    try:
        run(True)
    except (TypeError, ValueError, NotImplementedError, RuntimeError, IndexError, AttributeError):
        return False
    without, with_cache = seen
    rounding = 1e-3 if torch.finfo(_precision(model)).bits >= 32 else 0.05
    return bool((with_cache - without).norm() <= rounding * without.norm())


def _precision(model: Any) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


class _Reader:
    """Activations of the running pass."""

    def __init__(self, names: Sequence[str]):
        self.seen: dict[str, Tensor] = {}
        self._names = names

    def hooks(self, points: Sequence[str], *, stop: bool) -> list[Hook]:
        reading: list[Hook] = [(name, self._keep(name)) for name in self._names]
        return [*reading, (hook_names.unembed_in(), _stop)] if stop else reading

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(value: Tensor, hook: Any) -> None:
            self.seen[name] = value.detach()

        return hook


def _stop(value: Tensor, hook: Any) -> None:
    raise _Enough


_Ends = tuple[Sequence[int], Sequence[tuple[int, int]], Tensor | None]
"""Sequences that end in a pass, the row and position of each one's last token there, and the logits."""


def _run_shared(
    model: TransformerLensModel, sequences: Sequence[Tensor], logits: bool, batch_tokens: int, bar: Any
) -> Iterator[_Ends]:
    cache: Any = None
    kept: dict[int, Any] = {}
    for step in walk(prefix_trees(sequences), SEGMENT):
        if step.resume is not None:
            cache = kept.pop(step.resume) if step.release else snapshot(kept[step.resume])
        elif step.start == 0:
            cache = empty(model)
        result = None
        with suppress(_Enough):
            if logits and not step.ends:
                with _stopping(model):
                    cached_pass(model, step.tokens, cache)
            else:
                result = cached_pass(model, step.tokens, cache, logits=logits)
        if step.keep is not None:
            kept[step.keep] = snapshot(cache)
        # Shared beginnings count for all that share them, so that the bar ends where the work does.
        bar.update(sum(len(sequences[number]) for number in step.ends))
        if step.ends:
            yield step.ends, [(0, -1)] * len(step.ends), None if result is None else result.unsqueeze(0)


@contextmanager
def _stopping(model: Any) -> Iterator[None]:
    """Ends passes before the unembedding while the body runs."""
    with model.hooks(fwd_hooks=[(hook_names.unembed_in(), _stop)]):
        yield


def _run_batches(
    model: TransformerLensModel, sequences: Sequence[Tensor], logits: bool, batch_tokens: int, bar: Any
) -> Iterator[_Ends]:
    lengths = [len(sequence) for sequence in sequences]
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    number_of = {start: number for number, start in enumerate(starts[:-1])}
    for batch in batches(sequences, batch_tokens=batch_tokens):
        result: Any = None
        with suppress(_Enough):
            loaded: Any = model
            # `HookedTransformer` asked for no logits ends before the unembedding's hooks; without them a hook ends the pass there.
            result = loaded(batch.tokens.to(loaded.cfg.device), return_type="logits")
        numbers = [number_of[int(start)] for start in batch.flat[:, 0]]
        bar.update(sum(lengths[number] for number in numbers))
        yield numbers, [(row, lengths[number] - 1) for row, number in enumerate(numbers)], result
