"""Machine-readable signatures and the angles between them."""

from __future__ import annotations

from sd_lens.applications.distances import SignatureDistances, SignaturePair
from sd_lens.applications.signature import Signature
from sd_lens.applications.trees import LineageTree
from sd_lens.display.header import Record, header, plain


def signature_record(signature: Signature) -> Record:
    """One signature, without its vector, which `Signature.save` keeps.

    Args:
        signature: From `signature`.
    """
    chance = signature.chance if signature.d_model > 1 else None
    return header("signature", signature.model_name, signature.d_model, signature.n_blocks) | {
        "found": signature.found,
        "method": signature.method,
        "block": signature.block,
        "because": signature.because,
        "prompts": signature.prompts,
        "n_prompts": signature.n_prompts,
        "n_tokens": signature.n_tokens,
        "tokens": list(signature.tokens),
        "positions": signature.positions,
        "spread_deg": signature.spread_deg,
        "gap": None if signature.gap is None else plain(signature.gap),
        "chance_deg": None if chance is None else {"mean": chance.mean_deg, "std": chance.std_deg},
        "largest": [{"coordinate": index, "value": value} for index, value in signature.largest()],
        "content_hash": signature.content_hash,
        "made_by": signature.version,
        "notes": list(signature.notes),
    }


def distances_record(distances: SignatureDistances) -> Record:
    """All angles, verdicts and trees; ``model`` is null, as there are several.

    Args:
        distances: From `signature_distances`.
    """
    widths = {one.d_model for one in distances.signatures}
    return header("signature_distances", "", widths.pop() if len(widths) == 1 else None, None) | {
        "model": None,
        "sentences": list(distances.sentences()),
        "models": [signature_record(one) | {"name": name} for name, one in zip(distances.names, distances.signatures, strict=True)],
        "distances_deg": [[plain(angle) for angle in row] for row in distances.angles.tolist()],
        "chance_deg": [
            {
                "d_model": width,
                "mean": chance.mean_deg,
                "std": chance.std_deg,
                "same": chance.same_deg,
                "unrelated": chance.unrelated_deg,
            }
            for width, chance in sorted({one.d_model: one.chance for one in distances.signatures if one.d_model > 1}.items())
        ],
        "verdicts": [_pair(pair) for pair in distances.pairs],
        "families": [list(family) for family in distances.families],
        "trees": [_tree(tree, distances.names) for tree in distances.trees],
        "notes": list(distances.notes),
    }


def _pair(pair: SignaturePair) -> Record:
    return {
        "a": pair.a,
        "b": pair.b,
        "angle_deg": plain(pair.angle_deg),
        "verdict": pair.verdict,
        "because": pair.because,
        "chance_mean_deg": plain(pair.chance_mean_deg),
        "chance_std_deg": plain(pair.chance_std_deg),
        "probability": plain(pair.probability),
        "note": pair.note,
    }


def _tree(tree: LineageTree, names: tuple[str, ...]) -> Record:
    return {
        "leaves": [names[member] for member in tree.members],
        "merges": [
            {"left": int(left), "right": int(right), "angle_deg": angle, "n": int(n)}
            for left, right, angle, n in tree.merges.tolist()
        ],
        "order": [names[member] for member in tree.order],
    }
