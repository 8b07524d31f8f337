"""Exact derivatives by automatic differentiation of the part behind the target layer.

``reverse_over_reverse``
    Gradient with ``create_graph=True``, then a vector-Jacobian product. The widest operator coverage.
``forward_over_reverse``
    The reverse pass runs on dual numbers. Exact and independent of the former; some operators lack it.

Reverse over forward is missing on purpose: torch computes it wrongly through LayerNorm.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from ..errors import DerivativeError, ShapleyCamError
from ..model.capture import Capture, checkpointing
from ..model.pooled_linear import Outdated
from .terms import Derivatives, Request

# Torch has one dual level for the whole process; two threads cannot be inside it at once.
_DUAL_LEVEL = threading.Lock()
_inside: list[int] = []  # the thread that is


@contextmanager
def dual_level(engine: str) -> Iterator[None]:
    """Torch's one dual level, for this thread alone.

    Raises:
        DerivativeError: this thread is in it already. A head that explains something itself would wait for ever.
    """
    if threading.get_ident() in _inside:
        raise DerivativeError(
            f"Engine {engine} cannot run inside a head that is itself differentiated in forward mode. Use "
            "engine='reverse_over_reverse' for one of the two explainers."
        )
    with _DUAL_LEVEL:
        _inside.append(threading.get_ident())
        try:
            with forward_ad.dual_level():
                yield
        finally:
            _inside.clear()


class ConstantsStay(TorchFunctionMode):
    """No tangents where gradients are off.

    What is computed under ``no_grad`` is a constant to the reverse pass, so it must be one to forward mode.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        with forward_ad._set_fwd_grad_enabled(False):
            return func(*args, **(kwargs or {}))


def cut_off(gradient: Tensor) -> bool:
    """Whether a node of the gradient's graph stands for a derivative that torch refuses to take."""
    waiting, known = [gradient.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in known:
            continue
        if node.name() == "torch::autograd::Error":
            return True
        known.add(node)
        waiting.extend(following for following, _ in node.next_functions)
    return False


def differentiate(
    value: Tensor,
    inputs: list[Tensor],
    directions: list[Tensor] | None,
    second: bool,
    keep: bool,
    find_cuts: bool = False,
    model: nn.Module | None = None,
) -> list[tuple[Tensor, Tensor | None]]:
    """(gradient, Hessian-vector product or None where it is structurally zero) for each of ``inputs``.

    ``directions`` are the vectors, the inputs themselves by default.
    """
    if not value.requires_grad:
        raise DerivativeError(
            "There is no differentiable path from the target layer to the utility. The layer runs beside the classifier, "
            "or the model detaches, rounds, or switches gradients off behind it. Choose a layer the logits depend on."
            + ("" if model is None else checkpointing(model))
        )
    gradients = torch.autograd.grad(value.sum(), inputs, create_graph=second, retain_graph=keep or second, allow_unused=True)
    found: list[tuple[Tensor, Tensor | None]] = []
    for i, (gradient, source) in enumerate(zip(gradients, inputs, strict=True)):
        if gradient is None:
            raise DerivativeError(
                f"There is no path from target layer number {i} to the utility: choose a layer the logits depend on."
            )
        hvp = None
        if second and find_cuts and cut_off(gradient):
            raise DerivativeError(
                "Engine reverse_over_reverse cannot differentiate the head twice: it contains a function marked "
                "once_differentiable, behind which torch would take the Hessian for zero. Use engine='midpoint' (approximate) "
                "or a first-order method such as 'gradcam'."
            )
        if second and gradient.requires_grad:
            last = not keep and i == len(inputs) - 1
            direction = source.detach() if directions is None else directions[i]
            (hvp,) = torch.autograd.grad(gradient, source, direction, retain_graph=not last, allow_unused=True)
        found.append((gradient.detach() if second else gradient, None if hvp is None else hvp.detach()))
    return found


def activations_only(request: Request) -> Derivatives:
    """One forward pass, nothing differentiated: for the methods that need no derivative."""
    with request.capture(gradients=False) as capture:
        outputs = capture.run(request.inputs)
        still(request, capture)
        return request.start(capture, outputs, "none")


def reverse_over_reverse(request: Request) -> Derivatives:
    """Gradient, and its vector-Jacobian product with the activations, for all layers in one forward pass.

    Raises:
        DerivativeError: no path from a layer to the utility, or an operator without a double backward.
        Outdated: an operator that was not there before writes into a target layer's output.
    """
    try:
        with request.capture(gradients=True) as capture:
            outputs = capture.run(request.inputs)
            found = request.start(capture, outputs, "reverse_over_reverse")
            with torch.enable_grad():
                values = request.values(outputs, found.targets)
            _fill(request, capture, found, values)
            still(request, capture)
    except RuntimeError as error:
        explain(error, "reverse_over_reverse", request.writes)
        raise
    request.add_baseline(found, values)
    return found


def still(request: Request, capture: Capture) -> None:
    """Raise Outdated where an operator writes into a target layer's output that did not when the model was studied."""
    if not request.writes and any(captured.written for captured in capture.layers):
        raise Outdated("an operator writes into the target layer's output")


def _fill(request: Request, capture: Capture, found: Derivatives, values: list[Tensor]) -> None:
    leaves = [captured.activations for captured in capture.layers if captured.activations is not None]
    directions = None
    if request.order > 1 and not request.path.from_zero:
        directions = [request.direction(term.layout, leaf.detach()) for term, leaf in zip(found.terms, leaves, strict=True)]
    for m, value in enumerate(values):
        keep = m < len(values) - 1
        pairs = differentiate(value, leaves, directions, request.order > 1, keep, request.find_cuts, request.model)
        for term, (gradient, hvp) in zip(found.terms, pairs, strict=True):
            term.gradients.append(term.layout.view(gradient))
            term.hvps.append(None if hvp is None else term.layout.view(hvp))


def explain(error: RuntimeError, engine: str, writes: bool = True) -> None:
    """Raise an error of the package in the place of one of torch's about derivatives; return where it is about others.

    Args:
        error: torch's.
        engine: the engine's name.
        writes: the head is known to write into the target layer's output.
    """
    if isinstance(error, (ShapleyCamError, torch.OutOfMemoryError)):
        return
    text = str(error)
    first = text.splitlines()[0] if text else ""
    if "leaf Variable that requires grad" in text and "in-place" in text and not writes:
        raise Outdated("an operator writes into the target layer's output") from error
    signs = ("not implemented", "does not support", "not supported", "double backward", "forward AD", "forward mode AD")
    if any(sign in text for sign in signs):
        raise DerivativeError(
            f"Engine {engine} cannot differentiate an operator of the head: {first} engine='auto' tries both "
            "exact engines; engine='midpoint' is approximate, and a first-order method such as 'gradcam' needs neither."
        ) from error


def forward_over_reverse(request: Request) -> Derivatives:
    """The reverse pass on dual numbers; one forward pass per target layer.

    Raises:
        DerivativeError: an operator of the head has no forward-mode derivative, or no path to the utility.
    """
    if request.order < 2:
        found = reverse_over_reverse(request)
        found.engine = "forward_over_reverse"
        return found
    parts: list[Derivatives] = []
    for layer in request.layers:
        one = replace(request, layers=[layer])
        name, module = layer

        def tangent(activations: Tensor, name: str = name, module: nn.Module = module) -> Tensor:
            return request.direction(request.layout_of(name, module, activations, request.inputs.images), activations)

        # Whatever the caller switched off, forward mode among it, is on in there.
        fresh = torch.inference_mode(False)
        capturing = one.capture(gradients=True, tangent=tangent)
        with fresh, dual_level("forward_over_reverse"), ConstantsStay(), capturing as capture:
            try:
                outputs = capture.run(one.inputs)
                found = one.start(capture, outputs, "forward_over_reverse")
                with torch.enable_grad():
                    values = one.values(outputs, found.targets)
                _fill_dual(capture, found, values)
            except RuntimeError as error:
                explain(error, "forward_over_reverse", request.writes)
                raise
            still(one, capture)
            if request.with_baseline:
                found.value = torch.stack([forward_ad.unpack_dual(v).primal.detach() for v in values], 1)
            found.logits = None if found.logits is None else forward_ad.unpack_dual(found.logits).primal
            if isinstance(found.outputs, Tensor):
                found.outputs = forward_ad.unpack_dual(found.outputs).primal
        parts.append(found)
    whole = parts[0]
    whole.terms = [part.terms[0] for part in parts]
    request.add_baseline(whole, [])
    return whole


def _fill_dual(capture: Capture, found: Derivatives, values: list[Tensor]) -> None:
    [captured], [term] = capture.layers, found.terms
    assert captured.activations is not None
    for m, value in enumerate(values):
        [(gradient, _)] = differentiate(value, [captured.activations], None, False, keep=m < len(values) - 1)
        primal, tangent = forward_ad.unpack_dual(gradient)
        term.gradients.append(term.layout.view(primal.detach()))
        term.hvps.append(None if tangent is None else term.layout.view(tangent.detach()))
