"""Which tokens explode by themselves: every id of a vocabulary in one and the same place, up to the explosion block.

After Wang et al. (ICML 2025, arXiv 2502.07004), section 4. A token at position 0 sees only itself, so the norm of every id there
takes one token per id to find; random embeddings in their place tell whether it matters which id it is. With what attention adds left
out, what still explodes does so by its own embedding and the FFNs: those are the tokens that can explode anywhere, the delimiters.
After one other token attention has something else to look at, and most ids that explode at position 0 do not any more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sd_lens.linear.trigger import trigger_direction
from sd_lens.models.embeddings import embedding_norms, joining_norm, trained_ids
from sd_lens.models.loading import require_usable, weights_of
from sd_lens.models.positions import adds_positions
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import Prompts
from sd_lens.tracing.alone import Alone, Target
from sd_lens.tracing.arguments import require_block
from sd_lens.tracing.defects import find_defects
from sd_lens.tracing.norms import trace_norms
from sd_lens.tracing.prompts import default_prompts
from sd_lens.tracing.source import Source
from sd_lens.tracing.trace import MIN_RATIO, require_ratio
from sd_lens.tracing.vocabulary_scan import PATHWAYS, Pathway, VocabularyScan

# Ids whose embeddings the length of random ones is averaged over.
_SAMPLE = 1024
# Where the prompts show no explosion, a scan settles on the first block after which the largest ratio is this much of its peak.
_SETTLED = 0.9


def scan_vocabulary(
    model: TransformerLensModel,
    pathway: Pathway = "initial",
    *,
    ids: Int[Tensor, "id"] | Sequence[int] | None = None,
    block: int | None = None,
    min_ratio: float = MIN_RATIO,
    prompts: Prompts | Source | None = None,
    control: int = 1024,
    batch_tokens: int = 4096,
    seed: int = 0,
    progress: bool | None = None,
) -> VocabularyScan:
    """Norm and coefficient of every token id in one place, stopping at the explosion block.

    All pathways are compared with one number: the norm of ordinary tokens in a text, with attention as it is. Of the alternatives for
    ``"no_attention"``, the median over the ids would hide an explosion that most of them have, and means nothing for a few ids; the
    median over the text's tokens without attention can be smaller, by a quarter in a small model without any high norm, where some id
    then comes close to counting as exploding (5.1 times that median, instead of 3.8 times the one used).

    Args:
        model: A TransformerLens model.
        pathway: ``"initial"``: every id alone, at position 0, without BOS. ``"no_attention"``: the same with what attention adds set to
            zero in every block; where the model adds a positional embedding, at position 1. ``"second"``: every id after a random other one.
        ids: Which ids, each once; default: all.
        block: The block after which norms are taken; default: the explosion block that the prompts show, the last of several. If they
            show none, all blocks are run, and the scan settles on the first after which the largest ratio of a trained id is within a
            tenth of the largest after any.
        min_ratio: Least norm of an id that explodes, as a multiple of ordinary tokens' median norm.
        prompts: What the explosion block and the ordinary tokens' norm are taken from; default: built-in texts.
        control: How many random embeddings are run in the ids' place: Gaussian directions, all as long as trained ids' embeddings are in
            the mean. What a model adds for the position stays.
        batch_tokens: Largest number of tokens run at once.
        seed: Seeds the random embeddings and the other ids.
        progress: Whether to show progress bars.

    Returns:
        The scan.

    Raises:
        ValueError: An argument is not among those allowed; model or prompts are unusable, or the stream is not finite.

    Example:
        >>> from sd_lens.models.loading import load
        >>> scan = scan_vocabulary(load("tiny"), control=64)
        >>> scan
        VocabularyScan(tiny, initial: 1 of 1024 trained ids reach 6 times the ordinary norm after block 2; random embeddings 0 %)
        >>> scan.top(1).token.tolist()
        ['<s>']
    """
    require_usable(model)
    if pathway not in PATHWAYS:
        raise ValueError(f"pathway: got {pathway!r}; allowed: {', '.join(map(repr, PATHWAYS))}")
    n_blocks: int = model.cfg.n_layers
    if block is not None:
        require_block(block, n_blocks)
    for name, value, least in (("control", control, 0), ("batch_tokens", batch_tokens, 1)):
        if value < least:
            raise ValueError(f"{name}: got {value}; allowed: at least {least}")
    require_ratio(min_ratio)
    scanned = _require_ids(ids, model.cfg.d_vocab)
    trained = trained_ids(embedding_norms(model))
    if not bool(trained.any()):
        raise ValueError("model: all of its embeddings are zero; allowed: a model with embeddings")

    if isinstance(prompts, Source):
        trace = prompts.trace(min_ratio=min_ratio)
    else:
        texts, stop = default_prompts(model) if prompts is None else prompts, None if block is None else block + 1
        trace = trace_norms(model, texts, stop_at=stop, min_ratio=min_ratio, batch_tokens=batch_tokens, progress=progress)
    defects = find_defects(trace, min_ratio=min_ratio)
    alone = Alone(model, with_attention=pathway != "no_attention", batch_tokens=batch_tokens, progress=progress)
    sequences = scanned.unsqueeze(1)
    if pathway == "no_attention" and adds_positions(model):
        # What is added for position 0 can make any token explode there. Without attention the token before makes no difference.
        sequences = sequences.expand(-1, 2)
    if pathway == "second":
        sequences = torch.stack([_others(scanned, trained, seed), scanned], dim=1)
    notes: list[str] = []
    if block is None and defects.found:
        block = defects.explosion_blocks[-1]
    elif block is None:
        everywhere = alone.norms(sequences, range(n_blocks))[:, trained[scanned], -1]
        block = _settle(everywhere / trace.reference[1:].unsqueeze(1))
        notes.append(f"no explosion in the prompts; block {block} is the first after which an id's ratio is nearly at its largest")
    target, about = _target(model, block)
    norms, coefficients = alone.norms_and_coefficients(sequences, block, target)
    others, initial = None, (None, None)
    if pathway == "second":
        others = sequences[:, 0]
        initial = _at_position_0(alone, sequences, norms, coefficients, block, target)
    drawn = None
    if control:
        under, vectors = _random_embeddings(
            model, trained, control, length=sequences.shape[1], batch_tokens=batch_tokens, seed=seed
        )
        drawn = alone.norms(under, [block], embeddings=vectors, label="random embeddings")[0, :, -1]
    return VocabularyScan(
        model_name=str(getattr(model.cfg, "model_name", "model")),
        pathway=pathway,
        block=block,
        ids=scanned,
        norms=norms[:, -1],
        coefficients=coefficients[:, -1],
        trained=trained[scanned],
        reference=float(trace.reference[block + 1]),
        control=drawn,
        explosion_found=defects.found,
        notes=(*notes, *about),
        min_ratio=min_ratio,
        seed=seed,
        others=others,
        initial_norms=initial[0],
        initial_coefficients=initial[1],
        tokenizer=getattr(model, "tokenizer", None),
    )


def _require_ids(ids: Tensor | Sequence[int] | None, vocabulary: int) -> Int[Tensor, "id"]:
    if ids is None:
        return torch.arange(vocabulary)
    given = (ids if isinstance(ids, Tensor) else torch.tensor(list(ids))).detach().cpu()
    if given.ndim != 1 or given.numel() == 0:
        raise ValueError(f"ids: got shape {tuple(given.shape)}; allowed: at least one id, in one dimension")
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise ValueError(f"ids: got dtype {given.dtype}; allowed: integer token ids")
    low, high = int(given.min()), int(given.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"ids: got {low} to {high}; allowed: 0 to {vocabulary - 1}")
    known, counts = given.unique(return_counts=True)
    if len(known) < len(given):
        raise ValueError(f"ids: got {int(known[counts.argmax()])} {int(counts.max())} times; allowed: each id once")
    return given.long()


def _settle(ratios: Float[Tensor, "block id"]) -> int:
    """The first block after which the largest ratio is nearly the largest of all: one that stays for blocks grows a little by chance."""
    if ratios.shape[1] == 0:
        return len(ratios) - 1
    largest = ratios.amax(1)
    return int((largest >= _SETTLED * largest.max()).nonzero()[0])


def _target(model: TransformerLensModel, block: int) -> tuple[Target | None, tuple[str, ...]]:
    """A block with its trigger; None where its FFN cannot be linearised, and then why."""
    try:
        weights = weights_of(model)[block]
        return Target(weights, trigger_direction(weights)), ()
    except ValueError as error:
        return None, (f"no coefficients: {error}",)


def _others(ids: Int[Tensor, "id"], trained: Bool[Tensor, "vocab"], seed: int) -> Int[Tensor, "id"]:
    """What each id comes after: trained ids after one another in a circle, so that each is at position 0 once; others after any of them."""
    circle = ids[trained[ids]]
    if len(circle) < 2:
        circle = trained.nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    circle = circle[torch.randperm(len(circle), generator=generator)]
    before = circle[torch.randint(len(circle), trained.shape, generator=generator)]
    before[circle] = circle.roll(1)
    if bool((before[ids] == ids).any()):
        raise ValueError("model: only one id of its vocabulary was trained; allowed: at least two, for an id to come after another")
    return before[ids]


def _at_position_0(
    alone: Alone, pairs: Tensor, norms: Tensor, coefficients: Tensor, block: int, target: Target | None
) -> tuple[Float[Tensor, "id"], Float[Tensor, "id"]]:
    """Norm and coefficient of every id at position 0, which of most of them the pairs have shown already."""
    ids = pairs[:, 1]
    row = torch.full((int(pairs.max()) + 1,), -1)
    row[pairs[:, 0]] = torch.arange(len(ids))
    row = row[ids]
    found = norms[row, 0], coefficients[row, 0]
    unseen = row < 0
    if bool(unseen.any()):
        measured = alone.norms_and_coefficients(ids[unseen].unsqueeze(1), block, target)
        for values, more in zip(found, measured, strict=True):
            values[unseen] = more[:, 0]
    return found


def _random_embeddings(
    model: TransformerLensModel, trained: Bool[Tensor, "vocab"], n: int, *, length: int, batch_tokens: int, seed: int
) -> tuple[Int[Tensor, "sample length"], Float[Tensor, "sample d_model"]]:
    """Sequences of random trained ids, and random vectors for the last of each, as long as trained ids' embeddings."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.nn.functional.normalize(torch.randn(n, model.cfg.d_model, generator=generator), dim=-1)
    known = trained.nonzero().flatten()
    some = known[torch.randperm(len(known), generator=generator)[:_SAMPLE]]
    under = known[torch.randint(len(known), (n, length), generator=generator)]
    return under, vectors * joining_norm(model, some, batch_tokens=batch_tokens)
