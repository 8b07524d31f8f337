"""The explainer: one road from images to maps.

    images ── trunk (no gradients) ── A ── head (gradients only here) ── U ── derivative engine ── g, HA
                                      │                                                            │
                                      └───────────── ops.weighted_reduce ◄─────────────────────────┘
                                                           │
                                                       Explanation (heatmaps, overlay)
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .derivatives import (
    ENGINES,
    Derived,
    HeadChanged,
    Request,
    Terms,
    as_targets,
    check_targets,
    closed_form,
    forward_over_reverse,
    midpoint,
    probe,
    reverse_over_reverse,
)
from .errors import DerivativeError, InputError, ModelStateError, ShapleyCamWarning
from .explanation import Diagnostics, Explanation
from .layers import (
    LayerSpec,
    affine_error,
    affine_tolerance,
    check_stem,
    final_linear,
    find_layer,
    named_layers,
    survey,
    token_facts,
)
from .layouts import Layout, resolve_layout
from .methods import Method, get_method
from .utilities import Utility, UtilityFunction, get_utility

_BACKENDS = ("cuda", "triton", "native", "torch")


@dataclass(frozen=True, slots=True)
class Plan:
    """What an explainer learned about a model from its first images; it holds for every later call.

    Attributes:
        layers: (name, module) of the target layers.
        engine: the derivative engine.
        linear: the classifier, where the head was verified to be pool-and-linear.
        head: in words, what the head is and how that is known.
        copy: an operator behind the target layer writes into its output, so the head gets a copy.
        classes: number of logits, if the model returns logits [N, K].
        stem: the convolution that reads the images directly, if there is one; images are checked against it.
        notes: warnings that were given.
    """

    layers: tuple[tuple[str, nn.Module], ...]
    engine: str
    linear: nn.Linear | None
    head: str
    copy: bool
    classes: int | None
    stem: nn.modules.conv._ConvNd | None
    notes: tuple[str, ...] = ()


class Explainer:
    """Attribution maps for a vision model, in one forward pass.

    The first call studies the model on two of the images (which layer, which layout, which head, which derivative engine) and
    remembers it; :meth:`prepare` does that ahead of time. Every later call is one forward pass of the model, the derivative
    of the part behind the target layer, and one fused reduction, without a device synchronisation.

    The model is never changed: hooks live for one call, ``.grad`` and ``requires_grad`` are not touched, and the mode is
    not switched. A model in training mode is refused (see ``Raises``), because batch statistics would make one image's
    map depend on the others, and switching the mode would not be safe while other threads use the model.

    One explainer may be called from several threads.

    Args:
        model: the model, in evaluation mode; it returns logits [N, K] (or an object with ``.logits``).
        layer: "auto"; a module; a dotted name ("layer4.2", "layer4[-1]"); or a list of them, whose maps are averaged.
        method: a row of :data:`shapleycam.METHODS`, by name.
        utility: a row of :data:`shapleycam.UTILITIES`, or a callable ``(outputs, targets [N]) -> [N]``.
        engine: "auto", or "closed_form", "reverse_over_reverse", "forward_over_reverse", "midpoint".
        backend: "auto", or "cuda", "triton", "native", "torch"; an explicit choice never falls back.
        layout: "auto"; a kind such as "NHWC" or "NTC"; or a :class:`shapleycam.Layout`.
        seed: the seed of RandomCAM.

    Raises:
        InputError: unknown method, utility, engine or backend.
        LayerError: a named layer does not exist.
        ModelStateError: ``model`` is not an ``nn.Module``, or is compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: LayerSpec | Sequence[LayerSpec] = "auto",
        method: str | Method = "shapleycam",
        utility: str | UtilityFunction | Utility = "rest",
        engine: str = "auto",
        backend: str = "auto",
        layout: str | Layout = "auto",
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ModelStateError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        if hasattr(model, "_orig_mod"):
            raise ModelStateError(
                "The model is compiled by torch.compile, whose graphs skip hooks. Pass the original module (model._orig_mod)."
            )
        if engine not in ("auto", *ENGINES):
            raise InputError(f"Unknown engine {engine!r}: expected 'auto', {', '.join(map(repr, ENGINES))}.")
        self.model = model
        self.method = get_method(method)
        self.utility = get_utility(utility)
        if backend not in ("auto", *_BACKENDS):
            raise InputError(f"Unknown backend {backend!r}: expected 'auto', {', '.join(map(repr, _BACKENDS))}.")
        self.engine, self.backend, self.layout = engine, backend, layout
        self._named = None if isinstance(layer, str) and layer == "auto" else tuple(named_layers(model, layer))
        self._modal = tuple((name, module) for name, module in model.named_modules() if _depends_on_mode(module))
        self._tokens = token_facts(model)
        self._plan: Plan | None = None
        self._lock = threading.RLock()
        self._seed = seed
        self._generator: torch.Generator | None = None

    def __repr__(self) -> str:
        layers = [name for name, _ in self._plan.layers] if self._plan else [n for n, _ in self._named or ()] or "auto"
        return (
            f"Explainer({type(self.model).__name__}, layer={layers}, method={self.method.name!r}, utility={self.utility.name!r}, "
            f"engine={self._plan.engine if self._plan else self.engine!r}, backend={self.backend!r})"
        )

    # ------------------------------------------------------------------------------------------------- the road

    def __call__(self, images: Tensor, targets: Any = None, *, with_norms: bool = False, with_gap: bool = False) -> Explanation:
        """Explain a batch.

        Args:
            images: floating [N, channels, H, W] (or [N, channels, D, H, W]) as the model takes them, on the model's device.
            targets: the classes to explain: None for the predicted ones, an int for all images, integers [N], or [N, M] for
                M classes per image. A tensor on an accelerator is not range-checked on the host; an image whose target is
                out of range gets a map of NaN.
            with_norms: also return |HA| / |g| per image.
            with_gap: also return the completeness gap per image; outside the closed form this costs a forward pass.

        Raises:
            InputError: empty batch, wrong rank, channels, dtype or device.
            TargetError: targets of the wrong type, shape or range.
            LayerError: the layer is not reached, reached twice, or its layout cannot be told.
            ModelStateError: the model is in training mode.
            DerivativeError: no path from the layer to the utility, or an operator without the derivative needed.
        """
        targets = as_targets(targets)
        self._check(images, targets)
        plan = self._plan or self.prepare(images)
        with torch.inference_mode(False):  # whose tensors cannot be saved for a backward pass
            try:
                derived = self._derive(plan, self._request(plan, images, targets, with_gap))
            except HeadChanged:
                # The model was edited since the plan was made: look again, once.
                with self._lock:
                    self._plan = None
                plan = self.prepare(images)
                derived = self._derive(plan, self._request(plan, images, targets, with_gap))
            return self._finish(plan, derived, images, targets, with_norms, with_gap)

    def prepare(self, images: Tensor) -> Plan:
        """Study the model on the first two of ``images`` and remember the findings; returns the plan.

        Costs a few forward passes of two images. Calling it again is free.

        Raises:
            As :meth:`__call__`.
        """
        with self._lock:
            if self._plan is None:
                self._check(images, None)
                with torch.inference_mode(False):
                    self._plan = self._study(images[:2].detach().clone())
            return self._plan

    def _derive(self, plan: Plan, request: Request) -> Derived:
        if plan.engine == "closed_form" and request.order > 0:
            assert plan.linear is not None
            return closed_form(request, plan.linear)
        engine = {"forward_over_reverse": forward_over_reverse, "midpoint": midpoint}.get(plan.engine, reverse_over_reverse)
        return engine(request)

    def _finish(
        self, plan: Plan, derived: Derived, images: Tensor, targets: Any, with_norms: bool, with_gap: bool
    ) -> Explanation:
        with torch.no_grad():
            # NaN for an image with NaN or Inf in it, else 0: a network may swallow either, its map must not.
            poison = images.detach().flatten(1).sum(1, dtype=torch.promote_types(images.dtype, torch.float32)) * 0
            if derived.poison is not None:
                poison = poison + derived.poison
            several = isinstance(targets, Tensor) and targets.ndim == 2
            raws, served = [], "torch"
            for term in derived.terms:
                raw, served = self._reduce(term, 1 if derived.targets is None else derived.targets.shape[1])  # [N, M, S]
                raw = (raw + poison[:, None, None].to(raw.dtype)).unflatten(2, term.layout.grid)
                raws.append(raw if several else raw[:, 0])
            norms = _norm_ratio(derived.terms) if with_norms else None
            gap = _gap(derived) if with_gap else None
        pick = (lambda t: t) if several else (lambda t: t[:, 0])
        explanation = Explanation(
            outputs=derived.outputs,
            logits=derived.logits,
            targets=None if derived.targets is None else pick(derived.targets),
            raws=tuple(raws),
            image_size=tuple(images.shape[2:]),
            diagnostics=Diagnostics(
                method=self.method.name,
                utility=self.utility.name,
                engine=derived.engine if self.method.order else "none",
                backend=served,
                layers=tuple(name for name, _ in plan.layers),
                layouts=tuple(term.layout for term in derived.terms),
                notes=plan.notes,
            ),
            hvp_ratio=None if norms is None else pick(norms),
            gap=None if gap is None else pick(gap),
            backend=self.backend,
        )
        if images.device.type == "cpu" and not bool(explanation.finite.all()):
            wrong = (~explanation.finite).nonzero().flatten().tolist()
            _warn(f"The maps of images {wrong} are not finite: NaN or Inf in the image or in the activations. They are NaN.")
        return explanation

    def _reduce(self, term: Terms, classes: int) -> tuple[Tensor, str]:
        """One layer's signed maps [N, M, S], and the backend that made them."""
        method, a = self.method, term.activations
        if method.order == 0:
            alpha = self._random(a, classes)
            served = ops.select("channel_weighted_sum", a, alpha, backend=self.backend)
            return ops.channel_weighted_sum(a, alpha, backend=served), served
        hvps = term.hvps if method.order == 2 else [None] * len(term.gradients)
        if method.linear and term.gradients[0].shape[2] == 1:
            # The weight is constant over the positions: one read of A serves every class.
            weights = [g if h is None else g - h / 2 for g, h in zip(term.gradients, hvps, strict=True)]
            alpha = torch.stack([w[:, :, 0] for w in weights], 1)
            served = ops.select("channel_weighted_sum", a, alpha, backend=self.backend)
            return ops.channel_weighted_sum(a, alpha, backend=served), served
        maps, served = [], "torch"
        for g, h in zip(term.gradients, hvps, strict=True):
            g = g.expand_as(a)
            h = None if h is None else h.expand_as(a)
            served = ops.select("weighted_reduce", a, g, h, pooling=method.pooling, backend=self.backend)
            maps.append(ops.weighted_reduce(a, g, h, method.pooling, backend=served))
        return torch.stack(maps, 1), served

    def _random(self, activations: Tensor, classes: int) -> Tensor:
        with self._lock:
            if self._generator is None or self._generator.device != activations.device:
                self._generator = torch.Generator(activations.device).manual_seed(self._seed)
            shape = (activations.shape[0], classes, activations.shape[1])
            return torch.rand(shape, generator=self._generator, device=activations.device) * 2 - 1

    # ------------------------------------------------------------------------------------------------ the study

    def _request(self, plan: Plan, images: Tensor, targets: Any, baseline: bool) -> Request:
        if baseline and self.method.order == 0:
            raise InputError(f"Method {self.method.name!r} has no derivatives, so it has no completeness gap.")
        if baseline and len(plan.layers) > 1:
            raise InputError("The completeness gap is defined for one target layer; ask for it with a single layer.")
        return Request(
            self.model, plan.layers, self._layout, self.utility, images, targets, self.method.order, plan.copy, baseline
        )

    def _layout(self, name: str, module: nn.Module, activations: Tensor, images: Tensor) -> Layout:
        prefix, patch = self._tokens
        return resolve_layout(
            activations.shape, images.shape, name=name, wanted=self.layout, module=module, prefix=prefix, patch=patch
        )

    def _study(self, images: Tensor) -> Plan:
        seen = survey(self.model, images, gradients=self._named is None)
        layers = self._named
        if layers is None:
            layers = (find_layer(self.model, seen, images.shape, self.utility, self.layout),)
        linear, reason = final_linear(seen, layers) if len(layers) == 1 else (None, "there are several target layers")
        classes = seen.logits.shape[1] if seen.logits is not None and seen.logits.ndim == 2 else None
        plan = Plan(tuple(layers), self.engine, None, reason, False, classes, seen.stem)
        del seen
        plan = self._study_head(plan, images, linear)
        return self._choose_engine(plan, images)

    def _study_head(self, plan: Plan, images: Tensor, linear: nn.Linear | None) -> Plan:
        """Is the head pool-and-linear, and does it write into the target layer's output?"""
        request = self._request(plan, images, None, False)
        if linear is not None:
            view, logits, _ = probe(request, linear)
            error = affine_error(linear, view, logits)
            if error <= affine_tolerance(view.dtype):
                plan = replace(plan, linear=linear, head=f"pool and linear, verified to {error:.1e}")
            else:
                plan = replace(plan, head=f"not pool and linear (relative error {error:.1e} on random activations)")
        with request.capture(gradients=False, replace=lambda _, found: found.clone()) as capture:
            capture.run(images)
            written = any(site.mutated for site in capture.sites)
        return replace(plan, copy=written)

    def _choose_engine(self, plan: Plan, images: Tensor) -> Plan:
        if self.engine == "closed_form" and plan.linear is None:
            raise DerivativeError(f"engine='closed_form' needs a pool-and-linear head, but {plan.head}. Use engine='auto'.")
        if self.engine in ("auto", "closed_form") and plan.linear is not None:
            plan = replace(plan, engine="closed_form")
        elif self.engine == "auto":
            plan = replace(plan, engine="reverse_over_reverse")
        if self.method.order < 2:
            return plan
        try:
            trial = self._derive(plan, replace(self._request(plan, images, None, False), trial=True))
        except DerivativeError as first:
            if self.engine != "auto":
                raise
            plan = replace(plan, engine="forward_over_reverse")
            try:
                trial = self._derive(plan, replace(self._request(plan, images, None, False), trial=True))
            except DerivativeError:
                raise first from None
        if self.utility.name == "logit" or not self.utility.named:
            flat = all(h is None or not bool(h.any()) for term in trial.terms for h in term.hvps)
            alive = any(bool(g.any()) for term in trial.terms for g in term.gradients)
            if flat and alive:
                note = (
                    f"The Hessian term is zero: utility {self.utility.name!r} over this head is piecewise linear in the "
                    f"activations, so {self.method.title} equals its first-order counterpart. Use utility='rest'."
                )
                _warn(note)
                plan = replace(plan, notes=(*plan.notes, note))
        return plan

    def _check(self, images: Any, targets: Any) -> None:
        plan = self._plan
        if not isinstance(images, Tensor):
            raise InputError(f"images must be a torch.Tensor, got {type(images).__name__}. Use torch.from_numpy or torch.stack.")
        if not images.is_floating_point():
            raise InputError(
                f"images must be floating and normalised as the model expects, got {images.dtype}. For 0..255 pixels: "
                "images.float() / 255, then subtract the mean and divide by the standard deviation."
            )
        if images.ndim < 3:
            raise InputError(f"images must have a batch, a channel and spatial dimensions, got shape {tuple(images.shape)}.")
        if images.numel() == 0:
            raise InputError(f"images is an empty batch, shape {tuple(images.shape)}: pass at least one image.")
        if plan is not None and plan.stem is not None:
            check_stem(plan.stem, images)
        check_targets(targets, images.shape[0], plan.classes if plan is not None else None)
        training = [name or type(module).__name__ for name, module in self._modal if module.training]
        if training:
            raise ModelStateError(
                f"The model is in training mode ({', '.join(training[:3])}{', …' if len(training) > 3 else ''}): batch norm and "
                "dropout would make the maps wrong. Call model.eval() first; the explainer leaves the mode to you."
            )


def _depends_on_mode(module: nn.Module) -> bool:
    """Whether training mode may change what a module computes; a module that is not torch's own may do anything."""
    if not type(module).__module__.startswith("torch.nn.modules"):
        return True
    return isinstance(module, (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.RReLU, nn.RNNBase)) or (
        isinstance(module, nn.MultiheadAttention) and module.dropout > 0
    )


def _warn(message: str) -> None:
    # Point at the caller's line, not into the package.
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith("shapleycam"):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, ShapleyCamWarning, stacklevel=depth)


def _norm_ratio(terms: Sequence[Terms]) -> Tensor:
    """|HA| / |g| per image and class [N, M], over all target layers; 0 where the Hessian term is structurally zero."""
    columns = []
    for m in range(len(terms[0].gradients)):
        g2 = sum(term.gradients[m].flatten(1).float().square().sum(1) for term in terms)
        assert isinstance(g2, Tensor)
        h2 = torch.zeros_like(g2)
        for term in terms:
            h = term.hvps[m]
            if h is not None:
                h2 = h2 + h.flatten(1).float().square().sum(1)
        columns.append((h2 / g2).sqrt())
    return torch.stack(columns, 1)


def _gap(derived: Derived) -> Tensor:
    """U(A) - U(0) - Σ A·w per image and class [N, M]."""
    [term] = derived.terms
    assert derived.value is not None and derived.baseline is not None
    explained = []
    for g, h in zip(term.gradients, term.hvps, strict=True):
        w = g if h is None else g - h / 2
        explained.append((term.activations * w).flatten(1).sum(1, dtype=derived.value.dtype))
    return derived.value - derived.baseline - torch.stack(explained, 1)

