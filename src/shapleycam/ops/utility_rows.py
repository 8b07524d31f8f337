"""utility_rows: the weights of the logits behind a utility, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .coefficients import COEFFICIENTS, Coefficients
from .operator import Operator
from .quadrature_rows import OPERATOR as QUADRATURE
from .quadrature_rows import check_base, check_rule
from .shared import UTILITIES, accumulator, check_floating, refuse_gradients
from .tolerance import Expected, within


def check(logits: Tensor, targets: Tensor, bias: Tensor | None, utility: str, order: int) -> None:
    """Raise InputError unless logits are [N, K], targets int64 [N, M] and bias [K] on one device, and the names are known."""
    operator = "utility_rows"
    check_floating("logits", logits, operator)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise InputError(f"{operator}: logits must be [N, K] with K >= 1, got shape {tuple(logits.shape)}.")
    n, k = logits.shape
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        got = str(targets.dtype) if isinstance(targets, Tensor) else type(targets).__name__
        raise InputError(f"{operator}: targets must be an int64 tensor [{n}, M], got {got}.")
    if targets.ndim != 2 or targets.shape[0] != n or targets.device != logits.device:
        raise InputError(
            f"{operator}: targets must be [{n}, M] on {logits.device}, got {tuple(targets.shape)} on {targets.device}."
        )
    if bias is not None:
        check_floating("bias", bias, operator)
        if bias.shape != (k,) or bias.device != logits.device:
            raise InputError(f"{operator}: bias must be [{k}] on {logits.device}, got {tuple(bias.shape)} on {bias.device}.")
    if utility not in UTILITIES:
        raise InputError(f"{operator}: unknown utility {utility!r}; expected one of {', '.join(UTILITIES)}.")
    if order not in (1, 2):
        raise InputError(f"{operator}: order must be 1 (gradient) or 2 (Shapley weight), got {order!r}.")


def reference(logits: Tensor, targets: Tensor, bias: Tensor | None, utility: str, order: int, scale: float) -> Tensor:
    """``scale (U' - U'' z0 / 2)`` in the logits, [N, M, K]; see :func:`shapleycam.ops.utility_rows`."""
    wide = accumulator(logits.dtype)
    z = logits.to(wide)
    classes = z.shape[1]
    known = (targets >= 0) & (targets < classes)
    safe = targets.clamp(0, classes - 1)
    row = COEFFICIENTS[utility]
    unit = torch.zeros((*targets.shape, classes), dtype=wide, device=z.device).scatter_(2, safe[:, :, None], 1.0)
    if row.curved:
        p = z.softmax(1)
        z0 = z if bias is None else z - bias.to(wide)
        pz = p * z0
        first = row.gradient(p.gather(1, safe))
        second: Coefficients = (0.0, 0.0, 0.0)
        if order == 2:
            second = row.curvature(p.gather(1, safe), z0.gather(1, safe), pz.sum(1, keepdim=True))
        on_class, on_p, on_pz = (torch.as_tensor(a - b / 2, device=z.device) for a, b in zip(first, second, strict=True))
        on_class, on_p, on_pz = (c.to(wide).expand(targets.shape)[:, :, None] for c in (on_class, on_p, on_pz))
        unit = on_class * unit + on_p * p[:, None]
        if order == 2:
            unit = unit + on_pz * pz[:, None]
    return torch.where(known[:, :, None], unit * scale, float("nan"))


def empty(logits: Tensor, targets: Tensor, bias: Tensor | None, utility: str, order: int, scale: float) -> Tensor:
    """The result, not filled: [N, M, K]."""
    shape = (logits.shape[0], targets.shape[1], logits.shape[1])
    return torch.empty(shape, dtype=accumulator(logits.dtype), device=logits.device)


def _magnitude(z: Tensor, targets: Tensor, bias: Tensor | None, utility: str, scale: float) -> Tensor:
    """The sum of the magnitudes of what is added up to each element, [N, M, K]."""
    p = z.softmax(1)
    # An exponential's relative error is its argument's absolute one.
    exponential = p * (1 + z.amax(1, keepdim=True) - z)
    terms = z.abs() if bias is None else z.abs() + bias.abs()
    moment = (exponential * terms).sum(1, keepdim=True)
    chosen = targets.clamp(0, z.shape[1] - 1)
    unit = torch.zeros((*targets.shape, z.shape[1]), dtype=z.dtype, device=z.device).scatter_(2, chosen[:, :, None], 2.0)
    size = unit + (exponential * (1 + moment + terms))[:, None]
    if utility == "probability":
        size = size * (exponential.gather(1, chosen) * (1 + moment + terms.gather(1, chosen)))[:, :, None]
    return size * abs(scale)


def _expect(arguments: tuple[Any, ...], results: tuple[Tensor, ...]) -> list[Expected]:
    logits, targets, bias, utility, order, scale = arguments
    z, b = logits.double(), None if bias is None else bias.double()
    value = reference(z, targets, b, utility, order, scale)
    return [within(value, _magnitude(z, targets, b, utility, scale), results[0].dtype)]


OPERATOR = Operator(
    "utility_rows",
    "(Tensor logits, Tensor targets, Tensor? bias, str utility, SymInt order, float scale, str backend) -> Tensor",
    reference=reference,
    empty=empty,
    expect=_expect,
)


def utility_rows(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    utility: str = "rest",
    order: int = 2,
    scale: float = 1.0,
    nodes: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    base: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The weights of the logits, ``scale (U' - U'' z0 / 2)`` with ``z0 = logits - bias`` (arXiv 2501.06261, section 4.2).

    For a head that is ``z = W mean_s(A) + b``, their product with ``W``, over S, is the Shapley weight of every channel. With
    ``nodes`` t_k and ``weights`` w_k they are ``scale sum_k w_k U'(t_k z0 + bias)`` instead, the gradient integrated from the
    activations zero to the activations given by that rule (Aumann and Shapley 1974, the diagonal formula); with ``base`` too,
    ``scale sum_k w_k U'(base + t_k (logits - base))``, the gradient integrated from another baseline. Served by the operator
    "quadrature_rows", in one launch.

    Args:
        logits: [N, K], any float dtype.
        targets: the classes to explain, int64 [N, M] on the same device; a row whose target is not in 0 … K-1 is NaN.
        bias: [K], any float dtype, or None.
        utility: "logit", "probability", "log_probability" or "rest".
        order: 2, or 1 for the gradient ``scale U'`` alone; not used with ``nodes``.
        nodes, weights: a quadrature rule on [0, 1], lists or tuples of 1 to 32 finite floats; both or neither.
        base: with ``nodes`` and instead of ``bias``, the logits of the baseline, [N, K], any float dtype and strides.
        backend: as for :func:`weighted_reduce`.

    Returns:
        [N, M, K], float32 (float64 for float64 logits), contiguous.

    Raises:
        InputError, BackendError, DerivativeError: as for :func:`weighted_reduce`.
    """
    check(logits, targets, bias, utility, order)
    if nodes is None and weights is None:
        if base is not None:
            raise InputError("utility_rows: base is the start of a path: give nodes and weights too, or leave it out.")
        refuse_gradients("utility_rows", logits, bias)
        out: Tensor = OPERATOR(backend, logits, targets, bias, utility, order, scale)
        return out
    rule = check_rule(nodes, weights)
    if base is not None:
        if bias is not None:
            raise InputError("utility_rows: base takes the place of bias: give one of them.")
        check_base(base, logits)
    refuse_gradients("quadrature_rows", logits, bias, base)
    start = base if bias is None else bias.expand(logits.shape)
    out = QUADRATURE(backend, logits, targets, start, utility, scale, *rule)
    return out
