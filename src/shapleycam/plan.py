"""What was asked of an explainer, what it learned about the model, and which derivative engine follows from both.

:class:`Settings` never change. :class:`Facts` are learned once per model, by running it on a few images. A :class:`Plan` is
the engine for one order of derivatives, tried once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .derivatives import ENGINES, PATH_ENGINES, Derivatives, Request, activations_only
from .derivatives.closed_form import by_autograd, logit_derivatives
from .derivatives.path import Path
from .derivatives.quadrature import head_rows
from .derivatives.terms import HeadRows, Terms
from .errors import DerivativeError, InputError, ModelStateError, ShapleyCamError, ShapleyCamWarning
from .methods.table import Method
from .model.capture import Capture
from .model.doubts import doubts
from .model.inputs import Inputs
from .model.layers import find_layer, named_layers, survey, token_facts, token_suffix
from .model.layouts import Layout, ReshapeTransform, resolve_layout
from .model.pooled_linear import PooledLinear, find, verify
from .utilities.named import Utility
from .utilities.outputs import probability_note
from .utilities.targets import check_targets, place_targets

#: How many layouts are remembered; images of ever new sizes must not fill the memory.
_MOST_LAYOUTS = 256


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user asked: the arguments of :class:`shapleycam.Explainer`; ``layers`` are dotted names, None for "auto"."""

    model: nn.Module
    layers: tuple[str, ...] | None
    method: Method
    utility: Utility
    engine: str
    backend: str
    layout: str | Layout | ReshapeTransform
    chunk: int | None = None
    images_as: str | None = None
    path: Path = field(default_factory=Path)


@dataclass(frozen=True, slots=True)
class Facts:
    """What an explainer learned about a model from its first images; it holds until the model is changed.

    Attributes:
        layers: (name, module) of the target layers.
        pooled: the head, where it was verified to be pool-and-linear.
        head: in words, what the head is and how that is known.
        writes: an operator behind a target layer writes into its output, so the head gets a copy.
        stem: the convolution that reads the images directly, if there is one; images are checked against it.
        classes: number of logits, if the model returned logits [N, K].
        tokens: number of prefix tokens, patch size and number of suffix tokens, as the model declares them.
        layout: how the user said the layers' outputs are to be read.
        notes: doubts about the choice of a layer; the user was warned of them.
    """

    layers: tuple[tuple[str, nn.Module], ...]
    pooled: PooledLinear | None
    head: str
    writes: bool
    stem: nn.modules.conv._ConvNd | None
    classes: int | None
    tokens: tuple[int | None, tuple[int, ...] | None, int | None]
    layout: str | Layout | ReshapeTransform
    notes: tuple[str, ...] = ()
    _layouts: dict[Any, Layout] = field(default_factory=dict, repr=False, compare=False)

    def layout_of(self, name: str, module: nn.Module, activations: Tensor, images: Tensor) -> Layout:
        """The layout of one target layer's output.

        Raises:
            LayerError: it cannot be told.
        """
        key = (name, activations.shape, images.shape)
        found = self._layouts.get(key)
        if found is None:
            prefix, patch, suffix = self.tokens
            found = resolve_layout(
                activations.shape,
                images.shape,
                name=name,
                wanted=self.layout,
                module=module,
                prefix=prefix,
                patch=patch,
                suffix=suffix,
                channels_second=self.stem is not None,
            )
            if len(self._layouts) >= _MOST_LAYOUTS:
                self._layouts.clear()
            self._layouts[key] = found
        return found


@dataclass(frozen=True, slots=True)
class Plan:
    """Which engine serves one order of derivatives of one model.

    Attributes:
        facts: of the model.
        order: the highest derivative it gives.
        engine: the derivative engine; "none" at order 0.
        notes: warnings that were given about the second order.
        rows: what engine "quadrature" knows of the head.
    """

    facts: Facts
    order: int
    engine: str
    notes: tuple[str, ...] = ()
    rows: HeadRows | None = None

    @property
    def layers(self) -> tuple[tuple[str, nn.Module], ...]:
        """(name, module) of the target layers."""
        return self.facts.layers

    @property
    def run(self) -> Callable[[Request], Derivatives]:
        """The engine."""
        return activations_only if self.order == 0 else ENGINES[self.engine]

    def request(self, settings: Settings, inputs: Inputs, targets: Any = None, **options: Any) -> Request:
        """What the engine is asked for these inputs; ``options`` are those of :class:`shapleycam.derivatives.Request`."""
        facts = self.facts
        return Request(
            settings.model,
            facts.layers,
            facts.layout_of,
            settings.utility,
            inputs,
            targets,
            self.order,
            facts.writes,
            facts.pooled,
            backend=settings.backend,
            path=settings.path,
            rows=self.rows,
            chunk=settings.chunk,
            **options,
        )


def study(
    settings: Settings, inputs: Inputs, targets: Any, order: int, facts: Facts | None = None, without: str | None = None
) -> Plan:
    """Learn about the model from the first two images, and choose an engine; costs a few forward passes of them.

    Where the model or the utility fails on two of the images it may hold something for the whole batch: then the whole batch
    is studied.

    Args:
        settings: of the explainer.
        inputs, targets: of the call.
        order: the highest derivative needed.
        facts: what is known already.
        without: why the closed form is not to be used, where it did not keep what it had promised.

    Raises:
        InputError, LayerError, ModelStateError, DerivativeError: as :meth:`shapleycam.Explainer.__call__`.
    """
    placed, _ = place_targets(targets, None, inputs.images.shape[0], inputs.images.device)

    def first(count: int) -> Plan:
        index = torch.arange(count, device=inputs.images.device)
        few = inputs.beside(inputs.images[:count].detach().clone(), index)
        some = None if placed is None else placed[:count]
        # A utility that holds something per image holds it for the whole batch; these are its first images.
        asked = replace(settings, utility=settings.utility.rows(index), path=settings.path.first_rows(count, batch))

        def check(classes: int | None) -> None:
            check_targets(targets, inputs.images.shape[0], classes)  # all of them: no message is to quote two images

        known = facts or learn(asked, few, some, check, without)
        check(known.classes)
        return choose(asked, known, few, some, order)

    batch = inputs.images.shape[0]
    try:
        return first(min(batch, 2))
    except (ShapleyCamError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        if batch <= 2:
            raise
        try:
            return first(batch)
        except (RuntimeError, ValueError, IndexError):
            raise error from None


def learn(
    settings: Settings,
    inputs: Inputs,
    targets: Tensor | None,
    check: Callable[[int | None], None],
    without: str | None = None,
) -> Facts:
    """Which layers, how they are read, what the head is and whether it writes into their output.

    ``check`` raises TargetError for this number of classes, before a utility is asked for one that is not there.
    """
    model = settings.model
    _check_whole(model)
    column = None if targets is None else targets[:, 0]
    named = None if settings.layers is None else tuple(named_layers(model, settings.layers))
    seen = survey(model, inputs.images, gradients=True, inputs=inputs, read=settings.utility.logits_of)
    classes = seen.logits.shape[1] if seen.logits is not None and seen.logits.ndim == 2 else None
    check(classes)
    layers = named or (find_layer(model, seen, inputs.images.shape, settings.utility, settings.layout, column),)
    linear, reason = find(seen, layers) if without is None else (None, without)
    utility = settings.utility
    if linear is not None and not utility.sees_logits_only(seen.outputs, seen.logits):
        linear, reason = None, f"utility {utility.name!r} is given more than the logits"
    if utility.named and utility.name != "logit" and utility.output == "auto":
        note = probability_note(seen.outputs, seen.logits, utility.name)
        seen.notes += [] if note is None else [note]
    tokens = (*token_facts(model), token_suffix(model))
    facts = Facts(layers, None, reason, False, seen.stem, classes, tokens, settings.layout)
    if linear is not None:
        try:
            off, holds = verify(model, layers[0], linear, inputs, facts.layout_of, settings.utility.logits_of)
        except (RuntimeError, ValueError, IndexError, AssertionError) as failure:
            # Random activations may be outside what the head accepts; then it is simply not verified.
            facts = replace(facts, head=f"not verified: random activations fail in it ({failure})")
        else:
            pooled = PooledLinear(linear, off) if holds else None
            said = f"pool and linear, verified to {off:.1e}"
            said = said if holds else f"not pool and linear (relative error {off:.1e} on random activations)"
            facts = replace(facts, pooled=pooled, head=said)
    with Capture(model, layers, gradients=False, copy=False, replace=lambda _, found: found.clone()) as capture:
        capture.run(inputs)
        written = any(captured.written for captured in capture.layers)
        outputs = [(c.name, c.module, c.activations) for c in capture.layers if c.activations is not None]
    layouts = [facts.layout_of(*output, inputs.images) for output in outputs]
    # Behind a pool every position matters, and an automatic choice has asked already.
    asked = named is None or facts.pooled is not None or settings.method.order == 0
    notes = tuple(doubts(model, seen, layers, layouts, utility, column, asked))
    for note in notes:
        warn(note)
    return replace(facts, writes=written, notes=notes)


def choose(settings: Settings, facts: Facts, inputs: Inputs, targets: Tensor | None, order: int) -> Plan:
    """The engine for an order of derivatives; one that needs the second derivative is tried.

    Raises:
        DerivativeError: the engine that was named cannot serve, or none can.
    """
    if settings.engine == "closed_form" and facts.pooled is None:
        raise DerivativeError(f"engine='closed_form' needs a pool-and-linear head, but {facts.head}. Use engine='auto'.")
    auto = "closed_form" if facts.pooled is not None else "reverse_over_reverse"
    plan = Plan(facts, order, settings.engine if settings.engine != "auto" else auto)
    if order == 0:
        return replace(plan, engine="none")
    if plan.engine == "closed_form":
        _check_coefficients(settings.utility)
    if order < 2:
        return plan
    if plan.engine in PATH_ENGINES and (facts.pooled is None or settings.path.masks):
        plan = replace(plan, rows=head_rows(plan.request(settings, inputs, targets)))
    try:
        trial = plan.run(plan.request(settings, inputs, targets, find_cuts=True))
    except DerivativeError as first:
        if settings.engine != "auto":
            raise
        plan = replace(plan, engine="forward_over_reverse")
        try:
            trial = plan.run(plan.request(settings, inputs, targets, find_cuts=True))
        except DerivativeError:
            raise first from None
    if settings.utility.name == "logit" or not settings.utility.named:
        flat = all(_flat(term, m) for term in trial.terms for m in range(trial.classes))
        alive = any(bool(g.any()) for term in trial.terms for g in term.gradients)
        if flat and alive:
            title = settings.method.title if settings.method.order == 2 else "a second-order method"
            name = settings.utility.name
            note = (
                f"The Hessian term is zero: utility {name!r} over this head is piecewise linear in the activations, so {title} "
                "equals its first-order counterpart. Use utility='rest'."
            )
            if plan.engine in PATH_ENGINES:
                note = (
                    f"The path says nothing beyond the gradient: utility {name!r} over this head is linear from the "
                    f"baseline to the activations, so {title} equals its first-order counterpart. Use utility='rest', or "
                    "another baseline."
                )
            warn(note)
            plan = replace(plan, notes=(note,))
    return plan


def _flat(term: Terms, m: int) -> bool:
    """Whether the second order, or what the path says beyond the gradient at A, is nothing; of a path, to rounding."""
    hvp = term.second_order(m)
    if hvp is None or not bool(hvp.any()):
        return True
    return bool(term.position_weights) and bool(hvp.norm() <= 1e2 * torch.finfo(hvp.dtype).eps * term.gradients[m].norm())


def _check_whole(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if name and getattr(module, "_compiled_call_impl", None) is not None:
            raise ModelStateError(
                f"The part {name!r} of the model is compiled in place ({name}.compile()), and its graph would skip hooks. "
                "Explain a model without it, or compile the whole model, which is then explained as it was before."
            )


def _check_coefficients(utility: Utility) -> None:
    """Raise InputError where a user's own coefficients are not the derivatives of the utility's value."""
    if utility.gradient is None or utility.fused:
        return
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    z0, targets = torch.randn(2, 7, generator=generator, dtype=torch.float64), torch.tensor([[1, 4], [0, 6]])
    for given, found in zip(
        logit_derivatives(utility, z, z0, targets, 2), by_autograd(utility, z, z0, targets, 2), strict=True
    ):
        zero = torch.zeros(2, 2, 7, dtype=torch.float64)
        given, found = (zero if part is None else part.double() for part in (given, found))
        if not torch.allclose(given, found, rtol=1e-4, atol=1e-4):
            raise InputError(
                f"The utility {utility.name!r} has coefficients that are not the derivatives of its value: they are off by "
                f"{float((given - found).abs().max()):.2g}. Mend gradient= and curvature=, or leave both out (None)."
            )


def warn(message: str) -> None:
    """Warn the caller of the package."""
    # Point at the caller's line, not into the package.
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith("shapleycam"):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, ShapleyCamWarning, stacklevel=depth)


def layer_names(model: nn.Module, wanted: str | nn.Module | Sequence[str | nn.Module]) -> tuple[str, ...] | None:
    """The dotted names of the layers that the caller named; None for "auto". See :func:`named_layers`."""
    if isinstance(wanted, str) and wanted == "auto":
        return None
    return tuple(name for name, _ in named_layers(model, wanted))
