"""The closed form behind a head ``z = W·mean_s(A) + b``: no autograd through the model at all.

With ``z₀ = z - z_B`` (``z - b`` for the baseline zero), gradient and Hessian-vector product are ``Wᵀu'/S`` and
``Wᵀ(U''z₀)/S``, constant over the positions, where ``u'`` and ``U''`` are the utility's derivatives in the logits (arXiv
2501.06261, section 4.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..model.capture import Capture
from ..model.pooled_linear import Outdated
from ..utilities.named import Utility, evaluate
from .autograd import differentiate
from .path import background
from .terms import Derivatives, Request


def closed_form(request: Request) -> Derivatives:
    """The closed form; the request's head says which classifier reads the mean of the activations.

    Raises:
        Outdated: this forward pass did not end in that classifier, or it did not read that mean.
    """
    assert request.head is not None
    with request.capture(gradients=False, linear=request.head.linear) as capture:  # gradients are off in there
        found, outputs = forward(request, capture, "closed_form")
        _fill(request, found)
        add_values(request, found, outputs)
    return found


def forward(request: Request, capture: Capture, engine: str) -> tuple[Derivatives, Any]:
    """A forward pass that is seen to end in the pool-and-linear head: (the answer as far as it goes, the model's outputs).

    Raises:
        Outdated: as :func:`closed_form`.
    """
    assert request.head is not None
    outputs = capture.run(request.inputs)
    if capture.layers[0].written and not request.writes:
        raise Outdated("an operator writes into the target layer's output")
    found = request.start(capture, outputs, engine)
    [term] = found.terms
    found.mark(request.head.still_holds(capture, found.logits, term.activations))
    assert found.logits is not None and found.targets is not None
    return found, outputs


def logits_at_baseline(request: Request, found: Derivatives) -> Tensor:
    """What the head says of the baseline, [N, K] or [1, K], float32 or float64."""
    assert request.head is not None and found.logits is not None
    linear, wide = request.head.linear, torch.promote_types(found.logits.dtype, torch.float32)
    if request.path.from_zero:
        return (
            found.logits.new_zeros((1, found.logits.shape[1]), dtype=wide)
            if linear.bias is None
            else linear.bias[None].to(wide)
        )
    [term] = found.terms
    mean = background(request.path.baseline, term.activations).mean(2, dtype=wide)
    return torch.nn.functional.linear(mean, linear.weight.to(wide), None if linear.bias is None else linear.bias.to(wide))


def add_values(request: Request, found: Derivatives, outputs: Any) -> None:
    """U(A) and U(B), if asked for."""
    if request.with_baseline:
        assert found.logits is not None
        found.value = torch.stack(request.values(outputs, found.targets), 1)
        start = logits_at_baseline(request, found).to(found.logits.dtype).expand_as(found.logits)
        found.baseline = torch.stack(request.values(start, found.targets, start), 1)


def _fill(request: Request, found: Derivatives) -> None:
    assert request.head is not None and found.logits is not None and found.targets is not None
    [term], linear, utility = found.terms, request.head.linear, request.utility
    weight = linear.weight
    scale = 1 / max(term.activations.shape[2], 1)
    if request.weights_only and utility.fused and (request.path.from_zero or request.order < 2):
        weights = ops.utility_rows(
            found.logits,
            found.targets,
            linear.bias,
            utility=utility.name,
            order=request.order,
            scale=scale,
            backend=request.backend,
        )
        term.weights = ops.head_weights(weights, weight, backend=request.backend)
        return
    z = found.logits if found.logits.dtype in (torch.float32, torch.float64) else found.logits.float()
    z0 = z - logits_at_baseline(request, found)
    first, second = logit_derivatives(utility, z, z0, found.targets, request.order)
    gradient = ops.head_weights(first, weight, backend=request.backend) * scale
    hvp = None if second is None else ops.head_weights(second, weight, backend=request.backend) * scale
    term.gradients = [gradient[:, m, :, None] for m in range(gradient.shape[1])]
    term.hvps = [None if hvp is None else hvp[:, m, :, None] for m in range(gradient.shape[1])]


def logit_derivatives(utility: Utility, z: Tensor, z0: Tensor, targets: Tensor, order: int) -> tuple[Tensor, Tensor | None]:
    """``dU/dz`` and ``(d²U/dz²) z₀``, [N, M, K]; the second is None at order 1, or where it is structurally zero.

    From the utility's coefficients where it has them, else by autograd, which is small here.

    Args:
        utility: any utility of logits.
        z, z0: [N, K], float32 or float64.
        targets: int64 [N, M].
        order: 1 or 2.
    """
    if utility.gradient is None:
        return by_autograd(utility, z, z0, targets, order)
    p = z.softmax(1)
    p_c = p.gather(1, targets)
    first = combine(utility.gradient(p_c), targets, p, p * z0)
    if order < 2 or not utility.curved:
        return first, None
    assert utility.curvature is not None
    s = (p * z0).sum(1, keepdim=True)
    return first, combine(utility.curvature(p_c, z0.gather(1, targets), s), targets, p, p * z0)


def combine(coefficients: tuple[Tensor | float, ...], targets: Tensor, p: Tensor, pv: Tensor | None) -> Tensor:
    """``a e_c + b p + d p*v`` [N, M, K]."""
    a, b, d = (c.expand_as(targets)[:, :, None] if isinstance(c, Tensor) else c for c in coefficients)
    dense = b * p[:, None]
    if pv is not None:
        dense = dense + d * pv[:, None]
    dense = dense.expand(*targets.shape, p.shape[1])
    at_class = a.to(p.dtype) if isinstance(a, Tensor) else p.new_full((), a).expand(*targets.shape, 1)
    return dense.scatter_add(2, targets[:, :, None], at_class)


def by_autograd(utility: Utility, z: Tensor, z0: Tensor, targets: Tensor, order: int) -> tuple[Tensor, Tensor | None]:
    """The same as :func:`logit_derivatives`, from the utility's value alone."""
    firsts, seconds = [], []
    for m in range(targets.shape[1]):
        with torch.enable_grad():
            leaf = z.detach().requires_grad_(True)
            value = evaluate(utility, leaf, leaf, targets[:, m], leaf.shape[0])
            [(first, second)] = differentiate(value, [leaf], [z0], order > 1, keep=False)
        firsts.append(first)
        seconds.append(second)
    if all(second is None for second in seconds):
        return torch.stack(firsts, 1), None
    zero = torch.zeros_like(z)
    return torch.stack(firsts, 1), torch.stack([zero if second is None else second for second in seconds], 1)
