"""Which tokens one position's output still depends on: over-squashing, measured.

Barbero et al., Transformers need glasses! Information over-squashing in language tasks (NeurIPS 2024, arXiv 2406.04267), section 5, bound
``‖∂y_n/∂v_i‖``; here it is what the model's own Jacobian has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.interventions.intervention import Intervention
from sd_lens.models.loading import require_usable
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import Prompts, decode_each
from sd_lens.propagation.arguments import one_prompt, require_intervention, require_position
from sd_lens.propagation.hutchinson import estimated_norms
from sd_lens.propagation.jacobian_norms import exact_norms
from sd_lens.propagation.jacobians import Output, chunk_of, recorded
from sd_lens.propagation.marks import marks_of, require_same_prompt
from sd_lens.propagation.sensitivity_result import Norm, Sensitivity
from sd_lens.tracing.arguments import require_block, require_blocks, require_seed, require_whole
from sd_lens.tracing.defects import Defects

Method = Literal["exact", "hutchinson"]
MEMORY = 2**30
"""Default for ``memory``: 1 GiB."""


def sensitivity(
    model: TransformerLensModel,
    prompt: Prompts,
    *,
    of: Output = "final",
    position: int = -1,
    sources: Sequence[int] = (0,),
    method: Method = "exact",
    norms: Sequence[Norm] = get_args(Norm),
    n_probes: int = 32,
    seed: int = 0,
    chunk: int | None = None,
    memory: int = MEMORY,
    intervention: Intervention | None = None,
    defects: Defects | None = None,
    prepend_bos: bool | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    """How much one position's output depends on the vector of every token in the stream entering some blocks.

    The numbers are norms of the Jacobian of the output with respect to one token's vector, for each token up to the position (later ones
    have none). The model runs once; vector-Jacobian products are taken back through that run, many at a time, all sources in one.

    Memory: one forward pass kept for differentiation (some ``15 * blocks * tokens * d_model`` numbers and all attention patterns; no
    weight's gradient), and at most about ``memory`` bytes: half of it for products in flight, half for the rows of Jacobians that spectral
    norms are made of. The whole Jacobian exists only if it fits there.

    Time: exact norms need ``d_model`` products, of the logits too, whatever the vocabulary; spectral norms as many again for every
    further group of tokens whose rows (``sources * d_model²`` numbers a token) fit into half of ``memory``. An estimate needs
    ``n_probes``.

    Tokens with a high norm and attention sinks are marked (`sd_lens.propagation.marks` states the rule): those of the model without the
    intervention, so that results with and without one can be laid side by side.

    Args:
        model: A TransformerLens model.
        prompt: One prompt, as text or token ids.
        of: What is differentiated: ``"final"`` for what the unembedding reads, which is the representation after the final norm;
            ``"logits"``; or a block, for the stream leaving it.
        position: The position whose output it is; negative ones count from the end.
        sources: The blocks whose input is differentiated by; 0 stands for the embedding as block 0 gets it.
        method: ``"exact"``, or ``"hutchinson"`` for an estimate of the Frobenius norm, with its standard error, from random signs.
            Its error is within 3 standard errors in some 98 to 99 % of cases with 32 probes, in more than 99 % with 128; with
            few probes the standard error itself is uncertain (95 to 97 % with 8).
        norms: Which norms: ``"frobenius"``, ``"spectral"`` or both. Spectral norms are not estimated.
        n_probes: How many vectors of random signs, at least 2.
        seed: Seeds them.
        chunk: How many products to take at once; None for as many as half of ``memory`` is reckoned to hold, on a CPU no more than pays.
        memory: Bytes, beside the model and the forward pass.
        intervention: Active during the run.
        defects: High-norm tokens of this prompt, where they are known; None to find them.
        prepend_bos: Passed to the tokenisation of a string; None is the model's default.
        progress: Whether to show a progress bar; None shows one once the work takes seconds.

    Returns:
        The norms, with the tokens.

    Raises:
        ValueError: The model or the prompt is unusable, there is more than one prompt, no such block or position, a source lies behind
            what is differentiated, an unknown method or norm, or a number out of range; ``intervention`` is of another model, ``defects``
            of another prompt; or a hook of the caller's lets no gradient through.

    Example:
        >>> from sd_lens.models.loading import load
        >>> felt = sensitivity(load("tiny"), "Once upon a time there was a boat.")
        >>> felt
        Sensitivity(tiny: final representation at position 13 to the input of block 0, most to '.' at 13)
        >>> felt.texts[0], bool(felt.high_norm[0]), bool((felt.spectral <= felt.frobenius).all())
        ('<s>', True, True)
    """
    require_usable(model)
    blocks = _require_options(model, of, sources, method, norms, n_probes, seed, chunk, memory)
    require_intervention(model, intervention)
    tokens = one_prompt(model, prompt, prepend_bos=prepend_bos)
    at = require_position(position, len(tokens))
    if defects is not None:
        require_same_prompt(defects, tokens)
    marks = marks_of(model, tokens, defects)
    hidden = None if progress is None else not progress
    edits = () if intervention is None else intervention.fwd_hooks()
    # Nothing after the position has a part in its output.
    with (
        recorded(model, tokens[: at + 1], sources=blocks, of=of, edits=edits) as graph,
        tqdm(desc="sensitivity", unit="product", delay=2.0, disable=hidden, leave=False) as bar,
    ):
        size = chunk or chunk_of(model, at + 1, len(blocks), graph.output, memory // 2)
        spectral = error = torch.full((len(blocks), at + 1), float("nan"))
        if method == "exact":
            wanted: dict[str, bool] = {name: name in norms for name in get_args(Norm)}
            frobenius, spectral, n_products = exact_norms(graph, chunk=size, memory=memory // 2, bar=bar, **wanted)
            error = torch.zeros_like(frobenius) * frobenius  # NaN where that is
        else:
            frobenius, error = estimated_norms(graph, n_probes=n_probes, seed=seed, chunk=size, bar=bar)
            n_products = n_probes
        stream = [torch.linalg.vector_norm(x[0].detach(), dim=-1, dtype=torch.float64) for x in graph.inputs]
    return Sensitivity(
        model_name=str(model.cfg.model_name),
        of=of,
        position=at,
        sources=blocks,
        frobenius=_whole(frobenius, len(tokens)),
        spectral=_whole(spectral, len(tokens)),
        standard_error=_whole(error, len(tokens)),
        stream_norm=_whole(torch.stack(stream), len(tokens)),
        tokens=tokens,
        texts=tuple(decode_each(model, tokens.tolist())),
        high_norm=marks.high_norm,
        sinks=marks.sinks,
        method=method,
        n_products=n_products,
        intervention=None if intervention is None else intervention.name,
        notes=marks.notes,
    )


def _whole(norms: Float[Tensor, "source before"], n_tokens: int) -> Float[Tensor, "source pos"]:
    """With zeros for the tokens after the position, but NaN where nothing was measured."""
    rest = norms[:, :1].expand(-1, n_tokens - norms.shape[1])
    return torch.cat([norms, torch.where(rest.isnan(), rest, 0.0)], dim=1).double().cpu()


def _require_options(
    model: Any, of: Any, sources: Any, method: Any, norms: Any, n_probes: Any, seed: Any, chunk: Any, memory: Any
) -> tuple[int, ...]:
    n_blocks = int(model.cfg.n_layers)
    require_block(of, n_blocks, names=("final", "logits"), argument="of")
    blocks = tuple(dict.fromkeys(require_blocks(sources, n_blocks, otherwise="at least one", argument="sources")))
    if not blocks:
        raise ValueError(f"sources: got none; allowed: some of 0 to {n_blocks - 1}")
    if isinstance(of, int) and max(blocks) > of:
        raise ValueError(f"sources: got {max(blocks)} with of={of}; allowed: blocks up to {of}, which its output depends on")
    if method not in get_args(Method):
        raise ValueError(f"method: got {method!r}; allowed: {', '.join(map(repr, get_args(Method)))}")
    allowed = ("frobenius",) if method == "hutchinson" else get_args(Norm)
    chosen = [norms] if isinstance(norms, str) or not isinstance(norms, Sequence) else list(norms)
    if any(name not in get_args(Norm) for name in chosen) or not set(chosen) & set(allowed):
        raise ValueError(f"norms: got {norms!r}; allowed: some of {', '.join(map(repr, allowed))}")
    require_whole("n_probes", n_probes, 2)
    require_seed(seed)
    if chunk is not None:
        require_whole("chunk", chunk, 1)
    require_whole("memory", memory, 1)
    return blocks
