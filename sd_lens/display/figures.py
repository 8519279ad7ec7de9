"""Plotly figures of every result."""

from sd_lens.display.attribution_figures import attribution_bars, attribution_groups
from sd_lens.display.census_figures import massive_activations_figure, super_weight_bars
from sd_lens.display.collapse_figures import collapse_lines, mitigation_lines
from sd_lens.display.dynamics_figures import direction_stability
from sd_lens.display.intervention_figures import consequence_panels
from sd_lens.display.lineage_figures import lineage_map
from sd_lens.display.map_figures import direction_angles, eigenvalues, singular_values
from sd_lens.display.norm_figures import norm_heatmap, norm_lines
from sd_lens.display.patch_figures import patch_heatmap
from sd_lens.display.pathway_figures import pathway_table_figure
from sd_lens.display.propagation_figures import answer_curves, propagation_panels
from sd_lens.display.quantization_figures import quantization_bars
from sd_lens.display.quantization_range_figures import quantization_ranges
from sd_lens.display.response_figures import coefficient_scatter, response_curve, singular_probe
from sd_lens.display.scan_figures import scan_pathways, scan_scatter
from sd_lens.display.sensitivity_figures import sensitivity_figure
from sd_lens.display.sink_figures import repetition_curves, sink_heatmap
from sd_lens.display.squashing_figures import squashing_heatmap
from sd_lens.display.sublayer_figures import sublayer_bars
from sd_lens.display.theory_figures import counting_collapse, ratio_blindness, softmax_variation, synthetic_collapse

__all__ = [
    "answer_curves",
    "attribution_bars",
    "attribution_groups",
    "coefficient_scatter",
    "collapse_lines",
    "consequence_panels",
    "counting_collapse",
    "direction_angles",
    "direction_stability",
    "eigenvalues",
    "lineage_map",
    "massive_activations_figure",
    "mitigation_lines",
    "norm_heatmap",
    "norm_lines",
    "patch_heatmap",
    "pathway_table_figure",
    "propagation_panels",
    "quantization_bars",
    "quantization_ranges",
    "ratio_blindness",
    "repetition_curves",
    "response_curve",
    "scan_pathways",
    "scan_scatter",
    "sensitivity_figure",
    "singular_probe",
    "singular_values",
    "sink_heatmap",
    "softmax_variation",
    "squashing_heatmap",
    "sublayer_bars",
    "super_weight_bars",
    "synthetic_collapse",
]
