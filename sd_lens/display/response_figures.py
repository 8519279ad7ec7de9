"""What an FFN answers to its singular vectors, and how much of them is in tokens."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from sd_lens.display.labels import plotly_text, visible
from sd_lens.display.style import BLUE, GROUP_COLOURS, INK, MUTED, ORANGE, VERMILLION, frame
from sd_lens.interventions.coefficients import Coefficients
from sd_lens.interventions.responses import ResponseCurve, SingularProbe


def response_curve(curve: ResponseCurve) -> go.Figure:
    """Answers of the true FFN over the length of a singular vector, for both signs, beside what its linear map says.

    Args:
        curve: From `response_curve` or `ExplosionSubspace.response_curve`.
    """
    frame_of = curve.to_dataframe().sort_values("scale")
    scales = frame_of["scale"].tolist()
    name = f"v{curve.vector}"
    lines = [
        ("answer", f"true FFN, +c {name}", {"color": VERMILLION, "width": 3}),
        ("opposite", f"true FFN, −c {name}", {"color": BLUE, "width": 2}),
        ("predicted", "linear map, σ c", {"color": INK, "width": 1.5, "dash": "dash"}),
    ]
    traces = [
        go.Scatter(
            x=scales,
            y=frame_of[column].tolist(),
            name=label,
            mode="lines" if len(scales) > 1 else "markers",
            line=line,
            hovertemplate=f"{label}, c = %{{x:.3g}}: %{{y:.4g}}<extra></extra>",
        )
        for column, label, line in lines
        if not frame_of[column].isna().all()
    ]
    power = "" if math.isnan(curve.exponent) else f"; the answer grows with the power {curve.exponent:.2f}"
    return frame(
        traces,
        title=f"Answers of the FFN of block {curve.block} in {curve.model_name}",
        subtitle=f"to the right singular vector {name} at length c; a stream has at most √d = {curve.d_model**0.5:.3g} of it{power}",
        x="c, length along the vector in the normalised stream",
        y="norm of the answer",
    )


def singular_probe(probe: SingularProbe) -> go.Figure:
    """Answers of the true FFN to the first right singular vectors of its map, as bars.

    Args:
        probe: From `probe_singular_vectors` or `ExplosionSubspace.probe_singular_vectors`.
    """
    table = probe.to_dataframe()
    bars = go.Bar(
        x=table["vector"].tolist(),
        y=table["answer"].tolist(),
        marker={"color": ORANGE},
        customdata=table[["sigma", "opposite"]].to_numpy(),
        hovertemplate="vector %{x}: %{y:.4g}, for the other sign %{customdata[1]:.4g}<br>singular value %{customdata[0]:.4g}<extra></extra>",
        showlegend=False,
    )
    figure = frame(
        [bars],
        title=f"Answers of the FFN of block {probe.block} in {probe.model_name}",
        subtitle=f"to right singular vectors as long as a stream, the sign that gives more; line: random directions, mean {probe.random_mean:.3g}",
        x="singular vector, by singular value",
        y="norm of the answer",
    )
    figure.add_hline(y=probe.random_mean, line={"color": INK, "width": 1.2, "dash": "dot"})
    figure.update_xaxes(tickmode="linear", tick0=0, dtick=1 if len(table) <= 26 else 5, showgrid=False)
    return figure


def coefficient_scatter(coefficients: Coefficients) -> go.Figure:
    """Coefficients of tokens on the leading vector, over their positions.

    Args:
        coefficients: From `ExplosionSubspace.coefficients`.
    """
    table = coefficients.to_dataframe()
    traces = []
    for label, rows, colour in (
        ("first token", table[table["pos"] == 0], GROUP_COLOURS["initial"]),
        ("later tokens", table[table["pos"] > 0], MUTED),
    ):
        if len(rows):
            traces.append(
                go.Scattergl(
                    x=rows["pos"].tolist(),
                    y=rows["c0"].tolist(),
                    name=label,
                    mode="markers",
                    marker={"color": colour, "size": 8, "line": {"width": 0.5, "color": "white"}},
                    customdata=[[plotly_text(visible(row.token), 40), row.prompt] for row in rows.itertuples()],
                    hovertemplate="%{customdata[0]} (prompt %{customdata[1]}, position %{x}): %{y:.3g}<extra></extra>",
                )
            )
    where = "what the FFN reads" if coefficients.side == "trigger" else "the stream after the block"
    vector = "right" if coefficients.side == "trigger" else "left"
    return frame(
        traces,
        title=f"How much of the explosion subspace is in each token of {coefficients.model_name}",
        subtitle=f"coefficient of {where} of block {coefficients.block} on its leading {vector} singular vector",
        x="position",
        y="coefficient",
    )
