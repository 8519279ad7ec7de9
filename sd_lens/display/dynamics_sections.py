"""Training dynamics as a section of a page, and as a page of their own."""

from __future__ import annotations

from markupsafe import Markup

from sd_lens.applications.stability import SETTLED_DEG, DirectionStability
from sd_lens.display.dynamics_figures import direction_stability
from sd_lens.display.fragments import figure, joined, paragraph, table
from sd_lens.display.labels import number
from sd_lens.display.pages import Section, page, reading

_COLUMNS = {
    "checkpoint": "checkpoint",
    "step": "step",
    "found": "explosion",
    "blocks": "in block",
    "max_ratio": "largest ratio",
    "n_high": "high-norm tokens",
    "n_same": "of them followed",
    "norm": "norm",
    "ratio": "its ratio",
    "angle_to_last_deg": "° to the last",
    "angle_to_previous_deg": "° to the previous",
    "others_angle_to_last_deg": "others’ ° to the last",
    "own_angle_to_last_deg": "its own ° to the last",
}


def dynamics_section(found: DirectionStability) -> Markup:
    """Figure and table of a defect direction over training.

    Args:
        found: From `direction_stability`.
    """
    followed = (
        f"Followed are the high-norm tokens of {found.model_name}, the last checkpoint, at the blocks after which their norm is high there: in every checkpoint "
        f"the mean of these {found.n_vectors} residual vectors is taken. Its angles to the last and to the previous checkpoint go from 0° to 180°, as a mean has a sign. "
        "Beside it, the mean of all other tokens at the same blocks says how far the stream as a whole moved; “its own” is the defect direction of "
        "whatever tokens have a high norm in that checkpoint."
        if found.n_vectors
        else "The last checkpoint has no high-norm token, so that there is no direction to follow; the ratios are those of each checkpoint’s largest norm."
    )
    frame = found.to_dataframe()
    shown = frame.assign(
        checkpoint=[state.label for state in found.states],
        step=["–" if state.step is None else f"{state.step:,}" for state in found.states],
        found=["yes" if state.found else "no" for state in found.states],
        blocks=[", ".join(map(str, state.explosion_blocks)) or "–" for state in found.states],
    )
    columns = {name: title for name, title in _COLUMNS.items() if not shown[name].isna().all()}
    if all(state.step is None for state in found.states):
        del columns["step"]
    formats = {name: ".1f" for name in columns if name.endswith("_deg") or name in ("max_ratio", "ratio")}
    return joined(
        [paragraph(followed), figure(direction_stability(found), "dynamics", min_width=680), table(shown, columns, formats=formats)]
    )


def render_dynamics(found: DirectionStability) -> str:
    """Training dynamics as one HTML page.

    Args:
        found: From `direction_stability`.
    """
    emergence, settled = found.emergence, found.settled
    facts = [
        ("checkpoints", str(len(found.states))),
        ("blocks", str(found.n_blocks)),
        ("d_model", str(found.d_model)),
        ("prompts", str(found.n_prompts)),
        ("emergence", "none" if emergence is None else emergence.name),
        (f"within {SETTLED_DEG:g}° from", "–" if settled is None else settled.name),
        ("largest ratio at last", number(found.states[-1].max_ratio, 3)),
    ]
    built = [
        Section("dynamics", "Over training", dynamics_section(found)),
        Section("how-to-read", "How to read this", reading(found=found.n_vectors > 0)),
    ]
    return page(found.model_name, found.sentences(), facts, built, found=emergence is not None)
