"""Derivative engines: from images to activations, gradient and Hessian-vector product of the utility.

Every engine runs the model forward, stops gradients before the target layer, and returns the same :class:`Derived`.

``closed_form``
    For a head verified to be ``z = W·mean_s(A) + b``. No autograd: with ``z₀ = z - b``, gradient and Hessian-vector product
    are ``Wᵀu'/S`` and ``Wᵀ(U''z₀)/S``, constant over the positions.
``reverse_over_reverse``
    Gradient with ``create_graph=True``, then a vector-Jacobian product. The widest operator coverage.
``forward_over_reverse``
    The reverse pass runs on dual numbers. Exact and independent of the former; some operators lack it.
``midpoint``
    ``w = ∇U(A/2)``, equal to the Shapley weight for utilities quadratic in A only; needs a second forward pass. Never
    chosen by ``auto``.

Reverse over forward is missing on purpose: torch computes it wrongly through LayerNorm.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

from .. import ops
from ..errors import DerivativeError, InputError
from ..model.capture import Capture
from ..model.layers import same_tensor
from ..model.layouts import Layout
from ..utilities.named import Utility, evaluate
from ..utilities.targets import place_targets

ENGINES = ("closed_form", "reverse_over_reverse", "forward_over_reverse", "midpoint")

# Torch has one dual level for the whole process; two threads cannot be inside it at once.
_DUAL_LEVEL = threading.Lock()


@dataclass(slots=True)
class Terms:
    """What one target layer contributes, as strided [N, C, S] views.

    ``gradients`` and ``hvps`` have one entry per class. Where the weight is constant over the positions they are
    [N, C, 1]; an hvp of None is structurally zero or was not asked for.
    """

    activations: Tensor
    layout: Layout
    gradients: list[Tensor] = field(default_factory=list)
    hvps: list[Tensor | None] = field(default_factory=list)


@dataclass(slots=True)
class Derived:
    """The result of an engine: outputs, logits, targets [N, M] (None without logits), terms per layer, U and U(0)."""

    outputs: Any
    logits: Tensor | None
    targets: Tensor | None
    terms: list[Terms]
    engine: str
    value: Tensor | None = None  # [N, M]
    baseline: Tensor | None = None  # [N, M], U with the layer's output replaced by zeros
    poison: Tensor | None = None  # [N], NaN where a target on the device was out of range, else 0


@dataclass(slots=True)
class Request:
    """What one call asks of an engine."""

    model: nn.Module
    layers: Sequence[tuple[str, nn.Module]]
    layout: Callable[[str, nn.Module, Tensor, Tensor], Layout]
    utility: Utility
    images: Tensor
    targets: Any
    order: int
    copy: bool
    baseline: bool = False
    trial: bool = False  # also look for operators that would silently cut the second derivative off
    combined: bool = False  # only w = g - HA/2 is wanted: an engine may give it in the place of g, with hvps of None
    backend: str = "auto"

    def capture(self, **options: Any) -> Capture:
        return Capture(self.model, self.layers, copy=self.copy, **options)

    def terms(self, capture: Capture) -> list[Terms]:
        found = []
        for site in capture.sites:
            assert site.activations is not None
            layout = self.layout(site.name, site.module, site.activations, self.images)
            found.append(Terms(layout.view(site.activations.detach()), layout))
        return found


class HeadChanged(Exception):
    """The head is no longer what the plan says; plan again. Never leaves the package."""


def _values(request: Request, outputs: Any, targets: Tensor | None, logits: Tensor | None = None) -> list[Tensor]:
    """U for every class; ``logits`` where they are at hand."""
    logits, batch = request.utility.logits_of(outputs) if logits is None else logits, request.images.shape[0]
    columns = [None] if targets is None else [targets[:, m] for m in range(targets.shape[1])]
    return [evaluate(request.utility, outputs, logits, column, batch) for column in columns]


# ------------------------------------------------------------------------------------------------------ closed form


def closed_form(request: Request, linear: nn.Linear) -> Derived:
    """The closed form; ``linear`` is the classifier verified to read the mean of the activations.

    Raises:
        HeadChanged: this forward pass did not end in that classifier.
    """
    with request.capture(gradients=False, linear=linear) as capture:
        outputs = capture.run(request.images)
        logits = request.utility.logits_of(outputs)
        calls, site = capture.linear_calls, capture.sites[0]
        if logits is None or len(calls) != 1 or not same_tensor(calls[0][1], logits) or calls[0][0].ndim != 2:
            raise HeadChanged("the logits are no longer the output of the classifier")
        if site.mutated and not request.copy:
            raise HeadChanged("an operator writes into the target layer's output")
        return _closed_form_terms(request, capture, linear, outputs, logits)


def _closed_form_terms(request: Request, capture: Capture, linear: nn.Linear, outputs: Any, logits: Tensor) -> Derived:
    terms = request.terms(capture)
    [term] = terms
    targets, poison = place_targets(request.targets, logits, logits.shape[0], logits.device)
    assert targets is not None
    derived = Derived(outputs, logits, targets, terms, "closed_form", poison=poison)
    positions = max(term.activations.shape[2], 1)
    bias = linear.bias
    hvp: Tensor | None = None
    if request.combined and request.utility.named:
        rows = ops.utility_rows(
            logits,
            targets,
            bias,
            utility=request.utility.name,
            order=request.order,
            scale=1 / positions,
            backend=request.backend,
        )
        gradient = ops.head_weights(rows, linear.weight, backend=request.backend)
    else:
        z = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        z0 = z if bias is None else z - bias.to(z.dtype)
        engine = _named_rows if request.utility.named else _dense_rows
        gradient, hvp = engine(request, z, z0, linear.weight.to(z.dtype), targets)
        gradient = gradient / positions
        hvp = None if hvp is None else hvp / positions
    for m in range(targets.shape[1]):
        term.gradients.append(gradient[:, m, :, None])
        term.hvps.append(None if hvp is None else hvp[:, m, :, None])
    if request.baseline:
        derived.value = torch.stack(_values(request, outputs, targets), 1)
        zero = torch.zeros_like(logits) if bias is None else bias.to(logits.dtype).expand_as(logits)
        derived.baseline = torch.stack(_values(request, zero, targets, zero), 1)
    return derived


def _named_rows(request: Request, z: Tensor, z0: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
    """Wᵀu' and WᵀU''z₀, each [N, M, C], from the products of W with p and p * z₀ (the same for every class)."""
    utility = request.utility
    assert utility.gradient is not None and utility.curvature is not None
    rows = weight[targets]  # [N, M, C]
    if not utility.curved:
        return rows, None
    p = z.softmax(1)
    pz = p * z0
    second = request.order > 1
    common = torch.cat((p, pz)) @ weight if second else p @ weight  # [2N, C]
    on_p = common[: p.shape[0], None]
    p_c = p.gather(1, targets)

    def combine(coefficients: Any, on_pv: Tensor | None) -> Tensor:
        a, b, d = (c[:, :, None] if isinstance(c, Tensor) else c for c in coefficients)
        out = a * rows + b * on_p
        return out if on_pv is None else out + d * on_pv

    gradient = combine(utility.gradient(p_c), None)
    if not second:
        return gradient, None
    s = pz.sum(1, keepdim=True)
    return gradient, combine(utility.curvature(p_c, z0.gather(1, targets), s), common[p.shape[0] :, None])


def _dense_rows(request: Request, z: Tensor, z0: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
    """The same for a user's own utility: its derivatives in z by autograd, which are small."""
    gradients, hvps = [], []
    for m in range(targets.shape[1]):
        with torch.enable_grad():
            leaf = z.detach().requires_grad_(True)
            value = evaluate(request.utility, leaf, leaf, targets[:, m], leaf.shape[0])
            gradient, hvp = _differentiate(value, [leaf], z0, request.order > 1, keep=False)[0]
        gradients.append(gradient @ weight)
        hvps.append(None if hvp is None else hvp @ weight)
    zero = torch.zeros_like(gradients[0])
    second = [zero if hvp is None else hvp for hvp in hvps]
    return torch.stack(gradients, 1), torch.stack(second, 1) if any(h is not None for h in hvps) else None


# --------------------------------------------------------------------------------------------------------- autograd


def _cut_off(gradient: Tensor) -> bool:
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


def _differentiate(
    value: Tensor, inputs: list[Tensor], vector: Tensor | None, second: bool, keep: bool, trial: bool = False
) -> list[tuple[Tensor, Tensor | None]]:
    """(gradient, Hessian-vector product or None where it is structurally zero) for each of ``inputs``."""
    if not value.requires_grad:
        raise DerivativeError(
            "There is no differentiable path from the target layer to the utility. The layer runs beside the classifier, "
            "or the model detaches, rounds, or switches gradients off behind it. Choose a layer the logits depend on."
        )
    gradients = torch.autograd.grad(value.sum(), inputs, create_graph=second, retain_graph=keep or second, allow_unused=True)
    found: list[tuple[Tensor, Tensor | None]] = []
    for i, (gradient, source) in enumerate(zip(gradients, inputs, strict=True)):
        if gradient is None:
            raise DerivativeError(
                f"There is no path from target layer number {i} to the utility: choose a layer the logits depend on."
            )
        hvp = None
        if second and trial and _cut_off(gradient):
            raise DerivativeError(
                "Engine reverse_over_reverse cannot differentiate the head twice: it contains a function marked "
                "once_differentiable, behind which torch would take the Hessian for zero. Use engine='midpoint' (approximate) "
                "or a first-order method such as 'gradcam'."
            )
        if second and gradient.requires_grad:
            last = not keep and i == len(inputs) - 1
            direction = source.detach() if vector is None else vector
            (hvp,) = torch.autograd.grad(gradient, source, direction, retain_graph=not last, allow_unused=True)
        found.append((gradient.detach() if second else gradient, None if hvp is None else hvp.detach()))
    return found


def reverse_over_reverse(request: Request) -> Derived:
    """Gradient, and its vector-Jacobian product with the activations, for all layers in one forward pass.

    Raises:
        DerivativeError: no path from a layer to the utility, or an operator without a double backward.
    """
    with request.capture(gradients=request.order > 0) as capture:
        outputs = capture.run(request.images)
        derived, values = _start(request, capture, outputs, "reverse_over_reverse")
        if request.order > 0:
            _fill(request, capture, derived, values)
    _add_baseline(request, derived, values)
    return derived


def _start(request: Request, capture: Capture, outputs: Any, engine: str) -> tuple[Derived, list[Tensor]]:
    logits = request.utility.logits_of(outputs)
    targets, poison = place_targets(request.targets, logits, request.images.shape[0], request.images.device)
    # What the caller keeps must not keep the head's graph alive.
    kept = tree_map_only(Tensor, Tensor.detach, outputs)
    derived = Derived(kept, None if logits is None else logits.detach(), targets, request.terms(capture), engine, poison=poison)
    if request.order == 0:
        return derived, []
    with torch.enable_grad():
        return derived, _values(request, outputs, targets)


def _fill(request: Request, capture: Capture, derived: Derived, values: list[Tensor]) -> None:
    inputs = [site.activations for site in capture.sites if site.activations is not None]
    for m, value in enumerate(values):
        keep = m < len(values) - 1
        try:
            pairs = _differentiate(value, inputs, None, request.order > 1, keep, request.trial)
        except RuntimeError as error:
            raise _missing_derivative(error, "reverse_over_reverse") from error
        for term, (gradient, hvp) in zip(derived.terms, pairs, strict=True):
            term.gradients.append(term.layout.view(gradient))
            term.hvps.append(None if hvp is None else term.layout.view(hvp))


def _missing_derivative(error: RuntimeError, engine: str) -> Exception:
    if isinstance(error, DerivativeError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return error
    text = str(error)
    signs = ("not implemented", "does not support", "not supported", "double backward", "forward AD", "forward mode AD")
    if any(sign in text for sign in signs):
        return DerivativeError(
            f"Engine {engine} cannot differentiate an operator of the head: {text.splitlines()[0]} engine='auto' tries both "
            "exact engines; engine='midpoint' is approximate, and a first-order method such as 'gradcam' needs neither."
        )
    return error


def forward_over_reverse(request: Request) -> Derived:
    """The reverse pass on dual numbers; one forward pass per target layer.

    Raises:
        DerivativeError: an operator of the head has no forward-mode derivative, or no path to the utility.
    """
    if request.order < 2:
        derived = reverse_over_reverse(request)
        derived.engine = "forward_over_reverse"
        return derived
    parts: list[Derived] = []
    for layer in request.layers:
        one = replace(request, layers=[layer])
        with _DUAL_LEVEL, forward_ad.dual_level(), one.capture(gradients=True, dual=True) as capture:
            try:
                outputs = capture.run(one.images)
                derived, values = _start(one, capture, outputs, "forward_over_reverse")
                _fill_dual(capture, derived, values)
            except RuntimeError as error:
                raise _missing_derivative(error, "forward_over_reverse") from error
            if request.baseline:
                derived.value = torch.stack([forward_ad.unpack_dual(v).primal.detach() for v in values], 1)
            derived.logits = None if derived.logits is None else forward_ad.unpack_dual(derived.logits).primal
            if isinstance(derived.outputs, Tensor):
                derived.outputs = forward_ad.unpack_dual(derived.outputs).primal
        parts.append(derived)
    whole = parts[0]
    whole.terms = [part.terms[0] for part in parts]
    _add_baseline(request, whole, [])
    return whole


def _fill_dual(capture: Capture, derived: Derived, values: list[Tensor]) -> None:
    [site], [term] = capture.sites, derived.terms
    assert site.activations is not None
    for m, value in enumerate(values):
        [(gradient, _)] = _differentiate(value, [site.activations], None, False, keep=m < len(values) - 1)
        primal, tangent = forward_ad.unpack_dual(gradient)
        term.gradients.append(term.layout.view(primal.detach()))
        term.hvps.append(None if tangent is None else term.layout.view(tangent.detach()))


def midpoint(request: Request) -> Derived:
    """``w = ∇U(A/2)`` in place of ``g - HA/2``, written as the Hessian-vector product ``2 (g - w)``; two forward passes.

    Raises:
        DerivativeError: no path from a layer to the utility.
    """
    first = replace(request, order=min(request.order, 1))
    derived = reverse_over_reverse(first)
    derived.engine = "midpoint"
    if request.order > 1:
        for i, term in enumerate(derived.terms):
            half = replace(first, layers=[request.layers[i]], targets=derived.targets, baseline=False)
            with half.capture(gradients=True, replace=lambda _, found: found * 0.5) as capture:
                outputs = capture.run(half.images)
                middle, values = _start(half, capture, outputs, "midpoint")
                _fill(half, capture, middle, values)
            weights = middle.terms[0].gradients
            term.hvps = [2 * (g - w) for g, w in zip(term.gradients, weights, strict=True)]
    return derived


def _add_baseline(request: Request, derived: Derived, values: list[Tensor]) -> None:
    if not request.baseline:
        return
    if len(request.layers) != 1:
        raise InputError("The completeness gap is defined for one target layer; ask for it with a single layer.")
    if values:
        derived.value = torch.stack([value.detach() for value in values], 1)
    with request.capture(gradients=False, replace=lambda _, found: torch.zeros_like(found)) as capture:
        outputs = capture.run(request.images)
        derived.baseline = torch.stack(_values(request, outputs, derived.targets), 1)


def probe(request: Request, linear: nn.Linear, seed: int = 0) -> tuple[Tensor, Tensor, Layout]:
    """Run the head on random activations of both signs: (their view [N, C, S], the logits, the layout).

    What ``closed_form`` rests on: a head that is ``W·mean_s(A) + b`` for these is so for all.
    """
    given: list[Tensor] = []

    def scramble(_: int, found: Tensor) -> Tensor:
        generator = torch.Generator(found.device).manual_seed(seed)
        noise = torch.randn(found.shape, generator=generator, device=found.device, dtype=torch.float32)
        scale = 4 * found.float().abs().amax().nan_to_num(1.0).clamp(1.0, 1e3)
        given.append((noise * scale).to(found.dtype))
        return given[0].clone()

    with request.capture(gradients=False, replace=scramble) as capture:
        outputs = capture.run(request.images)
    layout = request.terms(capture)[0].layout
    logits = request.utility.logits_of(outputs)
    assert logits is not None
    return layout.view(given[0]), logits, layout
