"""``w = Σ ω_k ∇U(B + t_k (A - B))``: the gradient's mean along the path from the baseline, by Gauss-Legendre nodes.

``A·w`` is the diagonal (Aumann-Shapley) value, to which the Shapley values of many small players tend; the second-order
methods take w in the place of ``g - HA/2``, of which it needs no second derivative. Exact for utilities polynomial of degree
2K along the path. Behind a pool-and-linear head a node costs one softmax; elsewhere one forward and backward pass of the head,
many of them at once.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .. import ops
from ..errors import InputError
from ..model.head import Head
from ..ops.shared import MOST_NODES
from ..utilities.named import Utility
from .autograd import explain, still
from .closed_form import add_values, by_autograd, combine, forward, logits_at_baseline
from .closed_form import closed_form as _closed_form
from .features import reverse_over_reverse
from .integral import Integral, Point, utilities_and_gradients
from .path import gauss_legendre
from .terms import Derivatives, HeadRows, Request

# Completeness gaps below this share of |U(A)| + |U(B)| are rounding.
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}


def quadrature(request: Request) -> Derivatives:
    """The path's integral in the place of ``g - HA/2``; for a first-order method the gradient at A.

    Raises:
        DerivativeError: no path from a layer to the utility.
        Outdated: the head is not what was learned about it.
    """
    pooled = request.head is not None and not request.path.masks
    if request.order < 2:
        found = _closed_form(request) if pooled else reverse_over_reverse(request)
    elif pooled:
        with torch.no_grad():
            found = _pooled(request)
    else:
        found = _any_head(request)
    found.engine = "quadrature"
    return found


def midpoint(request: Request) -> Derivatives:
    """:func:`quadrature` with one node: ``w = ∇U((A + B)/2)``."""
    found = quadrature(replace(request, path=replace(request.path, nodes=1)))
    found.engine = "midpoint"
    return found


def _counts(nodes: int | str) -> tuple[int, ...]:
    """The numbers of nodes to try, one after the other."""
    if isinstance(nodes, int):
        return (nodes,)
    return tuple(2**i for i in range(MOST_NODES.bit_length()))


def _reached(gap: Tensor, value: Tensor, baseline: Tensor, tolerance: float) -> Tensor:
    """Bool: whether every gap is below the tolerance, relative to |U(A) - U(B)|; NaN is not waited for."""
    floor = _ROUNDING.get(value.dtype, 1e-2) * (value.abs() + baseline.abs())
    return ~(gap.abs() > torch.maximum(tolerance * (value - baseline).abs(), floor)).any()


def _conclude(request: Request, found: Derivatives, count: int, reached: bool) -> None:
    found.nodes = count
    if not reached:
        found.notes = (
            *found.notes,
            f"The completeness gap is still above the tolerance of {request.path.tolerance:g} with {count} nodes: the head is "
            "not smooth along the path (kinks, or a normalisation near its singularity). See with_gap=True; another baseline "
            "such as 'mean' may help.",
        )


# ------------------------------------------------------------------------------------------------ pool-and-linear heads


def _pooled(request: Request) -> Derivatives:
    """K softmaxes, and one product with the classifier's weight."""
    assert request.head is not None
    with request.capture(gradients=False, linear=request.head.linear) as capture:
        found, outputs = forward(request, capture, "quadrature")
    assert found.logits is not None and found.targets is not None
    [term], weight, targets = found.terms, request.head.linear.weight, found.targets
    automatic = request.path.nodes == "auto"
    if request.with_baseline or automatic:
        add_values(replace(request, with_baseline=True), found, outputs)
    scale = 1 / max(term.activations.shape[2], 1)
    z = found.logits if found.logits.dtype in (torch.float32, torch.float64) else found.logits.float()

    def integral(count: int) -> Tensor:
        return _logit_weights(request, found, z, *gauss_legendre(count))  # [N, M, K]

    count, reached = _counts(request.path.nodes)[-1], True
    if automatic:
        # All of them, and one question to the device: a softmax costs less than waiting for it.
        assert found.value is not None and found.baseline is not None
        step = z - logits_at_baseline(request, found)
        tried = [integral(each) for each in _counts("auto")]
        gaps = [found.value - found.baseline - (u * step[:, None]).sum(2) for u in tried]
        good = torch.stack([_reached(gap, found.value, found.baseline, request.path.tolerance) for gap in gaps]).tolist()
        chosen = good.index(True) if any(good) else len(good) - 1
        count, reached, rows = _counts("auto")[chosen], any(good), tried[chosen]
    else:
        rows = integral(count)
    weights = ops.head_weights(rows * scale, weight, backend=request.backend)  # [N, M, C]
    if request.weights_only:
        term.weights = weights
    else:
        first = ops.head_weights(_gradients(request.utility, z, targets), weight, backend=request.backend) * scale
        term.gradients = [g[:, :, None] for g in first.unbind(1)]
        term.position_weights = [w[:, :, None] for w in weights.unbind(1)]
    _conclude(request, found, count, reached)
    return found


def _logit_weights(
    request: Request, found: Derivatives, z: Tensor, nodes: tuple[float, ...], weights: tuple[float, ...]
) -> Tensor:
    """``Σ ω_k U'(z_B + t_k (z - z_B))`` [N, M, K]."""
    assert found.targets is not None and found.logits is not None and request.head is not None
    targets, path = found.targets, request.path
    if request.utility.fused:
        return ops.utility_rows(
            found.logits,
            targets,
            request.head.linear.bias if path.from_zero else None,
            utility=request.utility.name,
            nodes=nodes,
            weights=weights,
            base=None if path.from_zero else logits_at_baseline(request, found).expand_as(z),
            backend=request.backend,
        )
    start = logits_at_baseline(request, found)
    total: Tensor | None = None
    for t, share in zip(nodes, weights, strict=True):
        here = _gradients(request.utility, start + t * (z - start), targets) * share
        total = here if total is None else total + here
    assert total is not None
    return total


def _gradients(utility: Utility, z: Tensor, targets: Tensor) -> Tensor:
    """dU/dz [N, M, K]."""
    if utility.gradient is None:
        return by_autograd(utility, z, z, targets, 1)[0]
    p = z.softmax(1)
    return combine(utility.gradient(p.gather(1, targets)), targets, p, None)


# ------------------------------------------------------------------------------------------------------- any other head


def _any_head(request: Request) -> Derivatives:
    rows = request.rows or HeadRows()
    request = replace(request, rows=rows)
    automatic = request.path.nodes == "auto"
    if len(request.layers) > 1 and (automatic or request.with_baseline):
        raise InputError("The completeness gap is defined for one target layer; ask for it, and for nodes='auto', with one.")
    with_gap = automatic or request.with_baseline
    counts = _counts(request.path.nodes)
    try:
        found, integrals, left = _first_pass(request, counts[0], with_gap)
        reached = True
        for index, count in enumerate(counts):
            if index:
                integrals = [Integral(request, each.layers, each.raws, each.terms) for each in integrals]
                left = [each.schedule(count, False) for each in integrals]
            for integral, todo in zip(integrals, left, strict=True):
                together = max(1, integral.per_pass()) if rows.alone else 1
                for first in range(0, len(todo), together):
                    integral.run(todo[first : first + together], found.targets)
                for i, term in enumerate(integral.terms):
                    term.position_weights = integral.weights(i, found.classes)
                _look(found, integral)
            if with_gap and not index:
                value, reached_points = integrals[0].values()
                [start] = [t for t, point in enumerate(reached_points) if not point.share]
                found.baseline = value[:, start].T
            if not automatic:
                break
            assert found.value is not None and found.baseline is not None
            reached = bool(_reached(found.gap(2), found.value, found.baseline, request.path.tolerance))
            if reached:
                break
    except RuntimeError as error:
        explain(error, "quadrature", request.writes)
        raise
    if request.path.masks:
        found.standard_errors = [
            integral.standard_error(i, found.classes) for integral in integrals for i in range(len(integral.terms))
        ]
    _conclude(request, found, count, reached)
    return found


def _first_pass(request: Request, count: int, with_gap: bool) -> tuple[Derivatives, list[Integral], list[list[Point]]]:
    """The images' own forward pass, whose head takes the points along if it stands alone.

    Returns:
        the answer without weights, the integrals, and the points that each of them still lacks.
    """
    assert request.rows is not None
    integrals: list[Integral] = []
    part: list[Point] = []
    left: list[list[Point]] = []

    def stack(_: int, activations: Tensor) -> Tensor:
        integral = Integral(request, list(request.layers), [activations], [request.term(*request.layers[0], activations)])
        todo = integral.schedule(count, with_gap)
        fit = max(0, integral.per_pass() - 1)
        part[:], left[:] = todo[:fit], [todo[fit:]]
        integrals[:] = [integral]
        return torch.cat((activations, integral.at(0, part))) if part else activations

    stacked = request.rows.alone
    wanted = stacked or not request.weights_only
    with request.capture(gradients=wanted, replace=stack if stacked else None) as capture:
        outputs = capture.run(request.inputs)
        still(request, capture)
        if not stacked:
            raws = [captured.activations.detach() for captured in capture.layers if captured.activations is not None]
            integrals = _groups(request, raws)
            left = [each.schedule(count, with_gap) for each in integrals]
        batch, copies = request.batch, len(part) + 1

        def own(tensor: Tensor) -> Tensor:
            return tensor[:batch] if tensor.ndim and tensor.shape[0] == batch * copies else tensor

        kept = outputs if copies == 1 else tree_map_only(Tensor, own, outputs)
        terms = [term for integral in integrals for term in integral.terms]
        found = request.start(capture, kept, "quadrature", terms)
        if part or not request.weights_only:
            values, gradients = utilities_and_gradients(request, capture, outputs, found.targets, copies)
            for layers in gradients if not request.weights_only else ():
                for term, gradient in zip(terms, layers, strict=True):
                    term.gradients.append(term.layout.view(gradient[:batch]))
            if part:
                rest = [[gradient[batch:] for gradient in layers] for layers in gradients]
                integrals[0].add(part, rest, [value[batch:] for value in values])
        else:
            values = request.values(outputs, found.targets)
        found.value = torch.stack([value.detach()[:batch] for value in values], 1)
    return found, integrals, left


def _groups(request: Request, raws: list[Tensor]) -> list[Integral]:
    """The layers that go along one path together: all of them, unless one lies behind another."""
    assert request.rows is not None
    terms = [request.term(*layer, raw) for layer, raw in zip(request.layers, raws, strict=True)]
    if not request.rows.apart:
        grids = {term.layout.grid for term in terms}
        if request.path.masks and len(grids) > 1:
            raise InputError(
                f"masks= keeps the same positions in all target layers, but theirs are {', '.join(map(str, sorted(grids)))}: "
                "explain them one by one, or without masks."
            )
        return [Integral(request, list(request.layers), raws, terms)]
    return [Integral(request, [layer], [raw], [term]) for layer, raw, term in zip(request.layers, raws, terms, strict=True)]


def _look(found: Derivatives, integral: Integral) -> None:
    """Mark images whose utility is not finite somewhere on the path, and say where."""
    values, at = integral.values()
    assert found.value is not None
    found.mark((values * 0).sum((0, 1)))
    if values.device.type != "cpu" or bool(values.isfinite().all()):
        return
    wrong = ~values.isfinite().all(0) & found.value.isfinite().all(1)  # [T, N]
    if bool(wrong.any()):
        t, images = int(wrong.any(1).nonzero()[0]), wrong.any(0).nonzero().flatten().tolist()
        found.undefined = frozenset(images)
        found.notes = (
            *found.notes,
            f"The head gives NaN or Inf at t = {at[t].t:.4g} of the path from the baseline to the activations, for images "
            f"{images}: their maps are NaN. Choose another baseline (such as 'mean') or another engine.",
        )


def head_rows(request: Request) -> HeadRows:
    """Find out, on a few images, whether the head stands alone, and whether one target layer lies behind another."""
    layers = list(request.layers)
    if len(layers) == 1:
        return HeadRows(alone=not Head(request.model, layers[0], request.inputs).bypassed)
    with request.capture(gradients=True) as capture:
        capture.run(request.inputs)
        found = [captured.activations for captured in capture.layers if captured.activations is not None]
        return HeadRows(apart=any(_reaches(one, other) for one in found for other in found if one is not other))


def _reaches(source: Tensor, other: Tensor) -> bool:
    """Whether ``other`` was computed from ``source``."""
    if other.is_leaf:
        return False
    (gradient,) = torch.autograd.grad(other.sum(), source, retain_graph=True, allow_unused=True)
    return gradient is not None
