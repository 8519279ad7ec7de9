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
from sd_lens.propagation.answering import answer_probes
from sd_lens.propagation.answers import Answers
from sd_lens.propagation.collapse import collapse_curve
from sd_lens.propagation.consequences import PropagationConsequences, propagation_consequences
from sd_lens.propagation.count_collapse import CountingCollapse, counting_collapse
from sd_lens.propagation.counting import CountingGap, RatioBlindness, counting_gap, ratio_blindness
from sd_lens.propagation.critical import CriticalLength, critical_length
from sd_lens.propagation.curve import CollapseCurve
from sd_lens.propagation.decay import DecayFit
from sd_lens.propagation.mitigations import Mitigations, mitigations
from sd_lens.propagation.overview import Propagation, propagation_overview
from sd_lens.propagation.paths import PathWeights, lazy_walk, path_weights
from sd_lens.propagation.probes import MergedTokensWarning, Probe, probe
from sd_lens.propagation.sensitivity import sensitivity
from sd_lens.propagation.sensitivity_result import Sensitivity
from sd_lens.propagation.softmaxes import (
    SoftmaxVariation,
    alternating_total_variation,
    expected_total_variation,
    softmax_total_variation,
)
from sd_lens.propagation.squashing import squashing_bound
from sd_lens.propagation.squashing_result import BlockConstants, SquashingBound
from sd_lens.propagation.synthetic import SyntheticCollapse, synthetic_collapse
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
    "Answers",
    "AttentionWeights",
    "Attribution",
    "BlockConstants",
    "BlockDirections",
    "BlockMap",
    "BlockWeights",
    "Check",
    "CheckpointState",
    "Coefficients",
    "CollapseCurve",
    "Component",
    "Confirmation",
    "Consequences",
    "CountingCollapse",
    "CountingGap",
    "CriticalLength",
    "DecayFit",
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
    "MergedTokensWarning",
    "Mitigations",
    "MoEWeights",
    "ModelStateWarning",
    "ModelWeights",
    "NormMonitor",
    "NormTrace",
    "NormWeights",
    "PatchSweep",
    "PathWeights",
    "Planted",
    "PostScales",
    "Probe",
    "Propagation",
    "PropagationConsequences",
    "QuantizationStudy",
    "RatioBlindness",
    "Recommendation",
    "RepeatedTokens",
    "ResponseCurve",
    "Sensitivity",
    "Signature",
    "SignatureDistances",
    "SignaturePair",
    "SingularProbe",
    "SingularTriplets",
    "SinkAttention",
    "SoftmaxVariation",
    "SquashingBound",
    "SublayerAttribution",
    "SuperWeight",
    "SuperWeights",
    "SyntheticCollapse",
    "TokenPathways",
    "Trigger",
    "VocabularyScan",
    "acute_angle",
    "alternating_total_variation",
    "amplified",
    "analyse",
    "answer_probes",
    "attribute_norm",
    "attribute_sublayers",
    "attribute_trigger",
    "block_directions",
    "check",
    "collapse_curve",
    "confirm_in_context",
    "consequences",
    "counting_collapse",
    "counting_gap",
    "critical_length",
    "defect_direction",
    "direction_stability",
    "directions_of",
    "eigen_nearest",
    "expected_total_variation",
    "find_defects",
    "head_patterns",
    "lazy_walk",
    "leading_singular",
    "linearize",
    "load",
    "massive_activations",
    "mean_pairwise_angle",
    "measure_inputs",
    "measure_router",
    "mitigations",
    "patch_sweep",
    "path_weights",
    "planted",
    "probe",
    "probe_singular_vectors",
    "propagation_consequences",
    "propagation_overview",
    "quantization_study",
    "ratio_blindness",
    "repeated_tokens",
    "report",
    "response_curve",
    "scan_vocabulary",
    "sensitivity",
    "signature",
    "signature_distances",
    "sink_attention",
    "softmax_total_variation",
    "squashing_bound",
    "super_weights",
    "synthetic_collapse",
    "token_pathways",
    "trace_norms",
    "trigger_direction",
    "weights_of",
]
