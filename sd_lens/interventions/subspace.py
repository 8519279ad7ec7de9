"""The explosion subspace of a block, and what can be done with it in a forward pass.

Wang et al. (ICML 2025, arXiv 2502.07004), section 4.2: the span of the leading right singular vectors of the explosion block's FFN is
what sets the explosion off; the leading left ones are where the norm goes.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sd_lens.interventions import coefficients as _coefficients
from sd_lens.interventions.changes import Change, constant, from_source, scaled
from sd_lens.interventions.coefficients import Coefficients
from sd_lens.interventions.intervention import Edit, Intervention
from sd_lens.interventions.positions import Positions, ids_of, require_positions
from sd_lens.interventions.references import is_cache, mean_coefficients, source_coefficients, unknown_tokens
from sd_lens.interventions.sites import Side, Site, direction_site, require_side, trigger_site
from sd_lens.interventions.vectors import require_orthonormal, triplets_of
from sd_lens.linear.linearize import linearize
from sd_lens.linear.maps import LinearMap
from sd_lens.linear.spectra import SingularTriplets
from sd_lens.models.labelled import holds_none, read_labelled, write_labelled
from sd_lens.models.loading import require_usable, weights_of
from sd_lens.models.protocol import TransformerLensModel
from sd_lens.models.tokens import Prompts
from sd_lens.models.weights import BlockWeights
from sd_lens.tracing.arguments import require_block
from sd_lens.tracing.defects import Defects, find_defects
from sd_lens.tracing.source import Source, source_of
from sd_lens.tracing.trace import CacheLike

if TYPE_CHECKING:
    from sd_lens.interventions.responses import ResponseCurve, SingularProbe


@dataclass(frozen=True, eq=False)
class ExplosionSubspace:
    """Leading singular vectors of one block's FFN, tied to a model.

    Attributes:
        model: The model; nothing is attached to it.
        block: The block.
        right: Right singular vectors in columns: what sets the FFN off, in the normalised stream before the norm's gain, with the signs that
            the true FFN answers to. Float32, CPU.
        left: Left singular vectors in columns: where it writes, in the residual stream.
        sigma: Singular values.
        delimiters: Token ids that ``positions="delimiters"`` means.

    Example:
        >>> from sd_lens.models.loading import load
        >>> model = load("tiny")
        >>> subspace = ExplosionSubspace.at(model, 2)
        >>> subspace
        ExplosionSubspace(tiny, block 2, rank 1, sigma 4.57)
        >>> logits = model.run_with_hooks("Once upon a time", fwd_hooks=subspace.ablate().fwd_hooks())
    """

    model: TransformerLensModel = field(repr=False)
    block: int
    right: Float[Tensor, "d_model rank"]
    left: Float[Tensor, "d_model rank"]
    sigma: Float[Tensor, "rank"]
    delimiters: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_usable(self.model)
        require_block(self.block, int(self.model.cfg.n_layers))
        if self.sigma.ndim != 1:
            raise ValueError(f"sigma: got shape {tuple(self.sigma.shape)}; allowed: one singular value per vector")
        for name, vectors in (("right", self.right), ("left", self.left)):
            require_orthonormal(name, vectors, int(self.model.cfg.d_model), len(self.sigma))
        last = int(self.model.cfg.d_vocab) - 1
        for token in self.delimiters:
            if not 0 <= token <= last:
                raise ValueError(f"delimiters: got {token}; allowed: 0 to {last}, the vocabulary")

    @classmethod
    def at(
        cls,
        model: TransformerLensModel,
        block: int | None = None,
        *,
        rank: int = 1,
        defects: Defects | None = None,
        delimiters: Sequence[int] = (),
        **options: Any,
    ) -> ExplosionSubspace:
        """The subspace of a block's FFN.

        Args:
            model: A TransformerLens model.
            block: The block; default: the explosion block that adds most, of ``defects``.
            rank: How many singular vectors.
            defects: What `find_defects` found; default, where no block is given: what it finds in the built-in texts. Its high-norm tokens
                after the first of their prompt are the delimiters.
            delimiters: Token ids of more delimiters.
            **options: Passed on to `linearize` (``inputs``, ``estimator``, ...).

        Raises:
            ValueError: The model, block or rank is unusable, the block cannot be linearised, or no block is given and none explodes.
        """
        require_usable(model)
        if defects is not None and not isinstance(defects, Defects):
            raise ValueError(f"defects: got {type(defects).__name__}; allowed: what find_defects found, or None")
        delimiters = ids_of(delimiters)
        if block is None:
            defects = find_defects(source_of(model, None, may_need=()).trace()) if defects is None else defects
            if defects.main_block is None:
                raise ValueError(f"block: got none, and no block explodes ({defects}); allowed: 0 to {int(model.cfg.n_layers) - 1}")
            block = defects.main_block
        require_block(block, int(model.cfg.n_layers))
        later = [] if defects is None else [token.id for token in defects.tokens if token.pos > 0]
        linear_map = linearize(weights_of(model)[block], **options).ffn
        return cls.from_map(model, block, linear_map, rank=rank, delimiters=[*later, *delimiters])

    @classmethod
    def from_map(
        cls,
        model: TransformerLensModel,
        block: int,
        linear_map: LinearMap | SingularTriplets | Float[Tensor, "d_model d_model"],
        *,
        rank: int = 1,
        delimiters: Sequence[int] = (),
    ) -> ExplosionSubspace:
        """The subspace of a map from the normalised stream that a block's FFN reads to the stream that it writes to.

        Args:
            model: A TransformerLens model.
            block: The block whose FFN the map stands for.
            linear_map: The map, such as ``linearize(...).ffn``, its matrix, or its singular triplets.
            rank: How many singular vectors.
            delimiters: Token ids of delimiters.

        Raises:
            ValueError: The model, block or rank is unusable, or the map has another width.
        """
        require_usable(model)
        require_block(block, int(model.cfg.n_layers))
        left, sigma, right = triplets_of(weights_of(model)[block], linear_map, rank)
        return cls(model, block, right, left, sigma, ids_of(delimiters))

    @property
    def rank(self) -> int:
        """How many singular vectors span it."""
        return len(self.sigma)

    @property
    def weights(self) -> BlockWeights:
        """The block's weights: views of the model's own."""
        return weights_of(self.model)[self.block]

    def sites(self, side: Side = "trigger") -> list[Site]:
        """Where the subspace is read and written.

        Args:
            side: ``"trigger"``: right vectors in what the FFN reads; ``"direction"``: left ones in the stream that the block leaves; or
                ``"both"``.

        Raises:
            ValueError: There is no such side, or the model has no hook point for it.
        """
        require_side(side)
        chosen = [] if side == "direction" else [trigger_site(self.model, self.weights, self.right)]
        return chosen if side == "trigger" else [*chosen, direction_site(self.block, self.left)]

    def coefficients(
        self,
        prompts: Prompts | CacheLike | Source | None = None,
        *,
        side: Side = "trigger",
        cache: CacheLike | None = None,
        mask: Bool[Tensor, "batch pos"] | None = None,
        prepend_bos: bool | None = None,
        batch_tokens: int = 4096,
        progress: bool | None = None,
    ) -> Coefficients:
        """How much of the subspace is in every token.

        Args:
            prompts: Strings or token ids; default: the built-in texts. With ``cache``, the token ids it was run on. Or a cache by itself: its
                tokens are then unknown, ids −1 in the result.
            side: ``"trigger"`` or ``"direction"``.
            cache: An `ActivationCache` of these tokens, with what adds up to the stream that the FFN reads, or with the stream after the
                block.
            mask: True at real tokens of a cache, False at padding; default: what `trace_norms` takes for padding.
            prepend_bos: Passed to the tokenisation of strings; None is the model's default.
            batch_tokens: Largest number of tokens run at once.
            progress: Whether to show progress bars.

        Raises:
            ValueError: The prompts are unusable, the cache lacks hook points, or the side is not one of the two.
        """
        require_side(side, ("trigger", "direction"))
        weights = self.weights
        given: Any = prompts
        if cache is None and is_cache(given):
            given, cache = unknown_tokens(given), given
        source = source_of(
            self.model,
            given,
            may_need=_coefficients.points_of(weights, side),
            cache=cache,
            mask=mask,
            prepend_bos=prepend_bos,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        return _coefficients.measure(source, weights, self.right if side == "trigger" else self.left, side)

    def ablate(
        self,
        *,
        mean: Prompts | Float[Tensor, "rank"] | float | None = None,
        side: Side = "trigger",
        positions: Positions = "all",
    ) -> Intervention:
        """Takes the subspace out of activations.

        Args:
            mean: None to set coefficients to zero. For mean ablation: reference prompts, over all tokens of which they are averaged, or
                the coefficients themselves.
            side: ``"trigger"``: in what the FFN reads; ``"direction"``: in the stream that the block leaves; ``"both"``.
            positions: Which tokens: ``"all"``, ``"initial"``, ``"delimiters"``, a mask, or a list of positions.

        Returns:
            The intervention, with `Intervention.fwd_hooks` and `Intervention.attached`.

        Raises:
            ValueError: An argument is unusable, or the model has no hook point for this.
        """
        if mean is None:
            return self._edit("ablate", lambda site: constant(torch.zeros(self.rank)), side, positions)
        require_positions(positions, self.delimiters)
        if isinstance(mean, Tensor) and mean.ndim < 2 and not mean.is_floating_point():
            raise ValueError(
                f"mean: got {mean}, which may be coefficients or token ids; allowed: floating-point numbers, or ids as (batch, pos)"
            )
        if isinstance(mean, (int, float)) or (isinstance(mean, Tensor) and mean.is_floating_point()):
            return self._edit("mean ablate", lambda site: constant(self._values("mean", mean)), side, positions)
        sites = self.sites(side)
        means = {site.name: value for site, value in zip(sites, mean_coefficients(self.model, mean, sites), strict=True)}
        return self._edit("mean ablate", lambda site: constant(means[site.name]), side, positions)

    def patch(
        self,
        source: Prompts | CacheLike,
        *,
        side: Side = "trigger",
        positions: Positions = "all",
        prepend_bos: bool | None = None,
    ) -> Intervention:
        """Takes the component in the subspace, and only it, from another run, position by position.

        Args:
            source: Prompts, which are run at once in one batch (only their coefficients are kept), or a cache of a run. One row serves
                all rows of the run that is edited. Where it ends, nothing is edited.
            side: ``"trigger"``, ``"direction"`` or ``"both"``.
            positions: Which tokens: ``"all"``, ``"initial"``, ``"delimiters"``, a mask, or a list of positions.
            prepend_bos: Passed to the tokenisation of strings; None is the model's default.

        Returns:
            The intervention. Its hooks raise `ValueError` in a run of another number of rows.

        Raises:
            ValueError: An argument is unusable, the cache lacks hook points, or the model has no hook point for this.
        """
        require_positions(positions, self.delimiters)
        sites = self.sites(side)
        kept = source_coefficients(self.model, source, self.weights, sites, prepend_bos=prepend_bos)
        known = {site.name: values for site, values in zip(sites, kept, strict=True)}
        return self._edit("patch", lambda site: from_source(known[site.name]), side, positions, needs_place=True)

    def steer(
        self,
        scale: float | None = None,
        *,
        target: Float[Tensor, "rank"] | float | None = None,
        side: Side = "trigger",
        positions: Positions = "all",
    ) -> Intervention:
        """Makes coefficients larger or smaller, or gives them a value.

        Args:
            scale: What they are multiplied by; 1 changes nothing, 0 ablates.
            target: What they become instead: one number for all vectors, or one for each. On the trigger side, ``√d`` is the largest a
                stream can have. A tensor that requires a gradient gets one.
            side: ``"trigger"``, ``"direction"`` or ``"both"``.
            positions: Which tokens: ``"all"``, ``"initial"``, ``"delimiters"``, a mask, or a list of positions.

        Returns:
            The intervention.

        Raises:
            ValueError: Not exactly one of ``scale`` and ``target`` is given, or an argument is unusable.
        """
        if (scale is None) == (target is None):
            raise ValueError(f"scale, target: got {'both' if scale is not None else 'neither'}; allowed: one of them")
        if target is not None:
            values = self._values("target", target)
            return self._edit("steer to a target", lambda site: constant(values), side, positions)
        assert scale is not None
        if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not math.isfinite(scale):
            raise ValueError(f"scale: got {scale!r}; allowed: a finite number")
        factor = float(scale)
        return self._edit(f"steer by {factor:g}", lambda site: scaled(factor), side, positions)

    def response_curve(self, scales: Float[Tensor, "scale"] | Sequence[float] | None = None, *, vector: int = 0) -> ResponseCurve:
        """How the true FFN answers to ``c · v``, beside what the linear map predicts. See `sd_lens.interventions.responses.response_curve`."""
        from sd_lens.interventions.responses import response_curve

        return response_curve(self, scales, vector=vector)

    def probe_singular_vectors(self, n: int = 20) -> SingularProbe:
        """How the true FFN answers to its map's first right singular vectors. See `sd_lens.interventions.responses.probe_singular_vectors`."""
        from sd_lens.interventions.responses import probe_singular_vectors

        return probe_singular_vectors(self, n)

    def with_delimiters(self, ids: Sequence[int]) -> ExplosionSubspace:
        """The same with these token ids as delimiters."""
        return replace(self, delimiters=ids_of(ids))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it, without the model, as one safetensors file with its labels in the metadata."""
        labels = {
            "block": self.block,
            "delimiters": self.delimiters,
            "model_name": str(getattr(self.model.cfg, "model_name", "model")),
        }
        write_labelled(path, "ExplosionSubspace", {"right": self.right, "left": self.left, "sigma": self.sigma}, labels)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: TransformerLensModel) -> ExplosionSubspace:
        """Reads what `save` wrote, for the model it belongs to (or another of the same width and depth, such as a fine-tune of it).

        Raises:
            ValueError: The file holds no subspace, or one of another width than the model's.
            FileNotFoundError: There is no such file.
        """
        tensors, labels = read_labelled(path, "ExplosionSubspace", "subspace")
        try:
            block, delimiters = operator.index(labels["block"]), ids_of(labels["delimiters"])
            tensors = {name: tensors[name] for name in ("right", "left", "sigma")}
        except (KeyError, TypeError, ValueError):
            raise holds_none(path, "ExplosionSubspace", "subspace") from None
        return cls(model, block, **tensors, delimiters=delimiters)

    def _edit(
        self, name: str, change: Callable[[Site], Change], side: Side, positions: Positions, *, needs_place: bool = False
    ) -> Intervention:
        require_positions(positions, self.delimiters)
        where = (
            positions
            if isinstance(positions, str)
            else "a mask"
            if isinstance(positions, Tensor)
            else f"positions {list(positions)}"
        )
        edits = tuple(Edit(site, change(site), positions, self.delimiters, needs_place=needs_place) for site in self.sites(side))
        return Intervention(self.model, f"{name} the subspace of block {self.block} ({side}, {where})", edits)

    def _values(self, name: str, given: Tensor | float) -> Tensor:
        allowed = f"a finite number, or a tensor of {self.rank}"
        if not isinstance(given, (int, float, Tensor)) or isinstance(given, bool):
            raise ValueError(f"{name}: got {given!r}; allowed: {allowed}")
        values = torch.as_tensor(given, dtype=torch.float32).cpu()
        values = values.expand(self.rank) if values.ndim == 0 else values
        if values.shape != (self.rank,) or not bool(values.isfinite().all()):
            raise ValueError(f"{name}: got {given}; allowed: {allowed}")
        return values

    def __repr__(self) -> str:
        sigma = ", ".join(f"{value:.3g}" for value in self.sigma[:3].tolist()) + (", ..." if self.rank > 3 else "")
        return f"ExplosionSubspace({getattr(self.model.cfg, 'model_name', 'model')}, block {self.block}, rank {self.rank}, sigma {sigma})"
