"""weighted_reduce: the signed map of one method row."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .operator import Operator
from .shared import POOLINGS, accumulator, check_floating, refuse_gradients
from .tolerance import Expected, within

EPS_ACTIVATION = 1e-7  # of the rows "activation" (XGradCAM, ShapleyCAM-X)
EPS_PLUSPLUS = 1e-6  # of GradCAM++


def check(activations: Tensor, gradient: Tensor, hvp: Tensor | None, pooling: str) -> None:
    """Raise InputError unless the arguments are [N, C, S] alike, on one device, and the pooling is known."""
    operator = "weighted_reduce"
    check_floating("activations", activations, operator)
    if activations.ndim != 3 or activations.shape[1] == 0 or activations.shape[2] == 0:
        raise InputError(f"{operator}: activations must be [N, C, S] with C, S >= 1, got shape {tuple(activations.shape)}.")
    if pooling not in POOLINGS:
        raise InputError(f"{operator}: unknown pooling {pooling!r}; expected one of {', '.join(POOLINGS)}.")
    for name, tensor in (("gradient", gradient), ("hvp", hvp)):
        if tensor is None:
            continue
        check_floating(name, tensor, operator)
        if tensor.shape != activations.shape or tensor.device != activations.device:
            raise InputError(
                f"{operator}: {name} must be {tuple(activations.shape)} on {activations.device} like the activations, "
                f"got {tuple(tensor.shape)} on {tensor.device}. A constant weight is passed as tensor.expand_as(activations)."
            )


def reference(activations: Tensor, gradient: Tensor, hvp: Tensor | None, pooling: str) -> Tensor:
    """The signed map [N, S] of one method row; see :func:`shapleycam.ops.weighted_reduce`."""
    wide = accumulator(activations.dtype)
    a = activations.to(wide)
    w = gradient.to(wide)
    if hvp is not None:
        w = w - hvp.to(wide) / 2
    if pooling == "mean":
        weight = w.mean(2, keepdim=True)
    elif pooling == "elementwise":
        weight = w
    elif pooling == "elementwise_relu":
        # clamp and relu keep NaN; a comparison would not
        return (w * a).clamp_min(0).sum(1)
    elif pooling == "activation":
        weight = (w * a).sum(2, keepdim=True) / (a.sum(2, keepdim=True) + EPS_ACTIVATION)
    elif pooling == "positive_gradient":
        weight = w.clamp_min(0)
    else:
        square = w * w
        ratio = square / (2 * square + square * w * a.sum(2, keepdim=True) + EPS_PLUSPLUS)
        weight = torch.where(w != 0, w.clamp_min(0) * ratio, torch.zeros_like(w)).sum(2, keepdim=True)
    return (weight * a).sum(1)


def empty(activations: Tensor, gradient: Tensor, hvp: Tensor | None, pooling: str) -> Tensor:
    """The result, not filled: [N, S]."""
    shape = (activations.shape[0], activations.shape[2])
    return torch.empty(shape, dtype=accumulator(activations.dtype), device=activations.device)


def _magnitude(a: Tensor, g: Tensor, h: Tensor | None, pooling: str) -> Tensor:
    """The sum of the magnitudes of what is added up to each element, [N, S]; a quotient's counts the error of its divisor."""
    terms = g.abs() if h is None else g.abs() + h.abs() / 2
    size = a.abs()
    if pooling == "mean":
        return (terms.mean(2, keepdim=True) * size).sum(1)
    if pooling not in ("activation", "plusplus"):
        return (terms * size).sum(1)
    total, sizes = a.sum(2, keepdim=True), size.sum(2, keepdim=True)
    if pooling == "activation":
        divisor = (total + EPS_ACTIVATION).abs()
        weight = (terms * size).sum(2, keepdim=True) / divisor * (1 + sizes / divisor)
        return (weight * size).sum(1)
    w = g if h is None else g - h / 2
    divisor = (2 * w**2 + w**3 * total + EPS_PLUSPLUS).abs()
    # The weight is w³ / divisor: the error of w = g - h/2 counts by the derivative, that of the divisor by its own terms.
    slope = (3 * w**2 + w**3 * (4 * w + 3 * w**2 * sizes) / divisor) / divisor
    term = slope * terms + w**3 / divisor * (1 + w**3 * sizes / divisor)
    weight = torch.where(w > 0, term, 0.0).sum(2, keepdim=True)
    return (weight * size).sum(1)


def _expect(arguments: tuple[Tensor, Tensor, Tensor | None, str], results: tuple[Tensor, ...]) -> list[Expected]:
    a, g, h, pooling = arguments
    wide = a.double(), g.double(), None if h is None else h.double()
    return [within(reference(*wide, pooling), _magnitude(*wide, pooling), results[0].dtype)]


OPERATOR = Operator(
    "weighted_reduce",
    "(Tensor activations, Tensor gradient, Tensor? hvp, str pooling, str backend) -> Tensor",
    reference=reference,
    empty=empty,
    expect=_expect,
    pooling=3,
)


def weighted_reduce(
    activations: Tensor, gradient: Tensor, hvp: Tensor | None = None, pooling: str = "mean", *, backend: str = "auto"
) -> Tensor:
    """The signed map of one method row, before the final ReLU (arXiv 2501.06261, section 4.3).

    With ``w = gradient - hvp / 2``, or ``w = gradient`` without an hvp:

    ====================  ==================================================================================
    "mean"                ``sum_c mean_s(w) A``
    "elementwise"         ``sum_c w A``
    "elementwise_relu"    ``sum_c max(w A, 0)``
    "activation"          ``alpha_c = sum_s w A / (sum_s A + 1e-7)``, then ``sum_c alpha_c A``
    "positive_gradient"   ``sum_c max(w, 0) A``
    "plusplus"            ``alpha_c = sum_s max(w, 0) w² / (2 w² + w³ sum_s A + 1e-6)``, 0 where w = 0
    ====================  ==================================================================================

    Reads: "elementwise", "elementwise_relu" and "positive_gradient" read every input once. "mean" reads w once for the spatial
    sum and A once for the channel sum. "activation" and "plusplus" need a spatial sum over A first and read A again, from
    cache while an image's share of the channels fits there.

    Args:
        activations, gradient, hvp: [N, C, S] on one device, any float dtypes and strides; gradient and hvp may be expanded.
        pooling: the row.
        backend: "auto", or "cuda", "triton", "native", "torch".

    Returns:
        [N, S], float32 (float64 for float64 activations), contiguous.

    Raises:
        InputError: shapes, dtypes or devices do not fit, or the pooling is unknown.
        BackendError: the backend named cannot serve.
        DerivativeError: an input requires gradients.
    """
    check(activations, gradient, hvp, pooling)
    refuse_gradients("weighted_reduce", activations, gradient, hvp)
    out: Tensor = OPERATOR(backend, activations, gradient, hvp, pooling)
    return out
