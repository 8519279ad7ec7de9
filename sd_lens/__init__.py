"""sd_lens: find, explain and edit the high-norm tokens of language models, on TransformerLens.

Ten lines to begin with::

    import sd_lens

    model = sd_lens.load("tiny")
    trace = sd_lens.trace_norms(model, ["The cat sat.", "On the mat."])
    defects = sd_lens.find_defects(trace)
    table = sd_lens.block_directions(model)
"""

from sd_lens.findings import Findings, analyse
from sd_lens.linear.angles import acute_angle, mean_pairwise_angle
from sd_lens.linear.blocks import BlockMap
from sd_lens.linear.directions import BlockDirections, directions_of
from sd_lens.linear.inputs import GaussianInput
from sd_lens.linear.linearize import PostScales, linearize
from sd_lens.linear.maps import DenseMap, LinearMap
from sd_lens.linear.measured import measure_inputs, measure_router
from sd_lens.linear.spectra import Eigenpair, SingularTriplets, eigen_nearest, leading_singular
from sd_lens.linear.trigger import Trigger, trigger_direction
from sd_lens.models.check import Check, check
from sd_lens.models.loading import ModelStateWarning, load, weights_of
from sd_lens.models.planted import Planted, planted
from sd_lens.models.weights import AttentionWeights, BlockWeights, FFNWeights, ModelWeights, MoEWeights, NormWeights
from sd_lens.reporting import report
from sd_lens.spectrum import block_directions
from sd_lens.tracing.attribution import attribute_norm, attribute_trigger
from sd_lens.tracing.components import Component
from sd_lens.tracing.defects import Defects, HighNormToken, defect_direction, find_defects
from sd_lens.tracing.direction import DefectDirection
from sd_lens.tracing.monitor import NormMonitor
from sd_lens.tracing.norms import trace_norms
from sd_lens.tracing.shares import Attribution
from sd_lens.tracing.sublayers import SublayerAttribution, attribute_sublayers
from sd_lens.tracing.trace import NormTrace

__version__ = "0.1.0"

__all__ = [
    "AttentionWeights",
    "Attribution",
    "BlockDirections",
    "BlockMap",
    "BlockWeights",
    "Check",
    "Component",
    "DefectDirection",
    "Defects",
    "DenseMap",
    "Eigenpair",
    "FFNWeights",
    "Findings",
    "GaussianInput",
    "HighNormToken",
    "LinearMap",
    "MoEWeights",
    "ModelStateWarning",
    "ModelWeights",
    "NormMonitor",
    "NormTrace",
    "NormWeights",
    "Planted",
    "PostScales",
    "SingularTriplets",
    "SublayerAttribution",
    "Trigger",
    "acute_angle",
    "analyse",
    "attribute_norm",
    "attribute_sublayers",
    "attribute_trigger",
    "block_directions",
    "check",
    "defect_direction",
    "directions_of",
    "eigen_nearest",
    "find_defects",
    "leading_singular",
    "linearize",
    "load",
    "mean_pairwise_angle",
    "measure_inputs",
    "measure_router",
    "planted",
    "report",
    "trace_norms",
    "trigger_direction",
    "weights_of",
]
