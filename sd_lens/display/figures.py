"""Plotly figures of every result."""

from sd_lens.display.map_figures import direction_angles, eigenvalues, singular_values
from sd_lens.display.norm_figures import norm_heatmap, norm_lines
from sd_lens.display.sublayer_figures import sublayer_bars

__all__ = ["direction_angles", "eigenvalues", "norm_heatmap", "norm_lines", "singular_values", "sublayer_bars"]
