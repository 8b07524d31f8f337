"""quadrature_rows: the weights of the logits integrated along a straight path; what utility_rows does with nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .coefficients import COEFFICIENTS
from .operator import Operator
from .shared import MOST_NODES, accumulator, check_floating
from .tolerance import Expected, within


def check_rule(nodes: Sequence[float] | None, weights: Sequence[float] | None) -> tuple[list[float], list[float]]:
    """The nodes and weights of a quadrature rule as lists of floats.

    Raises:
        InputError: they are not two lists or tuples of 1 to MOST_NODES finite numbers, equally long.
    """
    checked = []
    for name, values in (("nodes", nodes), ("weights", weights)):
        if not isinstance(values, (list, tuple)):
            raise InputError(f"utility_rows: {name} must be a list or tuple of floats, got {type(values).__name__}.")
        try:
            checked.append([float(value) for value in values])
        except (TypeError, ValueError) as error:
            raise InputError(f"utility_rows: {name} must be numbers, got {values!r}.") from error
        if not all(abs(value) < math.inf for value in checked[-1]):  # what compilers can trace
            raise InputError(f"utility_rows: {name} must be finite, got {values!r}.")
    places, parts = checked
    if not 1 <= len(places) <= MOST_NODES:
        raise InputError(f"utility_rows: expected 1 to {MOST_NODES} nodes, got {len(places)}.")
    if len(parts) != len(places):
        raise InputError(f"utility_rows: expected a weight for each of the {len(places)} nodes, got {len(parts)}.")
    return places, parts


def check_base(base: Tensor, logits: Tensor) -> None:
    """Raise InputError unless the start of the path is [N, K] on the device of the logits."""
    check_floating("base", base, "utility_rows")
    if base.shape != logits.shape or base.device != logits.device:
        raise InputError(
            f"utility_rows: base must be {tuple(logits.shape)} on {logits.device}, got {tuple(base.shape)} on {base.device}."
        )


def reference(
    logits: Tensor,
    targets: Tensor,
    start: Tensor | None,
    utility: str,
    scale: float,
    nodes: Sequence[float],
    weights: Sequence[float],
) -> Tensor:
    """``scale sum_k w_k U'(t_k z + (1 - t_k) start)``, [N, M, K]; see :func:`shapleycam.ops.utility_rows`.

    ``start`` is [N, K], or None for zero. At ``t = 1`` the path is at ``z`` to the last bit, and at ``t = 0`` at ``start``.
    """
    wide = accumulator(logits.dtype)
    z = logits.to(wide)
    begin = None if start is None else start.to(wide)
    classes = z.shape[1]
    known = (targets >= 0) & (targets < classes)
    safe = targets.clamp(0, classes - 1)
    row = COEFFICIENTS[utility]
    on_class = torch.zeros(targets.shape, dtype=wide, device=z.device)
    rows = torch.zeros((*targets.shape, classes), dtype=wide, device=z.device)
    for t, weight in zip(nodes, weights, strict=True):
        if not row.curved:  # the gradient is the same everywhere
            on_class = on_class + weight
            continue
        p = _at(z, begin, t).softmax(1)
        at_class, at_p, _ = row.gradient(p.gather(1, safe))
        on_class = on_class + weight * at_class
        on_p = weight * at_p
        rows = rows + (on_p[:, :, None] if isinstance(on_p, Tensor) else on_p) * p[:, None]
    rows = rows.scatter_add(2, safe[:, :, None], on_class[:, :, None])
    return torch.where(known[:, :, None], rows * scale, float("nan"))


def _at(z: Tensor, start: Tensor | None, t: float) -> Tensor:
    """The point of the path at ``t``."""
    return t * z if start is None else t * z + (1 - t) * start


def empty(
    logits: Tensor,
    targets: Tensor,
    start: Tensor | None,
    utility: str,
    scale: float,
    nodes: Sequence[float],
    weights: Sequence[float],
) -> Tensor:
    """The result, not filled: [N, M, K]."""
    shape = (logits.shape[0], targets.shape[1], logits.shape[1])
    return torch.empty(shape, dtype=accumulator(logits.dtype), device=logits.device)


def _magnitude(
    z: Tensor,
    targets: Tensor,
    start: Tensor | None,
    utility: str,
    scale: float,
    nodes: Sequence[float],
    weights: Sequence[float],
) -> Tensor:
    """The sum of the magnitudes of what is added up to each element, [N, M, K]."""
    chosen = targets.clamp(0, z.shape[1] - 1)
    unit = torch.zeros((*targets.shape, z.shape[1]), dtype=z.dtype, device=z.device).scatter_(2, chosen[:, :, None], 2.0)
    size = torch.zeros_like(unit)
    for t, weight in zip(nodes, weights, strict=True):
        x = _at(z, start, t)
        # An exponential's relative error is its argument's absolute one, and the argument is rounded.
        rounded = (t * z).abs() if start is None else (t * z).abs() + ((1 - t) * start).abs()
        p = x.softmax(1)
        exponential = p * (1 + x.amax(1, keepdim=True) - x + rounded)
        exponential = exponential + p * exponential.sum(1, keepdim=True)
        node = unit + exponential[:, None]
        if utility == "probability":
            node = node * exponential.gather(1, chosen)[:, :, None]
        size = size + abs(weight) * node
    return size * abs(scale)


def _expect(arguments: tuple[Any, ...], results: tuple[Tensor, ...]) -> list[Expected]:
    logits, targets, start, *how = arguments
    z, begin = logits.double(), None if start is None else start.double()
    value = reference(z, targets, begin, *how)
    return [within(value, _magnitude(z, targets, begin, *how), results[0].dtype)]


OPERATOR = Operator(
    "quadrature_rows",
    "(Tensor logits, Tensor targets, Tensor? start, str utility, float scale, float[] nodes, float[] weights, str backend)"
    " -> Tensor",
    reference=reference,
    empty=empty,
    expect=_expect,
)
