"""The explainer: one road from images to maps.

images ── trunk (no gradients) ── A ── head (gradients only here) ── U ── derivative engine ── g, HA
                                  │                                                            │
                                  └───────────────── methods.reduce ◄──────────────────────────┘
                                                           │
                                                      Explanation (heatmaps, overlay)

The model is studied once (:mod:`shapleycam.plan`); a call is then: check, run the plan's engine, reduce, explain.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .derivatives import ENGINES, Derivatives, Terms
from .derivatives.path import as_path
from .errors import InputError, LayerError, ModelStateError
from .explanation import Diagnostics, Explanation
from .methods.perturbation import SOURCES, ForwardPass, check_chunk
from .methods.reduce import reduce
from .methods.table import PAPER_METHODS, Method, get_method
from .model.inputs import Inputs, as_inputs
from .model.layers import LayerSpec, check_stem
from .model.layouts import Layout, ReshapeTransform
from .model.pooled_linear import Outdated
from .model.state import ModeCheck, blame_state, refuse_frozen
from .plan import Facts, Plan, Settings, layer_names, study, warn
from .program import MOST_GRAPHS, Captured, Compilation, Compiled, Program, build, compile_program
from .utilities.named import Utility, UtilityFunction, get_utility
from .utilities.outputs import Output, check_output
from .utilities.targets import as_targets, check_targets


class Explainer:
    """Attribution maps for a vision model, in one forward pass.

    The first call studies the model on two of the images (which layer, which layout, which head, which derivative engine) and
    remembers it until a module of the model is replaced, added or removed; :meth:`prepare` does that ahead of time. Every
    later call is one forward pass of the model, the derivative of the part behind the target layer, and one fused reduction,
    without a device synchronisation.

    The model is never changed: hooks live for one call, ``.grad`` and ``requires_grad`` are not touched, and the mode is
    not switched. A model in training mode is refused (see ``Raises``), because batch statistics would make one image's
    map depend on the others, and switching the mode would not be safe while other threads use the model.

    One explainer may be called from several threads.

    Args:
        model: the model, in evaluation mode; it returns logits [N, K] (or an object with ``.logits``).
        layer: "auto"; a module; a dotted name ("layer4.2", "layer4[-1]"); or a list of them, whose maps are averaged.
        method: an entry of :data:`shapleycam.METHODS`, by name.
        utility: an entry of :data:`shapleycam.UTILITIES`, or a callable ``(outputs, targets [N]) -> [N]``.
        engine: "auto", or an exact one: "closed_form" (a pool-and-linear head), "reverse_over_reverse", "forward_over_reverse",
            "gauss_newton" (quicker where the logits are seen to be piecewise linear in the one target layer, refused
            elsewhere, and never chosen by "auto"; it uses torch's forward mode, of which a process has one); "quadrature",
            which puts the mean gradient along the path from the baseline, ``Σ ω_k ∇U(B + t_k (A - B))``, in the place of
            ``g - HA/2``; or "midpoint", which is quadrature with one node.
        backend: "auto", or "cuda", "triton", "native", "torch"; an explicit choice never falls back.
        layout: "auto"; a kind such as "NHWC" or "NTC"; a :class:`shapleycam.Layout`; or a
            :class:`shapleycam.ReshapeTransform` around a function to [N, C, *grid].
        seed: of RandomCAM's random numbers, and of the masks of quadrature.
        chunk: how many masked images (ScoreCAM) or altered activations (AblationCAM) go through the model at once; None for a
            number that suits the device and their size.
        images_as: the keyword under which the model takes the images ("pixel_values"), where they are not its first
            positional argument.
        output: where the logits are in what the model returns: "auto" (the tensor itself, ``.logits``, ``["logits"]`` or
            ``["out"]``, or the first of several), a key or attribute, a position, or a callable ``(outputs) -> logits``. A
            model whose logits look like probabilities is warned of, unless this says that they are logits.
        check: compute the fused operators of each call by the reference too and compare: True, or the fraction of the
            operators' calls, such as 0.01; False for never; None for what :class:`shapleycam.ops.checking` around the call or
            the environment variable SHAPLEYCAM_CHECK says, which also reach ``heatmaps`` and ``overlay``.
        on_mismatch: "raise" KernelMismatch, "warn", or "fallback" to the reference from then on.
        baseline: where the content is counted from: "zero"; "mean", each channel's mean over the positions of its image; or a
            tensor that broadcasts to the activations as [N, C, S]. The maps attribute A - baseline, the Hessian-vector product
            is taken with it, and quadrature's path starts there. With any but "zero", and with quadrature always, prefix
            tokens stay as they are.
        nodes: of engine "quadrature": how many Gauss-Legendre nodes, 1 to 32 (4 by default). Where the head reads one target
            layer and nothing else, they go through it behind the images' own trunk; with several target layers, or a path
            around the layer, every node (and mask) is a pass of the whole model. Or "auto", which doubles them until the
            completeness gap of every image is below ``tolerance`` (behind a pool-and-linear head one device synchronisation
            per call, elsewhere one per doubling).
        tolerance: of ``nodes="auto"``: the completeness gap relative to |U(A) - U(B)|, 1e-3 by default.
        masks: of engine "quadrature": read the gradients at every node where each position is kept with probability t and
            shows the baseline else, this many random masks a node (even, 4 or more; seeded by ``seed``), instead of at the
            scaled activations. Closer to the Shapley values where positions interact, at the price of that many head passes;
            the explanation then has standard errors.

    Raises:
        InputError: unknown method, utility, engine, baseline or backend, nodes, tolerance or masks out of range or with an
            engine that has none, a utility that does not take (outputs, targets), a chunk that
            is no positive number, an output that cannot say where the logits are, or a check that is no fraction.
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
        images_as: str | None = None,
        output: Output = "auto",
        check: bool | float | None = None,
        on_mismatch: ops.OnMismatch = "raise",
        baseline: str | Tensor = "zero",
        nodes: int | str | None = None,
        tolerance: float | None = None,
        masks: int | None = None,
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
        if backend not in ("auto", *ops.ORDER):
            raise InputError(f"Unknown backend {backend!r}: expected 'auto', {', '.join(map(repr, ops.ORDER))}.")
        if images_as is not None and (not isinstance(images_as, str) or not images_as.isidentifier()):
            raise InputError(f"images_as must be the name of a keyword argument, such as 'pixel_values', got {images_as!r}.")
        asked = get_utility(utility)
        if output != "auto":
            asked = replace(asked, output=check_output(output))
        self._settings = Settings(
            model,
            layer_names(model, layer),
            get_method(method),
            asked,
            engine,
            backend,
            layout,
            check_chunk(chunk),
            images_as,
            as_path(engine, baseline, nodes, tolerance, masks, seed),
        )
        self._checking = None if check is None else ops.checking(check, on_mismatch)
        self._seed = seed
        self._start()

    def _start(self) -> None:
        self._mode = ModeCheck(self.model)
        self._facts: Facts | None = None
        self._plans: dict[int, Plan] = {}  # by the order of the derivatives
        self._lock = threading.RLock()
        self._said: set[str] = set()
        self._generator: torch.Generator | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: all but what was learned about the model, which it learns again."""
        learned = ("_mode", "_facts", "_plans", "_lock", "_said", "_generator")
        return {name: value for name, value in self.__dict__.items() if name not in learned}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __repr__(self) -> str:
        plan = self._plans.get(self.method.order)
        layers = [name for name, _ in plan.layers] if plan else list(self._settings.layers or ()) or "auto"
        engine = plan.engine if plan and plan.order else self.engine
        return (
            f"Explainer({type(self.model).__name__}, layer={layers}, method={self.method.name!r}, "
            f"utility={self.utility.name!r}, engine={engine!r}, backend={self.backend!r})"
        )

    model = property(lambda self: self._settings.model, doc="The model; read-only, as all settings are.")
    method = property(lambda self: self._settings.method, doc="The entry of the method table that calls use.")
    utility = property(lambda self: self._settings.utility, doc="The utility.")
    engine = property(lambda self: self._settings.engine, doc="The engine that was asked for.")
    backend = property(lambda self: self._settings.backend, doc="The operator backend that was asked for.")

    baseline = property(lambda self: self._settings.path.baseline, doc="The baseline that was asked for.")

    # ------------------------------------------------------------------------------------------------- the road

    def __call__(
        self,
        images: Tensor,
        targets: Any = None,
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        with_norms: bool = False,
        with_gap: bool = False,
    ) -> Explanation:
        """Explain a batch.

        Args:
            images: floating [N, channels, H, W] (or [N, channels, D, H, W]) as the model takes them, on the model's device.
            targets: the classes to explain: None for the predicted ones, an int for all images, integers [N], or [N, M] for
                M classes per image. A tensor on an accelerator is not range-checked on the host; an image whose target is
                out of range gets a map of NaN.
            args, kwargs: what the model takes besides the images: ``model(images, *args, **kwargs)``. Tensors in them, also
                in lists and mappings, whose first dimension is N belong to the images row by row and are cut with them; put
                one that does not into :class:`shapleycam.model.inputs.Whole`.
            with_norms: also return |HA| / |g| per image.
            with_gap: also return the completeness gap per image; outside the closed form this costs a forward pass.

        Raises:
            InputError: empty batch, wrong rank, channels, dtype or device.
            TargetError: targets of the wrong type, shape or range.
            LayerError: the layer is not reached, reached twice, or its layout cannot be told.
            ModelStateError: the model is in training mode.
            DerivativeError: no path from the layer to the utility, or an operator without the derivative needed.
            KernelMismatch: a fused operator was checked and is wrong.
        """
        method = self._settings.method
        if with_norms and method.order == 0:
            raise InputError(f"Method {method.name!r} has no derivatives, so with_norms=True has nothing to compare.")
        if with_gap and method.order == 0:
            raise InputError(f"Method {method.name!r} has no derivatives, so it has no completeness gap.")
        inputs = as_inputs(images, args, kwargs, self._settings.images_as)
        [explanation] = self._explain(inputs, targets, (method,), with_norms, with_gap)
        return explanation

    def compare(
        self,
        images: Tensor,
        targets: Any = None,
        methods: str | Method | Sequence[str | Method] = PAPER_METHODS,
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Explanation]:
        """Explain a batch by several methods at the price of one: they share a forward pass and its derivatives.

        The maps are those of one explainer per method. RandomCAM draws from this explainer's own random numbers.

        Args:
            images, targets, args, kwargs: as for :meth:`__call__`.
            methods: entries of :data:`shapleycam.METHODS`, by name, each once; all of the paper's by default.

        Returns:
            an explanation per method, under its name, in the order asked for.

        Raises:
            InputError: no method, an unknown one, or one twice; otherwise as :meth:`__call__`.
        """
        chosen = [get_method(method) for method in ((methods,) if isinstance(methods, (str, Method)) else methods)]
        names = [method.name for method in chosen]
        if not chosen or len(set(names)) < len(names):
            raise InputError(f"methods must name at least one method, and each once; got {names}.")
        inputs = self.inputs(images, args, kwargs)
        return dict(zip(names, self._explain(inputs, targets, chosen, False, False), strict=True))

    def _explain(
        self, inputs: Inputs, targets: Any, methods: Sequence[Method], with_norms: bool, with_gap: bool
    ) -> list[Explanation]:
        targets = as_targets(targets)
        orders = {method.order for method in methods}
        if 0 in orders and not self._settings.path.from_zero:
            [name, *_] = [method.name for method in methods if not method.order]
            raise InputError(f"Method {name!r} has no derivatives, and no baseline: use baseline='zero', or another method.")
        if self._settings.path.start == "mean":
            for method in methods:
                if method.pooling == "activation":
                    raise InputError(
                        f"Method {method.name!r} divides by the sum of A - baseline over the positions, which is zero for "
                        "baseline='mean': its map would be rounding. Use 'shapleycam' or 'shapleycam-h', or another baseline."
                    )
        # First-order methods read g, and norms are those of g and HA; other maps and the gap need their combination only.
        wanted = {"with_baseline": with_gap, "weights_only": not with_norms and not {1, 2} <= orders}
        try:
            with _out_of_inference(), self._checking or _NOTHING:
                self._check(inputs, targets)
                plan, found = self._derive(inputs, targets, max(orders), wanted)
                with torch.set_grad_enabled(False):
                    found.mark_images(inputs.images)
                    for note in found.notes:
                        self._say(note)
                    return [self._finish(method, plan, found, inputs, targets, with_norms, with_gap) for method in methods]
        except (LayerError, RuntimeError) as error:
            blame_state(self.model, error)
            raise

    def _say(self, note: str) -> None:
        """Warn of something once; the explanations' notes repeat it."""
        if note not in self._said:
            if len(self._said) < 64:  # notes that name images are ever new
                self._said.add(note)
            warn(note)

    def _check(self, inputs: Inputs, targets: Any) -> None:
        try:
            changed = self._mode.check()
        except ModelStateError:
            self._forget()  # the check sees a change once
            raise
        if changed:
            self._forget()
        if self._facts is not None and self._facts.stem is not None:
            check_stem(self._facts.stem, inputs.images)
        # Whether they are in range, the engine sees by the logits: a classifier may have been replaced.
        check_targets(targets, inputs.images.shape[0], None)

    def _derive(self, inputs: Inputs, targets: Any, order: int, wanted: dict[str, bool]) -> tuple[Plan, Derivatives]:
        """The plan and what its engine finds. A model that is not what was learned about it is studied again.

        Where the closed form does not even hold for the images that it was studied with, it is done without.
        """
        without, said = None, ""
        for attempt in range(3):
            try:
                plan = self._plans.get(order) or self._study(order, inputs, targets, without)
                if wanted["with_baseline"] and len(plan.layers) > 1:
                    raise InputError("The completeness gap is defined for one target layer; ask for it with a single layer.")
                return plan, plan.run(plan.request(self._settings, inputs, targets, **wanted))
            except Outdated as change:
                said = str(change)
                self._forget()
                without = said if attempt else None
        raise _unsteady(said)

    def _finish(
        self,
        method: Method,
        plan: Plan,
        found: Derivatives,
        inputs: Inputs,
        targets: Any,
        with_norms: bool,
        with_gap: bool,
    ) -> Explanation:
        settings, images, several = self._settings, inputs.images, isinstance(targets, Tensor) and targets.ndim == 2
        on_host = images.device.type == "cpu"  # where asking for a number waits for nothing
        raws, served, finite = [], "torch", True
        for index, term in enumerate(found.terms):
            source = SOURCES.get(method.source)
            alpha = None if source is None else source(self._shown(plan, found, index, inputs))
            raw, served = self._reduce(method, term, alpha, found.classes)  # [N, M, S]
            raw = raw if found.nan_mark is None else raw + found.nan_mark[:, None, None].to(raw.dtype)
            finite = finite and (not on_host or isfinite(raw.sum().item()))
            raws.append(raw.view(*(raw.shape[:2] if several else (-1,)), *term.layout.grid))

        ends = with_gap or (found.nodes is not None and found.baseline is not None)  # "auto" knows the gap anyway
        picked = [found.targets, found.norm_ratio() if with_norms else None, found.gap(method.order) if ends else None]
        if not several:
            picked = [None if each is None else each.squeeze(1) for each in picked]
        explanation = Explanation(
            outputs=found.outputs,
            logits=found.logits,
            targets=picked[0],
            raws=tuple(raws),
            image_size=found.terms[0].layout.space(images.shape),
            diagnostics=Diagnostics(
                method=method.name,
                utility=settings.utility.name,
                engine=found.engine if method.order else "none",
                backend=served,
                layers=tuple([name for name, _ in plan.layers]),
                layouts=tuple([term.layout for term in found.terms]),
                notes=(*plan.facts.notes, *(plan.notes if method.order == 2 else ()), *found.notes),
                baseline=settings.path.start,
                nodes=found.nodes if method.order == 2 else None,
            ),
            standard_errors=None if found.standard_errors is None else self._errors(method, found, several),
            hvp_ratio=picked[1],
            gap=picked[2],
            backend=settings.backend,
        )
        if not finite and not bool(explanation.finite.all()):
            wrong = [i for i in (~explanation.finite).nonzero().flatten().tolist() if i not in found.undefined]
            if wrong:
                warn(f"The maps of images {wrong} are not finite: NaN or Inf in the image or in the activations. They are NaN.")
        return explanation

    @staticmethod
    def _errors(method: Method, found: Derivatives, several: bool) -> tuple[Tensor, ...] | None:
        if method.order < 2:
            return None
        assert found.standard_errors is not None
        shaped = [e.unflatten(2, term.layout.grid) for e, term in zip(found.standard_errors, found.terms, strict=True)]
        return tuple(e if several else e[:, 0] for e in shaped)

    def _shown(self, plan: Plan, found: Derivatives, index: int, inputs: Inputs) -> ForwardPass:
        return ForwardPass(
            model=self.model,
            layer=plan.layers[index],
            pooled=plan.facts.pooled if self.engine in ("auto", "closed_form") else None,
            utility=self.utility,
            inputs=inputs.with_images(inputs.images.detach()),
            term=found.terms[index],
            outputs=found.outputs,
            logits=found.logits,
            targets=found.targets,
            chunk=self._settings.chunk,
            draw=self._draw,
        )

    def _reduce(self, method: Method, term: Terms, alpha: Tensor | None, classes: int) -> tuple[Tensor, str]:
        return reduce(method, term, alpha, classes, self._settings.backend)

    # ------------------------------------------------------------------------------------------- what it remembers

    def prepare(
        self, images: Tensor, targets: Any = None, *, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Plan:
        """Study the model on the first two of ``images`` and remember the findings; returns the plan.

        Costs a few forward passes of two images. Calling it again is free, until the model is edited.

        Args:
            images, targets, args, kwargs: as for :meth:`__call__`; a utility of your own is called with these targets.

        Raises:
            As :meth:`__call__`.
        """
        inputs = self.inputs(images, args, kwargs)
        targets = as_targets(targets)
        try:
            with _out_of_inference():
                self._check(inputs, targets)
                plan = self._plans.get(self.method.order)
                if plan is None:
                    try:
                        plan = self._study(self.method.order, inputs, targets)
                    except Outdated as change:
                        try:
                            plan = self._study(self.method.order, inputs, targets, without=str(change))
                        except Outdated as again:
                            raise _unsteady(str(again)) from None
        except (LayerError, RuntimeError) as error:
            blame_state(self.model, error)
            raise
        return plan

    def program(
        self,
        images: Tensor,
        *,
        targets: str = "predicted",
        size: str | int | Sequence[int] = "layer",
        all_classes: bool = False,
        dynamic_size: bool = False,
    ) -> Program:
        """This explainer as a pure module ``(images, targets) -> Explained``, for ``torch.export`` and its like.

        It holds the very model, and is compared with this explainer on ``images``. Behind a pool-and-linear head it is the
        closed form around the model; any other head is traced, with its derivatives, to a graph of plain operators.

        Args:
            images: [N, channels, H, W] as for :meth:`__call__`; the program takes any number of images of their size.
            targets: "predicted"; "given" for a second input, int64 [N] or [N, M], where -1 is the predicted class; or "all"
                for the maps of all K classes, [N, K, *size].
            size: of ``maps``: "layer" for the grid of the target layer, "image" for the images' own, or a size.
            all_classes: accept that "all" costs K passes of a head that is not pool-and-linear, in memory at once.
            dynamic_size: take images of any height and width, from a least one on, which is ``program.least``; maps follow.
                For convolutional models; tried at three other sizes, and wherever the model or a derivative would decide
                something otherwise by the size.

        Raises:
            ExportError: the method, utility, engine or baseline is none that a program has; the model or the derivatives of
                its head cannot be traced (the message names the place); "all" was not accepted; or the program is off by more
                than 1e-4, relative.
            InputError, LayerError, ModelStateError, DerivativeError: as :meth:`__call__`.
        """
        plan = self.prepare(images)
        return build(self._settings, plan, self, images, targets, size, all_classes, dynamic_size)

    def compile(
        self,
        images: Tensor,
        *,
        targets: str = "predicted",
        size: str | int | Sequence[int] = "layer",
        all_classes: bool = False,
        dtype: torch.dtype | None = None,
        channels_last: bool | None = None,
        fold: bool = True,
        report: bool = False,
        **options: Any,
    ) -> Compiled:
        """The program of this explainer through ``torch.compile(fullgraph=True)``; called as a program is.

        It holds a copy of the weights as they are now; the model is left as it is.

        Args:
            images, targets, size, all_classes: as for :meth:`program`; the program is compiled for these images' number.
            dtype: the weights are converted to it, as the images are in every call: float32, float64, float16 or bfloat16.
                The utility, its derivatives in the logits and the reduction stay in float32.
            channels_last: lay images and weights out so; None for models with 2-d convolutions.
            fold: fold batch normalisations into the convolutions before them.
            report: measure what all this costs in accuracy, as ``.report``.
            options: of ``torch.compile``, such as ``dynamic=True`` or ``mode="max-autotune"``.

        Raises:
            ExportError: as :meth:`program`; the compiler is missing or fails; or logits or maps are off by more than 1e-4,
                relative (float16 0.05, bfloat16 0.3), or no numbers.
            InputError: another dtype, or as :meth:`__call__`, as are LayerError, ModelStateError and DerivativeError.
        """
        return compile_program(
            self._settings,
            self.prepare(images),
            self,
            images,
            Compilation(targets, size, all_classes, dtype, channels_last, fold, report, options),
        )

    def capture(
        self,
        images_like: Tensor,
        *,
        targets: str = "predicted",
        size: str | int | Sequence[int] = "layer",
        all_classes: bool = False,
        limit: int = MOST_GRAPHS,
    ) -> Captured:
        """The program of this explainer by CUDA graphs: one launch per batch; called as a program is.

        A graph is recorded for the batch size of the first call, rounded up to a power of two, and for others when they come;
        see :class:`shapleycam.program.Captured`. On a CPU, or where nothing can be recorded, the program runs without graphs,
        and ``.reason`` says why.

        Args:
            images_like, targets, size, all_classes: as for :meth:`program`; images of their dtype, on their device, follow.
            limit: how many graphs are kept.

        Raises:
            InputError: a limit below 1.
            ExportError, LayerError, ModelStateError, DerivativeError: as :meth:`program`.
        """
        program = self.program(images_like, targets=targets, size=size, all_classes=all_classes)
        return Captured(program, images_like, limit=limit)

    def inputs(self, images: Tensor, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Inputs:
        """A call's arguments as one :class:`shapleycam.model.inputs.Inputs`, checked.

        Raises:
            InputError: as :meth:`__call__`.
        """
        return as_inputs(images, args, kwargs, self._settings.images_as)

    def layout_of(self, name: str, module: nn.Module, activations: Tensor, images: Tensor) -> Layout:
        """How this explainer reads the output of a target layer, after :meth:`prepare`; see :class:`shapleycam.Layout`.

        Raises:
            ModelStateError: the model was not studied yet.
        """
        if self._facts is None:
            raise ModelStateError("The model was not studied yet: call prepare(images) first.")
        return self._facts.layout_of(name, module, activations, images)

    def reseed(self, seed: int) -> None:
        """Start RandomCAM's random numbers again, from ``seed``."""
        with self._lock:
            self._seed, self._generator = seed, None

    def _study(self, order: int, inputs: Inputs, targets: Any, without: str | None = None) -> Plan:
        with self._lock:
            if order not in self._plans:
                plan = study(self._settings, inputs, targets, order, self._facts, without)
                self._facts, self._plans[order] = plan.facts, plan
            return self._plans[order]

    def _forget(self) -> None:
        with self._lock:
            self._facts, self._plans = None, {}

    def _draw(self, activations: Tensor, classes: int) -> Tensor:
        with self._lock:
            if self._generator is None or self._generator.device != activations.device:
                self._generator = torch.Generator(activations.device).manual_seed(self._seed)
            shape = (activations.shape[0], classes, activations.shape[1])
            return torch.rand(shape, generator=self._generator, device=activations.device) * 2 - 1


#: A context that does nothing; it keeps no state, so one serves all.
_NOTHING = nullcontext()


def _out_of_inference() -> AbstractContextManager[Any]:
    """Inference mode off, whose tensors have no backward, and gradients on; no context where it is so already."""
    plain = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    return _NOTHING if plain else torch.inference_mode(False)


def _unsteady(said: str) -> ModelStateError:
    return ModelStateError(f"The model changes from one forward pass to the next: {said}. Explain it while nothing edits it.")
