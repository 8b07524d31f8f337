"""Many classes through few features, where the logits are a linear layer of features ``y``: ``z = W y + b``.

Gradient and Hessian-vector product of every class are then combinations of those of the features,
``g = Σ_i (Wᵀu')_i ∇y_i`` and ``HA = Σ_i (Wᵀu')_i H_i A + Σ_i (WᵀU''ż)_i ∇y_i`` with ``ż = Wẏ`` and ``ẏ_i = ⟨∇y_i, A⟩``,
where ``u'`` and ``U''`` are the utility's derivatives in the logits. A thousand classes over 192 features cost 192 passes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.capture import Capture
from ..model.pooled_linear import same_tensor
from . import autograd
from .closed_form import logit_derivatives
from .terms import Derivatives, Request, Terms

# Nodes of a graph that make a pass through the head dearer than a class's share of the combination.
_PRODUCTS = ("AddmmBackward", "MmBackward", "BmmBackward", "BaddbmmBackward", "ConvolutionBackward", "LinearBackward")


def reverse_over_reverse(request: Request) -> Derivatives:
    """As :func:`shapleycam.derivatives.autograd.reverse_over_reverse`, for more classes than features by way of the features.

    Raises:
        DerivativeError, Outdated: as there.
    """
    linear = _classifier(request)
    found = None if linear is None else _by_features(request, linear)
    return autograd.reverse_over_reverse(request) if found is None else found


def serves(request: Request) -> bool:
    """Whether the features are the shorter way, as far as that is known before the forward pass."""
    return _classifier(request) is not None


def _classifier(request: Request) -> nn.Linear | None:
    """The last linear layer of the model, if it reads fewer features than classes are asked for."""
    targets: Any = request.targets
    if not isinstance(targets, Tensor) or targets.ndim != 2 or request.with_baseline:
        return None
    if request.order > 1 and not request.path.from_zero:
        return None  # the product's vector is the layer's output here
    linears = [module for module in request.model.modules() if isinstance(module, nn.Linear)]
    if not linears or type(linears[-1]).forward is not nn.Linear.forward:
        return None
    return linears[-1] if linears[-1].in_features < targets.shape[1] else None


def _by_features(request: Request, linear: nn.Linear) -> Derivatives | None:
    """The answer, or None where the logits are not that layer's output or the passes are too cheap to be worth saving."""
    try:
        with request.capture(gradients=True, linear=linear) as capture:
            outputs = capture.run(request.inputs)
            found = request.start(capture, outputs, "reverse_over_reverse")
            features = _features(request, linear, capture.linear_calls, outputs, found)
            if features is None:
                return None
            _fill(request, capture, found, features, linear.weight.detach())
            autograd.still(request, capture)
    except RuntimeError as error:
        autograd.explain(error, "reverse_over_reverse", request.writes)
        raise
    return found


def _features(
    request: Request, linear: nn.Linear, calls: list[tuple[Tensor, Tensor]], outputs: Any, found: Derivatives
) -> Tensor | None:
    """What the classifier read, [N, D], where that tells everything; images are marked where only the device knows."""
    z, utility = found.logits, request.utility
    if len(calls) != 1 or z is None or found.targets is None:
        return None
    if not utility.sees_logits_only(outputs, utility.logits_of(outputs)):
        return None
    [(y, out)] = calls
    exact = (torch.float32, torch.float64)
    if y.ndim != 2 or not same_tensor(out, z) or y.dtype not in exact or not y.dtype == z.dtype == linear.weight.dtype:
        return None
    if not y.requires_grad or not _products(y):
        return None
    # A hook, or an operator that writes into the logits, may have come between.
    plain = F.linear(y.detach(), linear.weight.detach(), None if linear.bias is None else linear.bias.detach())
    off = (plain - z).abs().amax(1) > 1e3 * torch.finfo(z.dtype).eps * plain.abs().amax(1)
    if z.device.type == "cpu":
        return None if bool(off.any()) else y
    found.mark(torch.where(off, float("nan"), 0.0))
    return y


def _products(y: Tensor) -> bool:
    """Whether a matrix product or a convolution lies between a target layer and ``y``."""
    waiting, known = [y.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in known:
            continue
        if node.name().startswith(_PRODUCTS):
            return True
        known.add(node)
        waiting.extend(following for following, _ in node.next_functions)
    return False


def _fill(request: Request, capture: Capture, found: Derivatives, y: Tensor, weight: Tensor) -> None:
    assert found.logits is not None and found.targets is not None
    leaves = [captured.activations for captured in capture.layers if captured.activations is not None]
    width, second = y.shape[1], request.order > 1
    # Per layer, [2D, N, ...]: the gradients of the features, then their Hessian-vector products.
    rows = [leaf.new_zeros((width * (1 + second), *leaf.shape)) for leaf in leaves]
    flat = [True] * len(leaves)
    for i in range(width):
        with torch.enable_grad():
            value = y[:, i]
        pairs = autograd.differentiate(value, leaves, None, second, i < width - 1, request.find_cuts, request.model)
        for index, (gradient, hvp) in enumerate(pairs):
            rows[index][i] = gradient
            if hvp is not None:
                rows[index][width + i] = hvp
                flat[index] = False
    for term, leaf, row, straight in zip(found.terms, leaves, rows, flat, strict=True):
        row = row.flatten(2)
        gradients = row[:width]
        direction = torch.einsum("dnx,nx->nd", gradients, leaf.detach().flatten(1)) @ weight.T  # ż [N, K]
        first, curved = logit_derivatives(request.utility, found.logits, direction, found.targets, request.order)
        first = first @ weight  # [N, M, D]
        bent = None if curved is None else curved @ weight
        term.gradients = _combined(first, gradients, term, leaf)
        if straight:
            hvps = None if bent is None else _combined(bent, gradients, term, leaf)
        else:
            bent = torch.zeros_like(first) if bent is None else bent
            hvps = _combined(torch.cat((bent, first), 2), row, term, leaf)
        term.hvps = [None] * len(term.gradients) if hvps is None else list(hvps)


def _combined(weights: Tensor, rows: Tensor, term: Terms, leaf: Tensor) -> list[Tensor]:
    """The rows [D, N, X] combined by weights [N, M, D], as a view [N, C, S] per class."""
    combined = torch.einsum("nmd,dnx->mnx", weights, rows)
    return [term.layout.view(each.view(leaf.shape)) for each in combined]
