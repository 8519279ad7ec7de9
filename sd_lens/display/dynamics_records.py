"""Machine-readable results of training dynamics."""

from __future__ import annotations

from sd_lens.applications.stability import CheckpointState, DirectionStability
from sd_lens.display.header import Record, header, plain


def dynamics_record(found: DirectionStability) -> Record:
    """A defect direction over the checkpoints of a training run.

    Args:
        found: From `direction_stability`.
    """
    mean, spread = found.chance_deg
    return header("dynamics", found.model_name, found.d_model, found.n_blocks) | {
        "sentences": list(found.sentences()),
        "found": found.emergence is not None,
        "emergence": None if found.emergence is None else {"label": found.emergence.label, "step": found.emergence.step},
        "settled": None if found.settled is None else {"label": found.settled.label, "step": found.settled.step},
        "n_prompts": found.n_prompts,
        "n_tokens": found.n_tokens,
        "n_vectors": found.n_vectors,
        "min_ratio": found.min_ratio,
        "chance_deg": {"mean": mean, "std": spread},
        "checkpoints": [_row(state) for state in found.states],
    }


def _row(state: CheckpointState) -> Record:
    row = dict(vars(state)) | {"explosion_blocks": list(state.explosion_blocks)}
    return {name: plain(value) if isinstance(value, float) else value for name, value in row.items()}
