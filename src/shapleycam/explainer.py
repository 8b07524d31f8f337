"""The explainer: one road from images to maps.

images ── trunk (no gradients) ── A ── head (gradients only here) ── U ── derivative engine ── g, HA
                                  │                                                            │
                                  └───────────── ops.weighted_reduce ◄─────────────────────────┘
                                                       │
                                                   Explanation (heatmaps, overlay)
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .derivatives.engines import ENGINES, Derived, HeadChanged, Terms
from .errors import InputError, ModelStateError
from .explanation import Diagnostics, Explanation
from .methods.eigen import principal_map
from .methods.perturbation import Scene, ablation_weights, check_chunk, poison, score_weights
from .methods.table import PAPER_METHODS, Method, get_method
from .model.layers import LayerSpec, check_stem, named_layers, token_facts
from .model.layouts import Layout, ReshapeTransform
from .model.state import ModeCheck, explained_by_state, refuse_frozen
from .plan import Plan, Wishes, derive, make_plan, warn
from .utilities.named import Utility, UtilityFunction, get_utility
from .utilities.outputs import Output, check_output
from .utilities.targets import as_targets, check_targets


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
        layout: "auto"; a kind such as "NHWC" or "NTC"; a :class:`shapleycam.Layout`; or a
            :class:`shapleycam.layouts.ReshapeTransform` around a function to [N, C, *grid].
        seed: the seed of RandomCAM.
        chunk: how many masked images (ScoreCAM) or altered activations (AblationCAM) go through the model at once; None for a
            number that suits the device and their size.
        output: where the logits are in what the model returns: "auto" (the tensor itself, ``.logits``, ``["logits"]`` or
            ``["out"]``, or the first of several), a key or attribute, a position, or a callable ``(outputs) -> logits``. A
            model whose logits look like probabilities is warned of, unless this says that they are logits.

    Raises:
        InputError: unknown method, utility, engine or backend, a utility that does not take (outputs, targets), a chunk that
            is no positive number, or an output that cannot say where the logits are.
        LayerError: a named layer does not exist.
        ModelStateError: ``model`` is not an ``nn.Module``, or is compiled, scripted, traced or exported.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: LayerSpec | Sequence[LayerSpec] = "auto",
        method: str | Method = "shapleycam",
        utility: str | UtilityFunction | Utility = "rest",
        engine: str = "auto",
        backend: str = "auto",
        layout: str | Layout | ReshapeTransform = "auto",
        seed: int = 0,
        chunk: int | None = None,
        output: Output = "auto",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ModelStateError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        if hasattr(model, "_orig_mod"):
            raise ModelStateError(
                "The model is compiled by torch.compile, whose graphs skip hooks. Pass the original module (model._orig_mod)."
            )
        refuse_frozen(model)
        if engine not in ("auto", *ENGINES):
            raise InputError(f"Unknown engine {engine!r}: expected 'auto', {', '.join(map(repr, ENGINES))}.")
        self.model = model
        self.method = get_method(method)
        self.utility = get_utility(utility)
        if output != "auto":
            self.utility = replace(self.utility, output=check_output(output))
        if backend not in ("auto", *ops.ORDER):
            raise InputError(f"Unknown backend {backend!r}: expected 'auto', {', '.join(map(repr, ops.ORDER))}.")
        self.engine, self.backend = engine, backend
        named = None if isinstance(layer, str) and layer == "auto" else tuple(named_layers(model, layer))
        self._wishes = Wishes(model, named, self.method, self.utility, engine, layout, token_facts(model), backend)
        self._mode = ModeCheck(model)
        self._plans: dict[int, Plan] = {}  # by the order of the derivatives they were studied for
        self._lock = threading.RLock()
        self._seed = seed
        self._chunk = check_chunk(chunk)
        self._generator: torch.Generator | None = None

    def __repr__(self) -> str:
        layers = [name for name, _ in self._plan.layers] if self._plan else [n for n, _ in self._wishes.layers or ()] or "auto"
        engine = self._plan.engine if self._plan else self.engine
        return (
            f"Explainer({type(self.model).__name__}, layer={layers}, method={self.method.name!r}, "
            f"utility={self.utility.name!r}, engine={engine!r}, backend={self.backend!r})"
        )

    @property
    def _plan(self) -> Plan | None:
        return self._plans.get(self.method.order)

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
        if with_norms and self.method.order == 0:
            raise InputError(f"Method {self.method.name!r} has no derivatives, so with_norms=True has nothing to compare.")
        plan, derived = self._derive(images, targets, (self.method,), with_norms, with_gap)
        return self._finish(self.method, plan, derived, images, targets, with_norms, with_gap)

    def compare(
        self, images: Tensor, targets: Any = None, methods: str | Method | Sequence[str | Method] = PAPER_METHODS
    ) -> dict[str, Explanation]:
        """Explain a batch by several methods at the price of one: they share a forward pass and its derivatives.

        The maps are those of one explainer per method. RandomCAM draws from this explainer's own random numbers.

        Args:
            images, targets: as for :meth:`__call__`.
            methods: rows of :data:`shapleycam.METHODS`, by name, each once; all of the paper's by default.

        Returns:
            an explanation per method, under its name, in the order asked for.

        Raises:
            InputError: no method, an unknown one, or one twice; otherwise as :meth:`__call__`.
        """
        rows = [get_method(method) for method in ((methods,) if isinstance(methods, (str, Method)) else methods)]
        names = [row.name for row in rows]
        if not rows or len(set(names)) < len(names):
            raise InputError(f"methods must name at least one method, and each once; got {names}.")
        targets = as_targets(targets)
        plan, derived = self._derive(images, targets, rows, False, False)
        return {row.name: self._finish(row, plan, derived, images, targets, False, False) for row in rows}

    def reseed(self, seed: int) -> None:
        """Start RandomCAM's random numbers again, from ``seed``."""
        with self._lock:
            self._seed, self._generator = seed, None

    def prepare(self, images: Tensor) -> Plan:
        """Study the model on the first two of ``images`` and remember the findings; returns the plan.

        Costs a few forward passes of two images. Calling it again is free.

        Raises:
            As :meth:`__call__`.
        """
        return self._study(self._wishes, images)

    def layout_of(self, name: str, module: nn.Module, activations: Tensor, images: Tensor) -> Layout:
        """How this explainer reads the output of a target layer; see :class:`shapleycam.Layout`."""
        return self._wishes.layout_of(name, module, activations, images)

    def _study(self, wishes: Wishes, images: Tensor) -> Plan:
        with self._lock:
            plan = self._plans.get(wishes.method.order)
            if plan is None:
                self._check(images, None)
                with torch.inference_mode(False), explained_by_state(self.model):
                    plan = self._plans[wishes.method.order] = make_plan(wishes, images[:2].detach().clone())
            return plan

    def _derive(
        self, images: Tensor, targets: Any, methods: Sequence[Method], with_norms: bool, with_gap: bool
    ) -> tuple[Plan, Derived]:
        """The plan, and the derivatives of the highest order that one of the methods needs."""
        self._check(images, targets)
        orders = {method.order for method in methods}
        wishes = replace(self._wishes, method=max(methods, key=lambda method: method.order))
        # First-order methods read g and norms are those of g and HA; other maps and the gap need their combination only.
        combined = not with_norms and not {1, 2} <= orders
        with torch.inference_mode(False), explained_by_state(self.model):  # tensors of that mode cannot be saved for a backward
            request = partial(wishes.request, images=images, targets=targets, baseline=with_gap, combined=combined)
            plan = self._plans.get(wishes.method.order) or self._study(wishes, images)
            try:
                return plan, derive(plan, request(plan))
            except HeadChanged:
                # The model was edited since the plan was made: look again, once.
                with self._lock:
                    self._plans.clear()
                plan = self._study(wishes, images)
                return plan, derive(plan, request(plan))

    def _finish(
        self,
        method: Method,
        plan: Plan,
        derived: Derived,
        images: Tensor,
        targets: Any,
        with_norms: bool,
        with_gap: bool,
    ) -> Explanation:
        with torch.inference_mode(False), torch.no_grad():
            # NaN for an image with NaN or Inf in it, else 0: a network may swallow either, its map must not.
            poison = images.detach().flatten(1).sum(1, dtype=torch.promote_types(images.dtype, torch.float32)) * 0
            if derived.poison is not None:
                poison = poison + derived.poison
            several = isinstance(targets, Tensor) and targets.ndim == 2
            raws, served = [], "torch"
            for index, term in enumerate(derived.terms):
                raw, served = self._reduce(method, plan, derived, index, images)  # [N, M, S]
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
                method=method.name,
                utility=self.utility.name,
                engine=derived.engine if method.order else "none",
                backend=served,
                layers=tuple(name for name, _ in plan.layers),
                layouts=tuple(term.layout for term in derived.terms),
                notes=plan.notes if method.order == 2 else (),  # they speak of the Hessian term
            ),
            hvp_ratio=None if norms is None else pick(norms),
            gap=None if gap is None else pick(gap),
            backend=self.backend,
        )
        if images.device.type == "cpu" and not bool(explanation.finite.all()):
            wrong = (~explanation.finite).nonzero().flatten().tolist()
            warn(f"The maps of images {wrong} are not finite: NaN or Inf in the image or in the activations. They are NaN.")
        return explanation

    def _reduce(self, method: Method, plan: Plan, derived: Derived, index: int, images: Tensor) -> tuple[Tensor, str]:
        """One layer's signed maps [N, M, S], and the backend that made them."""
        term = derived.terms[index]
        a = term.activations
        if method.pooling == "eigen":
            classes = 1 if derived.targets is None else derived.targets.shape[1]
            weighted = [a] if method.order == 0 else [a * g for g in term.gradients]
            return torch.stack([principal_map(w) for w in weighted], 1).expand(-1, classes, -1), "torch"
        if method.order == 0:
            alpha = self._channel_weights(method, plan, derived, index, images)
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

    def _channel_weights(self, method: Method, plan: Plan, derived: Derived, index: int, images: Tensor) -> Tensor:
        """The weights [N, M, C] of a method without derivatives."""
        term = derived.terms[index]
        if method.pooling == "random":
            return self._random(term.activations, 1 if derived.targets is None else derived.targets.shape[1])
        scene = Scene(
            model=self.model,
            layer=plan.layers[index],
            linear=plan.linear if plan.engine == "closed_form" else None,
            utility=self.utility,
            images=images.detach(),
            term=term,
            outputs=derived.outputs,
            logits=derived.logits,
            targets=derived.targets,
            chunk=self._chunk,
        )
        if method.pooling == "score":
            alpha = score_weights(scene)
        else:
            alpha = ablation_weights(scene, floor=method.pooling == "ablation_floor")
        return alpha + poison(term.activations)[:, None, None].to(alpha.dtype)

    def _random(self, activations: Tensor, classes: int) -> Tensor:
        with self._lock:
            if self._generator is None or self._generator.device != activations.device:
                self._generator = torch.Generator(activations.device).manual_seed(self._seed)
            shape = (activations.shape[0], classes, activations.shape[1])
            return torch.rand(shape, generator=self._generator, device=activations.device) * 2 - 1

    def _check(self, images: Any, targets: Any) -> None:
        plan = self._plan
        if not isinstance(images, Tensor):
            raise InputError(
                f"images must be a torch.Tensor, got {type(images).__name__}. Use torch.from_numpy or torch.stack."
            )
        if not images.is_floating_point():
            raise InputError(
                f"images must be floating and normalised as the model expects, got {images.dtype}. For 0..255 pixels: "
                "images.float() / 255, then subtract the mean and divide by the standard deviation."
            )
        if images.ndim < 3:
            raise InputError(f"images must be [N, channels, *spatial], got shape {tuple(images.shape)}.")
        if images.numel() == 0:
            raise InputError(f"images is an empty batch, shape {tuple(images.shape)}: pass at least one image.")
        if plan is not None and plan.stem is not None:
            check_stem(plan.stem, images)
        check_targets(targets, images.shape[0], plan.classes if plan is not None else None)
        self._mode.check()


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
