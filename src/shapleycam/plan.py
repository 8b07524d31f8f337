"""What an explainer learns about a model from its first images, and how.

Which layer, which layout, which head, which engine: answered once, by running the model, and remembered as a :class:`Plan`.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .derivatives.engines import (
    Derived,
    Request,
    closed_form,
    forward_over_reverse,
    midpoint,
    probe,
    reverse_over_reverse,
)
from .errors import DerivativeError, InputError, ShapleyCamWarning
from .methods.table import Method
from .model.layers import affine_error, affine_tolerance, final_linear, find_layer, survey
from .model.layouts import Layout, ReshapeTransform, resolve_layout
from .utilities.named import Utility
from .utilities.outputs import probability_note


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


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user asked of an explainer; ``layers`` is None for layer="auto"."""

    model: nn.Module
    layers: tuple[tuple[str, nn.Module], ...] | None
    method: Method
    utility: Utility
    engine: str
    layout: str | Layout | ReshapeTransform
    #: number of prefix tokens and patch size, as the model declares them
    tokens: tuple[int | None, tuple[int, ...] | None]
    backend: str = "auto"

    def request(
        self, plan: Plan, images: Tensor, targets: Any = None, baseline: bool = False, combined: bool = False
    ) -> Request:
        """What an engine is asked for these images; ``combined`` if w is wanted but neither g nor HA alone.

        Raises:
            InputError: a completeness gap was asked for where there is none.
        """
        if baseline and self.method.order == 0:
            raise InputError(f"Method {self.method.name!r} has no derivatives, so it has no completeness gap.")
        if baseline and len(plan.layers) > 1:
            raise InputError("The completeness gap is defined for one target layer; ask for it with a single layer.")
        return Request(
            self.model,
            plan.layers,
            self.layout_of,
            self.utility,
            images,
            targets,
            self.method.order,
            plan.copy,
            baseline,
            combined=combined,
            backend=self.backend,
        )

    def layout_of(self, name: str, module: nn.Module, activations: Tensor, images: Tensor) -> Layout:
        """The layout of one target layer's output."""
        prefix, patch = self.tokens
        return resolve_layout(
            activations.shape, images.shape, name=name, wanted=self.layout, module=module, prefix=prefix, patch=patch
        )


def derive(plan: Plan, request: Request) -> Derived:
    """Run the plan's engine."""
    if plan.engine == "closed_form" and request.order > 0:
        assert plan.linear is not None
        return closed_form(request, plan.linear)
    engine = {"forward_over_reverse": forward_over_reverse, "midpoint": midpoint}.get(plan.engine, reverse_over_reverse)
    return engine(request)


def make_plan(wishes: Wishes, images: Tensor) -> Plan:
    """Study the model on a few images; costs a few forward passes of them.

    Raises:
        InputError, LayerError, ModelStateError, DerivativeError: as :meth:`shapleycam.Explainer.__call__`.
    """
    # A utility that holds something per image holds it for the whole batch; these are its first images.
    wishes = replace(wishes, utility=wishes.utility.rows(torch.arange(images.shape[0], device=images.device)))
    seen = survey(wishes.model, images, gradients=wishes.layers is None, read=wishes.utility.logits_of)
    note = None
    if wishes.utility.named and wishes.utility.name != "logit" and wishes.utility.output == "auto":
        note = probability_note(seen.outputs, seen.logits, wishes.utility.name)
        if note is not None:
            warn(note)
    layers = wishes.layers
    if layers is None:
        layers = (find_layer(wishes.model, seen, images.shape, wishes.utility, wishes.layout),)
    linear, reason = final_linear(seen, layers) if len(layers) == 1 else (None, "there are several target layers")
    if linear is not None and not wishes.utility.sees_logits_only(seen.outputs, seen.logits):
        linear, reason = None, f"utility {wishes.utility.name!r} is given more than the logits"
    classes = seen.logits.shape[1] if seen.logits is not None and seen.logits.ndim == 2 else None
    plan = Plan(tuple(layers), wishes.engine, None, reason, False, classes, seen.stem, () if note is None else (note,))
    del seen
    plan = _study_head(wishes, plan, images, linear)
    return _choose_engine(wishes, plan, images)


def _study_head(wishes: Wishes, plan: Plan, images: Tensor, linear: nn.Linear | None) -> Plan:
    """Is the head pool-and-linear, and does it write into the target layer's output?"""
    request = wishes.request(plan, images)
    if linear is not None:
        try:
            view, logits, _ = probe(request, linear)
            error = affine_error(linear, view, logits)
        except (RuntimeError, ValueError, IndexError, AssertionError) as failure:
            # Random activations may be outside what the head accepts; then it is simply not verified.
            return _study_writes(request, replace(plan, head=f"not verified: random activations fail in it ({failure})"))
        if error <= affine_tolerance(view.dtype):
            plan = replace(plan, linear=linear, head=f"pool and linear, verified to {error:.1e}")
        else:
            plan = replace(plan, head=f"not pool and linear (relative error {error:.1e} on random activations)")
    return _study_writes(request, plan)


def _study_writes(request: Request, plan: Plan) -> Plan:
    with request.capture(gradients=False, replace=lambda _, found: found.clone()) as capture:
        capture.run(request.images)
        written = any(site.mutated for site in capture.sites)
    return replace(plan, copy=written)


def _choose_engine(wishes: Wishes, plan: Plan, images: Tensor) -> Plan:
    if wishes.engine == "closed_form" and plan.linear is None:
        raise DerivativeError(f"engine='closed_form' needs a pool-and-linear head, but {plan.head}. Use engine='auto'.")
    if wishes.engine in ("auto", "closed_form") and plan.linear is not None:
        plan = replace(plan, engine="closed_form")
    elif wishes.engine == "auto":
        plan = replace(plan, engine="reverse_over_reverse")
    if wishes.method.order < 2:
        return plan
    try:
        trial = derive(plan, replace(wishes.request(plan, images), trial=True))
    except DerivativeError as first:
        if wishes.engine != "auto":
            raise
        plan = replace(plan, engine="forward_over_reverse")
        try:
            trial = derive(plan, replace(wishes.request(plan, images), trial=True))
        except DerivativeError:
            raise first from None
    if wishes.utility.name == "logit" or not wishes.utility.named:
        flat = all(h is None or not bool(h.any()) for term in trial.terms for h in term.hvps)
        alive = any(bool(g.any()) for term in trial.terms for g in term.gradients)
        if flat and alive:
            note = (
                f"The Hessian term is zero: utility {wishes.utility.name!r} over this head is piecewise linear in the "
                f"activations, so {wishes.method.title} equals its first-order counterpart. Use utility='rest'."
            )
            warn(note)
            plan = replace(plan, notes=(*plan.notes, note))
    return plan


def warn(message: str) -> None:
    """Warn the caller of the package."""
    # Point at the caller's line, not into the package.
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith("shapleycam"):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, ShapleyCamWarning, stacklevel=depth)
