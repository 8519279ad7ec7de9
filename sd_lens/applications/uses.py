"""What the findings are good for, in one call: the model's signature, and what a quantiser must spare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sd_lens.anatomy import attempt
from sd_lens.applications.perplexity import require_text
from sd_lens.applications.quantization import quantization_study
from sd_lens.applications.quantization_result import QuantizationStudy
from sd_lens.applications.signature import Signature
from sd_lens.applications.signing import signature_of
from sd_lens.applications.texts import default_text
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.tracing.defects import Defects

MEASURED = 2048
"""Perplexities in one go are those of so many of the text's first tokens; ``sd-lens quantize`` reads it all."""


@dataclass(frozen=True)
class Uses:
    """Signature and quantisation study.

    Attributes:
        signature: The model's signature, by activations.
        quantization: Perplexities in eight bits with and without the explosion and decay blocks' down-projections; None where there is
            nothing to spare, or the model has no projections or no text to read.
        missing: Why something was left out, by name.
    """

    signature: Signature
    quantization: QuantizationStudy | None
    missing: Mapping[str, str]

    def sentences(self) -> tuple[str, ...]:
        """What was found, one sentence each."""
        return () if self.quantization is None else self.quantization.sentences()

    def __repr__(self) -> str:
        return f"Uses({self.signature!r}, {self.quantization!r})"


def uses(
    model: TransformerLensModel, defects: Defects, *, prompts: str = "given", batch_tokens: int = 4096, progress: bool | None = None
) -> Uses:
    """The signature of a model, and a short quantisation study of it.

    Args:
        model: A TransformerLens model.
        defects: What was found in it.
        prompts: What it was traced on, for the signature's record: ``"given"`` or ``"built-in"``.
        batch_tokens: Largest number of tokens run at once.
        progress: Whether to show progress bars.

    Returns:
        Both.
    """
    missing: dict[str, str] = {}

    def study() -> QuantizationStudy:
        ids = require_text(model, default_text())[:MEASURED]
        return quantization_study(
            model, ids, each_block=False, recommend=None, defects=defects, batch_tokens=batch_tokens, progress=progress
        )

    quantization = attempt("quantize", missing, study, defects.found)
    return Uses(signature_of(defects, prompts=prompts), quantization, missing)
