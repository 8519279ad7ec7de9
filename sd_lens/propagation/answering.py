"""Can a model answer what probes ask: how many ones, which digit at the end; by its logits, or by the text that it generates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.models.generating import greedy
from sd_lens.models.last_tokens import LOGITS, can_share, last_tokens
from sd_lens.models.loading import require_usable
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.propagation.answers import Answer, Answers
from sd_lens.propagation.candidates import Candidates, Node, candidate_tree
from sd_lens.propagation.probes import DIGITS, Probe, as_probe, require_lengths
from sd_lens.propagation.symbols import require_tokenizer
from sd_lens.tracing.trace import not_finite

_Asked = tuple[int, int, bool]
"""Length, sample, and whether it is the changed one of the pair."""


def answer_probes(
    model: TransformerLensModel,
    probe: Probe | str,
    lengths: Sequence[int],
    *,
    by: Literal["logits", "generation"] = "logits",
    candidates: Candidates | None = None,
    max_new_tokens: int = 8,
    progress: bool | None = None,
) -> Answers:
    """Answers of a model to a probe at some lengths, beside the right ones.

    Asked are the first sequences of the pairs, and where pairs differ in the digit to copy (``contrast="changed"``) both, so that a model that
    says the same whatever it reads is right in half of the cases. A model that was not trained to follow instructions answers a row of digits
    with more digits: give the probe a question (``template=True``).

    By logits a candidate's probability is the product of its tokens' after the probe, of its spellings with and without a space before it
    together, for texts that begin with no longer candidate: "12" is not counted as 1. What probes share is run once; each distinct
    beginning of a candidate takes a pass of one token per probe. By generation the answer is the first whole number (of digits to copy: the
    first of the two) in the text that the model goes on with greedily; a number that `max_new_tokens` cuts off counts as it stands.

    Args:
        model: A TransformerLens model; as before afterwards, also after an error.
        probe: A probe of its vocabulary.
        lengths: Numbers of content elements.
        by: ``"logits"`` or ``"generation"``.
        candidates: Numbers, or a dictionary of numbers and the ids that say them. Default: the two digits where one is to be copied, else the
            numbers from 0 to a tenth (at least 5) above the largest right one; where these go beyond 64, all up to 64 and of the rest those up to
            5 away from a right answer, half and double of each, powers of 2 and of 10, and the last. By logits only.
        max_new_tokens: How many tokens are generated at most. By generation only.
        progress: Whether to show a progress bar.

    Returns:
        The answers.

    Raises:
        ValueError: An argument is not among those allowed, a sequence leaves no room for an answer in the model's context, or the model has
            no tokenizer and text or candidates' ids are needed.

    Example:
        >>> from sd_lens.models.loading import load
        >>> from sd_lens.propagation.probes import probe
        >>> model = load("tiny")
        >>> answers = answer_probes(model, probe(model, "copy-last"), [2, 4, 8])
        >>> answers.candidates, len(answers.rows), answers.rows[0].expected
        ((0, 1), 3, 0)
    """
    require_usable(model)
    probe = as_probe(model, probe)
    if by not in ("logits", "generation"):
        raise ValueError(f"by: got {by!r}; allowed: 'logits', 'generation'")
    ordered = require_lengths(model, probe, lengths)
    members = (False, True) if probe.contrast == "changed" else (False,)
    asked = [(length, sample, member) for length in ordered for sample in range(probe.samples) for member in members]
    expected = [probe.answers(length, sample)[member] for length, sample, member in asked]
    sequences = [probe.pair(length, sample)[member] for length, sample, member in asked]
    chosen: tuple[int, ...] = ()
    if by == "generation":
        if candidates is not None:
            raise ValueError("candidates: got some with by='generation'; allowed: None, or by='logits'")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {max_new_tokens}; allowed: at least 1")
        require_tokenizer(model, "by", by, "'logits'")
        _require_room(model, ordered, sequences, 1)
        rows = _generated(model, probe, asked, expected, sequences, max_new_tokens, progress)
    else:
        tree = candidate_tree(model, probe, candidates, expected)
        _require_room(model, ordered, sequences, max(len(node.ids) for node in tree.inner()))
        found = _scores(model, tree, sequences, progress)
        chosen = tuple(sorted(found[0]))
        rows = [
            Answer(*which, right, max(chosen, key=scores.__getitem__), scores[right])
            for which, right, scores in zip(asked, expected, found, strict=True)
        ]
    return Answers(str(model.cfg.model_name), probe.records(), by, chosen, tuple(rows))


def _require_room(model: Any, lengths: tuple[int, ...], sequences: Sequence[Tensor], room: int) -> None:
    context, longest = getattr(model.cfg, "n_ctx", None), max(len(sequence) for sequence in sequences)
    if context and longest + room > context:
        raise ValueError(
            f"lengths: got {lengths[-1]}, whose longest sequence has {longest} tokens; allowed: sequences of at most {context - room} tokens, "
            "which leaves room for an answer"
        )


def _scores(model: Any, tree: Node, sequences: Sequence[Tensor], progress: bool | None) -> list[dict[int, float]]:
    """The candidates' log-probabilities after every sequence."""
    inner = tree.inner()
    read = sorted({token for node in inner for token in node.branches})
    place = {token: number for number, token in enumerate(read)}
    table = torch.empty(len(sequences), len(inner), len(read), dtype=torch.float64)

    def receive(number: int, _: int, logits: Float[Tensor, "d_vocab"]) -> None:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        table[divmod(number, len(inner))] = wide.log_softmax(-1)[read].double().cpu()

    runs = [torch.cat([sequence, torch.tensor(node.ids, dtype=torch.long)]) for sequence in sequences for node in inner]
    last_tokens(model, runs, [LOGITS], receive, shared=can_share(model), progress=progress, label="answers")
    if bool(table.isnan().any()):
        raise not_finite("the last block")
    return [_probabilities(tree, inner, rows, place) for rows in table]


def _probabilities(tree: Node, inner: list[Node], rows: Tensor, place: dict[int, int]) -> dict[int, float]:
    of = {node.ids: row for node, row in zip(inner, rows, strict=True)}
    return tree.log_probabilities(lambda node: of[node.ids][[place[token] for token in node.branches]])


def _generated(
    model: Any,
    probe: Probe,
    asked: Sequence[_Asked],
    expected: Sequence[int],
    sequences: Sequence[Int[Tensor, "_"]],
    max_new_tokens: int,
    progress: bool | None,
) -> list[Answer]:
    rows = []
    hidden = None if progress is None else not progress
    work = list(zip(asked, expected, sequences, strict=True))
    for which, right, sequence in tqdm(work, desc="answers", unit="text", delay=2.0, disable=hidden, leave=False):
        ids = greedy(model, sequence, max_new_tokens)
        text = str(model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        rows.append(Answer(*which, right, _read(text, probe), text=text))
    return rows


def _read(text: str, probe: Probe) -> int | None:
    if probe.name in DIGITS:
        digits = {probe.texts[probe.symbols[name]].strip(): digit for digit, name in enumerate(("zero", "one"))}
        found = re.search("|".join(map(re.escape, digits)), text)
        return None if found is None else digits[found.group()]
    found = re.search("[0-9]+", text)
    return None if found is None else int(found.group())
