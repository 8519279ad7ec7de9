"""sd_lens: find, explain and edit the high-norm tokens of language models, on TransformerLens.

Ten lines to begin with::

    import sd_lens

    model = sd_lens.load("tiny")
    trace = sd_lens.trace_norms(model, ["The cat sat.", "On the mat."])
    defects = sd_lens.find_defects(trace)
    table = sd_lens.block_directions(model)
"""

from sd_lens.applications.distances import SignatureDistances, SignaturePair
from sd_lens.applications.dynamics import direction_stability
from sd_lens.applications.lineage import signature_distances
from sd_lens.applications.quantization import quantization_study
from sd_lens.applications.quantization_result import QuantizationStudy, Recommendation
from sd_lens.applications.signature import Signature
from sd_lens.applications.signing import signature
from sd_lens.applications.stability import CheckpointState, DirectionStability
from sd_lens.findings import Findings, analyse
from sd_lens.interventions.coefficients import Coefficients
from sd_lens.interventions.consequences import Consequences, consequences
from sd_lens.interventions.intervention import Intervention
from sd_lens.interventions.patching import patch_sweep
from sd_lens.interventions.responses import ResponseCurve, SingularProbe, probe_singular_vectors, response_curve
from sd_lens.interventions.subspace import ExplosionSubspace
from sd_lens.interventions.sweep import PatchSweep
from sd_lens.linear.angles import acute_angle, mean_pairwise_angle
from sd_lens.linear.blocks import BlockMap
from sd_lens.linear.directions import BlockDirections, directions_of
from sd_lens.linear.inputs import GaussianInput
from sd_lens.linear.linearize import PostScales, linearize
from sd_lens.linear.maps import DenseMap, LinearMap
from sd_lens.linear.measured import measure_inputs, measure_router
from sd_lens.linear.spectra import Eigenpair, SingularTriplets, eigen_nearest, leading_singular
from sd_lens.linear.trigger import Trigger, trigger_direction
from sd_lens.models.amplified import Amplified, amplified
from sd_lens.models.check import Check, check
from sd_lens.models.loading import ModelStateWarning, load, weights_of
from sd_lens.models.planted import Planted, planted
from sd_lens.models.weights import AttentionWeights, BlockWeights, FFNWeights, ModelWeights, MoEWeights, NormWeights
from sd_lens.reporting import report
from sd_lens.spectrum import block_directions
from sd_lens.tracing.attribution import attribute_norm, attribute_trigger
from sd_lens.tracing.census import MassiveActivations, massive_activations
from sd_lens.tracing.components import Component
from sd_lens.tracing.confirmation import Confirmation, confirm_in_context
from sd_lens.tracing.defects import Defects, HighNormToken, defect_direction, find_defects
from sd_lens.tracing.delimiters import TokenPathways, token_pathways
from sd_lens.tracing.direction import DefectDirection
from sd_lens.tracing.monitor import NormMonitor
from sd_lens.tracing.norms import trace_norms
from sd_lens.tracing.pathways import scan_vocabulary
from sd_lens.tracing.patterns import HeadPatterns, head_patterns
from sd_lens.tracing.repetition import RepeatedTokens, repeated_tokens
from sd_lens.tracing.shares import Attribution
from sd_lens.tracing.sinks import SinkAttention, sink_attention
from sd_lens.tracing.sublayers import SublayerAttribution, attribute_sublayers
from sd_lens.tracing.super_weights import SuperWeight, SuperWeights, super_weights
from sd_lens.tracing.trace import NormTrace
from sd_lens.tracing.vocabulary_scan import VocabularyScan

__version__ = "0.1.0"

__all__ = [
    "Amplified",
    "AttentionWeights",
    "Attribution",
    "BlockDirections",
    "BlockMap",
    "BlockWeights",
    "Check",
    "CheckpointState",
    "Coefficients",
    "Component",
    "Confirmation",
    "Consequences",
    "DefectDirection",
    "Defects",
    "DenseMap",
    "DirectionStability",
    "Eigenpair",
    "ExplosionSubspace",
    "FFNWeights",
    "Findings",
    "GaussianInput",
    "HeadPatterns",
    "HighNormToken",
    "Intervention",
    "LinearMap",
    "MassiveActivations",
    "MoEWeights",
    "ModelStateWarning",
    "ModelWeights",
    "NormMonitor",
    "NormTrace",
    "NormWeights",
    "PatchSweep",
    "Planted",
    "PostScales",
    "QuantizationStudy",
    "Recommendation",
    "RepeatedTokens",
    "ResponseCurve",
    "Signature",
    "SignatureDistances",
    "SignaturePair",
    "SingularProbe",
    "SingularTriplets",
    "SinkAttention",
    "SublayerAttribution",
    "SuperWeight",
    "SuperWeights",
    "TokenPathways",
    "Trigger",
    "VocabularyScan",
    "acute_angle",
    "amplified",
    "analyse",
    "attribute_norm",
    "attribute_sublayers",
    "attribute_trigger",
    "block_directions",
    "check",
    "confirm_in_context",
    "consequences",
    "defect_direction",
    "direction_stability",
    "directions_of",
    "eigen_nearest",
    "find_defects",
    "head_patterns",
    "leading_singular",
    "linearize",
    "load",
    "massive_activations",
    "mean_pairwise_angle",
    "measure_inputs",
    "measure_router",
    "patch_sweep",
    "planted",
    "probe_singular_vectors",
    "quantization_study",
    "repeated_tokens",
    "report",
    "response_curve",
    "scan_vocabulary",
    "signature",
    "signature_distances",
    "sink_attention",
    "super_weights",
    "token_pathways",
    "trace_norms",
    "trigger_direction",
    "weights_of",
]
