"""Do the ids that explode in a scan also explode in a text?

A scan puts every id where no text has it: alone, or without attention. What it finds are candidates; whether they explode in practice is
seen by putting each at the end of a short neutral text and running the model as it is, beside as many ids of median norm in the scan.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from sd_lens.models.embeddings import embedding_norms, trained_ids
from sd_lens.models.loading import require_usable
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import decode_each, tokenize
from sd_lens.tracing.alone import Alone
from sd_lens.tracing.vocabulary_scan import VocabularyScan

PREFIX = "The weather was mild and the"
"""What the candidates come after, unless another text is given."""

# How many random ids stand for that text in a model without tokenizer.
_RANDOM_PREFIX = 6


@dataclass(frozen=True)
class Confirmation:
    """Candidates of a scan, and control ids, at the end of a text.

    Attributes:
        model_name: The model.
        pathway: Of the scan.
        block: The block after which norms are taken, the scan's.
        prefix: Token ids that each comes after.
        prefix_text: The same as text.
        rows: One row per id: group ("candidate" or "control"), id, token, scan_norm, scan_ratio, norm, ratio, explodes. The ratios are
            to the scan's reference.
        min_ratio: Least ratio of an id that explodes, the scan's.
    """

    model_name: str
    pathway: str
    block: int
    prefix: Int[Tensor, "pos"]
    prefix_text: str
    rows: pd.DataFrame
    min_ratio: float

    @property
    def confirmed(self) -> pd.DataFrame:
        """The candidates that explode in the text."""
        return self.rows.loc[(self.rows.group == "candidate") & self.rows.explodes]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per id, candidates first, in the scan's order."""
        return self.rows.copy()

    def __repr__(self) -> str:
        counts = [
            f"{int(members.explodes.sum())} of {len(members)} {name}"
            for group, name in (("candidate", "candidates"), ("control", "control ids"))
            if len(members := self.rows[self.rows.group == group])
        ]
        return f"Confirmation({self.model_name}, {self.pathway}: {' and '.join(counts)} explode after {self.prefix_text!r})"

    def _repr_html_(self) -> str:
        return self.rows.to_html(index=False)


def confirm_in_context(
    model: TransformerLensModel,
    scan: VocabularyScan,
    *,
    k: int = 10,
    prefix: str | Int[Tensor, "pos"] | None = None,
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
    progress: bool | None = None,
) -> Confirmation:
    """Runs the first ids of a scan at the end of a text, through the model as it is.

    Beside them run as many control ids, those about the median norm in the scan.

    Args:
        model: The model that was scanned.
        scan: The scan.
        k: How many candidates: the trained ids with the largest norms.
        prefix: What they come after: a string or token ids; default: a few neutral words, or random trained ids, none of them among the
            candidates, for a model without tokenizer.
        prepend_bos: Passed to the tokenisation of a string; None is the model's default.
        batch_tokens: Largest number of tokens run at once.
        seed: Seeds those random ids.
        progress: Whether to show a progress bar.

    Returns:
        A table of the candidates and the control ids, with their norms in the scan and in the text.

    Raises:
        ValueError: The model is not the one scanned, ``k`` is below 1, no trained id was scanned, or the prefix is unusable.

    Example:
        >>> from sd_lens.models.loading import load
        >>> from sd_lens.tracing.pathways import scan_vocabulary
        >>> model = load("tiny")
        >>> confirm_in_context(model, scan_vocabulary(model, "no_attention", control=0), k=3)
        Confirmation(tiny, no_attention: 1 of 3 candidates and 0 of 3 control ids explode after '<s>The weather was mild and the')
    """
    require_usable(model)
    _require_scanned(model, scan)
    if k < 1:
        raise ValueError(f"k: got {k}; allowed: at least 1")
    trained = scan.trained.nonzero().flatten()
    if len(trained) == 0:
        raise ValueError("scan: none of its ids was trained; allowed: a scan of at least one trained id")
    order = trained[scan.norms[trained].argsort(descending=True, stable=True)]
    first, rest = order[:k], order[k:]
    begin = max(0, min(len(order) // 2 - k // 2 - len(first), len(rest) - k))
    places = torch.cat([first, rest[begin : begin + k]])
    ids = scan.ids[places]
    try:
        before = _prefix(model, prefix, ids, prepend_bos=prepend_bos, seed=seed)
        sequences = torch.cat([before.expand(len(ids), -1), ids.unsqueeze(1)], dim=1)
        tokenize(model, [sequences[0]])  # says so if it does not fit into the context
    except ValueError as error:
        raise ValueError(f"prefix: {str(error).removeprefix('prompts: ')}") from None
    alone = Alone(model, batch_tokens=batch_tokens, progress=progress)
    norms = alone.norms(sequences, [scan.block], label="in context")[0, :, -1]
    rows = pd.DataFrame(
        {
            "group": ["candidate"] * len(first) + ["control"] * (len(ids) - len(first)),
            "id": ids.numpy(),
            "token": scan.texts(ids.tolist()),
            "scan_norm": scan.norms[places].numpy(),
            "scan_ratio": scan.ratios[places].numpy(),
            "norm": norms.numpy(),
            "ratio": (norms / scan.reference).numpy(),
            "explodes": (norms / scan.reference >= scan.min_ratio).numpy(),
        }
    )
    return Confirmation(
        model_name=scan.model_name,
        pathway=scan.pathway,
        block=scan.block,
        prefix=before,
        prefix_text="".join(decode_each(model, before.tolist())),
        rows=rows,
        min_ratio=scan.min_ratio,
    )


def _require_scanned(model: TransformerLensModel, scan: VocabularyScan) -> None:
    name = str(getattr(model.cfg, "model_name", "model"))
    if name != scan.model_name or scan.block >= model.cfg.n_layers or int(scan.ids.max()) >= model.cfg.d_vocab:
        raise ValueError(
            f"model: got {name} of {model.cfg.n_layers} blocks and {model.cfg.d_vocab} ids; allowed: the model that was scanned "
            f"({scan.model_name}, up to block {scan.block}, ids up to {int(scan.ids.max())})"
        )


def _prefix(
    model: TransformerLensModel, prefix: str | Tensor | None, ids: Tensor, *, prepend_bos: bool | None, seed: int
) -> Int[Tensor, "pos"]:
    if isinstance(prefix, Tensor):
        if prefix.ndim != 1:
            raise ValueError(f"got shape {tuple(prefix.shape)}; allowed: one text, or its token ids in one dimension")
        return tokenize(model, [prefix])[0]
    if prefix is not None or getattr(model, "tokenizer", None) is not None:
        return tokenize(model, PREFIX if prefix is None else prefix, prepend_bos=prepend_bos)[0]
    allowed = trained_ids(embedding_norms(model))
    allowed[ids] = False
    rest = allowed.nonzero().flatten()
    if len(rest) == 0:
        raise ValueError("got none, and all ids are candidates; allowed: token ids")
    generator = torch.Generator().manual_seed(seed)
    return rest[torch.randperm(len(rest), generator=generator)[:_RANDOM_PREFIX]]
