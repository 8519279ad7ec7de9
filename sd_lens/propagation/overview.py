"""How information gets to the last token of a model, in one call: collapse, sensitivity and its bound, and on request what helps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sd_lens.anatomy import attempt
from sd_lens.models.loading import require_usable
from sd_lens.models.precision import dtype_name, require_runnable
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import Prompts
from sd_lens.propagation.answering import answer_probes
from sd_lens.propagation.answers import Answers
from sd_lens.propagation.arguments import one_prompt
from sd_lens.propagation.collapse import FINAL, collapse_curve
from sd_lens.propagation.consequences import propagation_consequences
from sd_lens.propagation.curve import LAYER
from sd_lens.propagation.mitigations import Mitigations, mitigations
from sd_lens.propagation.overview_result import Propagation
from sd_lens.propagation.pair_distances import ABSOLUTE
from sd_lens.propagation.probes import Probe
from sd_lens.propagation.probes import probe as make_probe
from sd_lens.propagation.sensitivity import sensitivity
from sd_lens.propagation.squashing import squashing_bound
from sd_lens.propagation.symbols import has_tokenizer
from sd_lens.tracing.arguments import require_whole
from sd_lens.tracing.prompts import default_prompts

__all__ = ["FEW", "TEXT", "Propagation", "propagation_overview"]

TEXT = "Once upon a time there was a boat. It went out."
"""What sensitivity is measured on where the caller gives no prompt."""
FEW = (2, 8, 32, 128, 256)
"""Lengths of a short look; without BOS a single token repeated is the same twice, whatever the model."""
EXACT_WIDTH = 256
"""In wider models sensitivities are estimated, unless asked for exactly: exact ones take as many products as the model is wide."""
ANSWER_ROOM = 8
"""So many tokens are left free for an answer."""
_DTYPES = ("float32", "bfloat16")


def propagation_overview(
    model: TransformerLensModel,
    prompt: Prompts | None = None,
    *,
    probe: str | None = None,
    probe_options: Mapping[str, Any] | None = None,
    lengths: Sequence[int] | str | None = "few",
    layers: Sequence[LAYER] | LAYER = FINAL,
    metrics: Sequence[str] | str = ("linf_heads", "linf"),
    dtypes: Sequence[str | torch.dtype] | None = None,
    separators: Sequence[int] = (),
    without_explosion: bool = False,
    answers: bool = False,
    exact: bool | None = None,
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    progress: bool | None = None,
) -> Propagation:
    """Collapse of a probe, sensitivity of a prompt's last token and the bound on it, and what else is asked for.

    Args:
        model: A TransformerLens model.
        prompt: One prompt whose last token's sensitivity is measured; default: a built-in text, or random ids for a model without tokenizer.
        probe: Name of a probe; None for ``"repeat-last"``, in a vocabulary without digits with the prompt's two commonest tokens in
            their place, which a note says.
        probe_options: Further options of `sd_lens.probe`.
        lengths: Lengths of the probe; ``"few"`` for five up to 256, as far as they fit, None as in `collapse_curve`.
        layers: As in `collapse_curve`.
        metrics: As in `collapse_curve`.
        dtypes: Precisions; None for float32 and bfloat16, as far as the machine can run them.
        separators: Also show what separators after so many elements do, see `mitigations`.
        without_explosion: Whether to repeat all without the explosion subspace, see `propagation_consequences`.
        answers: Whether to ask the model for the probe's answer, see `answer_probes`.
        exact: Whether sensitivities are exact or estimated; None for exact up to a width of 256.
        prepend_bos: Whether a BOS stands before a prompt given as text and before the probe; None is the model's default.
        batch_tokens: Largest number of tokens run at once where nothing is shared.
        progress: Whether to show progress bars.

    Returns:
        The results; what does not apply to the model is left out, with the reason.

    Raises:
        ValueError: The model, the prompt, the probe, a length, layer, metric or dtype is unusable.

    Example:
        >>> from sd_lens.models.loading import load
        >>> found = propagation_overview(load("tiny"), "The cat sat on the mat.", lengths=[1, 16])
        >>> [str(critical) for critical in found.critical_lengths][1]
        'bfloat16: never below 0.00781, never equal to the bit (up to length 16)'
    """
    require_usable(model)
    for number in separators:
        require_whole("separators", number, 1)
    notes: list[str] = []
    missing: dict[str, str] = {}
    if isinstance(lengths, str) and lengths != "few":
        raise ValueError(f"lengths: got {lengths!r}; allowed: 'few', whole numbers from 1, or None")
    if prompt is None:
        prompt = TEXT if has_tokenizer(model) else default_prompts(model)[:1]
    ids = one_prompt(model, prompt, prepend_bos=prepend_bos)
    options = {"prepend_bos": prepend_bos, **(probe_options or {})}
    if probe is None and options.get("symbols") is None:
        options |= _own_symbols(model, ids, notes)
    name = probe or "repeat-last"
    made = make_probe(model, name, **options)
    types = _runnable(model, notes) if dtypes is None else [dtype_name(dtype) for dtype in require_runnable(model, dtypes)]
    curve = collapse_curve(
        model,
        made,
        _few(model, made) if isinstance(lengths, str) else lengths,
        layers=layers,
        metrics=metrics,
        dtypes=types,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    width = int(model.cfg.d_model)
    exact = width <= EXACT_WIDTH if exact is None else exact
    felt = attempt(
        "sensitivity",
        missing,
        lambda: sensitivity(model, [ids], method="exact" if exact else "hutchinson", progress=progress),
    )
    bound = attempt("bound", missing, lambda: squashing_bound(model, [ids], progress=progress))
    metric = next((one for one in curve.metrics if one in ABSOLUTE), "linf")
    layer = next((one for one in curve.layers if one != "logits"), FINAL)
    helped, ablated, answered = None, None, None
    if separators:
        plain = {key: value for key, value in options.items() if key != "separator_every"}

        def help_it() -> Mitigations:
            fitting = curve.lengths
            for every in separators:
                fitting = _fitting(model, make_probe(model, name, separator_every=every, **plain), fitting)
            _say_left_out("separators", curve.lengths, fitting, notes)
            chosen: dict[str, Any] = {"every": separators, "metric": metric, "layer": layer, "probe_options": plain}
            return mitigations(model, name, fitting, dtypes=types, progress=progress, **chosen)

        helped = attempt("mitigations", missing, help_it)
    if without_explosion:
        ablated = attempt(
            "consequences",
            missing,
            lambda: propagation_consequences(
                model,
                made,
                curve.lengths,
                prompt=[ids],
                metric=metric,
                dtypes=types,
                method="exact" if exact else "hutchinson",
                batch_tokens=batch_tokens,
                progress=progress,
            ),
        )
    if answers:

        def answer() -> Answers:
            fitting = _fitting(model, made, curve.lengths, ANSWER_ROOM)
            _say_left_out("answers", curve.lengths, fitting, notes)
            return answer_probes(model, made, fitting, progress=progress)

        answered = attempt("answers", missing, answer)
    shape = {"d_model": width, "n_blocks": int(model.cfg.n_layers)}
    return Propagation(
        str(model.cfg.model_name),
        **shape,
        curve=curve,
        sensitivity=felt,
        bound=bound,
        mitigations=helped,
        consequences=ablated,
        answers=answered,
        missing=missing,
        notes=tuple(notes),
    )


def _own_symbols(model: TransformerLensModel, ids: Int[Tensor, "pos"], notes: list[str]) -> dict[str, Any]:
    """Tokens of the prompt in the place of digits that the vocabulary lacks; none where it has them."""
    try:
        make_probe(model, "repeat-last")
    except ValueError:
        commonest = [token for token, _ in Counter(ids[1:].tolist()).most_common(2)]
        if len(commonest) < 2:
            raise
        one, zero = commonest
        made = make_probe(model, "repeat-last", symbols={"one": one, "zero": zero})
        notes.append(
            f"the vocabulary has no digits: the probe repeats {made.texts[one]!r} and ends in {made.texts[zero]!r}, the prompt's two commonest tokens"
        )
        return {"symbols": {"one": one, "zero": zero}}
    return {}


def _runnable(model: TransformerLensModel, notes: list[str]) -> list[str]:
    """The default precisions that the machine can run."""
    missing: dict[str, str] = {}
    found = [name for name in _DTYPES if attempt(name, missing, lambda name=name: require_runnable(model, [name]))]
    notes.extend(f"{name} was left out: {reason}" for name, reason in missing.items())
    return found


def _few(model: TransformerLensModel, probe: Probe) -> tuple[int, ...]:
    return _fitting(model, probe, FEW) or FEW[:1]  # the first is refused with the reason


def _fitting(model: TransformerLensModel, probe: Probe, lengths: Sequence[int], room: int = 0) -> tuple[int, ...]:
    """The lengths whose pairs fit into the model's context."""
    context = getattr(model.cfg, "n_ctx", None)
    return tuple(length for length in lengths if not context or probe.longest([length]) + room <= context)


def _say_left_out(what: str, asked: Sequence[int], fitting: Sequence[int], notes: list[str]) -> None:
    if fitting and len(fitting) < len(asked):
        notes.append(f"{what}: lengths above {fitting[-1]} were left out, as they do not fit into the model's context with these")
