"""``w = ∇U(A/2)``: one gradient halfway to the baseline instead of a second derivative. Never chosen by ``engine="auto"``."""

from __future__ import annotations

from dataclasses import replace

from .autograd import reverse_over_reverse
from .terms import Derivatives, Request


def midpoint(request: Request) -> Derivatives:
    """``w = ∇U(A/2)`` in place of ``g - HA/2``, written as the Hessian-vector product ``2 (g - w)``; two forward passes.

    Equal to the Shapley weight for utilities quadratic in A only.

    Raises:
        DerivativeError: no path from a layer to the utility.
    """
    first = replace(request, order=min(request.order, 1))
    found = reverse_over_reverse(first)
    found.engine = "midpoint"
    if request.order < 2:
        return found
    for layer, term in zip(request.layers, found.terms, strict=True):
        half = replace(first, layers=[layer], targets=found.targets, with_baseline=False, halved=True)
        weights = reverse_over_reverse(half).terms[0].gradients
        term.hvps = [2 * (g - w) for g, w in zip(term.gradients, weights, strict=True)]
    return found
