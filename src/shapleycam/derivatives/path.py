"""The straight path from a baseline to the activations: where it starts, and at which nodes the gradient is read.

The Shapley value of a game of many small players tends to the diagonal (Aumann-Shapley) value, the integral of
``(A - B) ∂U/∂A`` along ``B + t (A - B)``, which Gauss-Legendre quadrature replaces by a weighted sum over K values of t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, localcontext
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import InputError
from ..model.layouts import Layout, Transformed
from ..ops.shared import MOST_NODES

BASELINES = ("zero", "mean")
#: The completeness gap that ``nodes="auto"`` stops at, relative to |U(A) - U(B)|.
DEFAULT_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Path:
    """How the path is taken.

    Attributes:
        baseline: B, where it starts: "zero"; "mean", each channel's mean over the positions of its image; or a tensor that
            broadcasts to the activations as [N, C, S].
        nodes: the number of nodes, 1 to 32, or "auto".
        tolerance: where "auto" stops.
        masks: how many random masks a node has; 0 for none.
        seed: of the masks.
    """

    baseline: str | Tensor = "zero"
    nodes: int | str = 4
    tolerance: float = DEFAULT_TOLERANCE
    masks: int = 0
    seed: int = 0

    @property
    def from_zero(self) -> bool:
        return isinstance(self.baseline, str) and self.baseline == "zero"

    @property
    def start(self) -> str:
        """The baseline in one word."""
        return self.baseline if isinstance(self.baseline, str) else "tensor"

    def first_rows(self, count: int, batch: int) -> Path:
        """The same for the first ``count`` images of a batch."""
        tensor = self.baseline
        if isinstance(tensor, str) or tensor.ndim < 3 or tensor.shape[0] != batch:
            return self
        return replace(self, baseline=tensor[:count])


def as_path(
    engine: str, baseline: str | Tensor, nodes: int | str | None, tolerance: float | None, masks: int | None, seed: int
) -> Path:
    """The arguments of :class:`shapleycam.Explainer` about the path, checked.

    Raises:
        InputError: one is out of range, or belongs to another engine.
    """
    given = {"nodes": nodes, "tolerance": tolerance, "masks": masks}
    for name, value in given.items():
        if value is not None and engine != "quadrature":
            raise InputError(f"{name}={value!r} belongs to engine='quadrature'; the engine is {engine!r}.")
    whole = isinstance(nodes, int) and not isinstance(nodes, bool)
    if nodes is not None and nodes != "auto" and not (whole and 1 <= int(nodes) <= MOST_NODES):
        raise InputError(f"nodes must be a whole number from 1 to {MOST_NODES}, or 'auto', got {nodes!r}.")
    if tolerance is not None:
        if nodes != "auto":
            raise InputError(f"tolerance={tolerance!r} is where nodes='auto' stops; nodes is {nodes!r}.")
        if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 < tolerance < math.inf:
            raise InputError(f"tolerance must be a positive number such as 1e-3, got {tolerance!r}.")
    if masks is not None:
        if isinstance(masks, bool) or not isinstance(masks, int) or masks < 4 or masks % 2:
            raise InputError(f"masks come in pairs, two pairs at least for a standard error: 4, 6, 8, ...; got {masks!r}.")
        if nodes == "auto":
            raise InputError("nodes='auto' watches the completeness gap, which masks make noisy: give a number of nodes.")
    return Path(
        check_baseline(baseline),
        nodes if nodes is not None else 4,
        tolerance if tolerance is not None else DEFAULT_TOLERANCE,
        masks or 0,
        seed,
    )


def check_baseline(baseline: str | Tensor) -> str | Tensor:
    """The baseline, if it can be one.

    Raises:
        InputError: an unknown name, or a tensor that is not floating or has more than three dimensions.
    """
    if isinstance(baseline, Tensor):
        if not baseline.is_floating_point() or baseline.ndim > 3:
            raise InputError(
                "baseline must be a floating tensor that broadcasts to the activations [N, C, S], such as [C, 1]; got "
                f"{baseline.dtype} {tuple(baseline.shape)}."
            )
        return baseline.detach()
    if not isinstance(baseline, str) or baseline not in BASELINES:
        raise InputError(f"Unknown baseline {baseline!r}: expected {', '.join(map(repr, BASELINES))} or a tensor.")
    return baseline


def background(baseline: str | Tensor, activations: Tensor) -> Tensor:
    """What the baseline shows in the place of activations [N, C, S]: a tensor that broadcasts to them, of their dtype.

    Raises:
        InputError: a tensor that does not broadcast to them.
    """
    if isinstance(baseline, Tensor):
        try:
            return baseline.to(activations.device, activations.dtype).expand_as(activations)
        except RuntimeError as error:
            raise InputError(
                f"baseline must broadcast to the activations [N, {', '.join(map(str, activations.shape[1:]))}], N the number "
                f"of images; got {tuple(baseline.shape)}."
            ) from error
    check_baseline(baseline)
    if baseline == "zero":
        return torch.zeros_like(activations[:, :, :1])
    wide = torch.promote_types(activations.dtype, torch.float32)
    return activations.mean(2, keepdim=True, dtype=wide).to(activations.dtype)


def points(activations: Tensor, layout: Layout, start: Tensor | None, t: Sequence[float], keep: Tensor | None = None) -> Tensor:
    """Points of the path as layer outputs, [P·N, ...]: all images at the first of them, then all at the second.

    Prefix and suffix tokens are no positions, and stay as they are.

    Args:
        activations: the layer's output for the images, [N, ...].
        layout: how it is read.
        start: B, broadcasting to [N, C, S]; None for zero.
        t: the P values.
        keep: bool [P, S]; where it is given, a point shows the activations where it is true and B elsewhere, whatever t.

    Raises:
        InputError: the layout computes with the output instead of moving it, so that nothing can be put in its place.
    """
    found = torch.cat([activations] * len(t))
    at = torch.tensor(t, dtype=found.dtype).to(found.device, non_blocking=True).view(-1, *[1] * activations.ndim)
    if isinstance(layout, Transformed) and start is None and keep is None:
        found.unflatten(0, (len(t), -1)).mul_(at)
        return found
    view = layout.view(found)
    if isinstance(layout, Transformed) or view.untyped_storage().data_ptr() != found.untyped_storage().data_ptr():
        raise InputError(
            "The reshape transform computes with the layer's output instead of moving it, so no baseline can be put in the "
            "place of its positions. Use baseline='zero' without masks, or a transform of permute, unflatten and slices."
        )
    view = view.unflatten(0, (len(t), -1))  # [P, N, C, S]
    at = at.view(-1, 1, 1, 1)
    if keep is not None:
        view.copy_(torch.where(keep[:, None, None, :], view, view.new_zeros(()) if start is None else start))
    elif start is None:
        view.mul_(at)
    else:
        view.copy_(start + at * (view - start))
    return found


@lru_cache(maxsize=MOST_NODES)
def gauss_legendre(count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Nodes t in (0, 1) and weights of the Gauss-Legendre rule, exact for polynomials of degree 2·count - 1.

    Newton's method on the Legendre polynomial in 50 digits, so both are float64 to the last bit.
    """
    nodes: list[float] = []
    weights: list[float] = []
    with localcontext() as context:
        context.prec = 50
        for i in range(count):
            x = Decimal(math.cos(math.pi * (count - i - 0.25) / (count + 0.5)))
            for _ in range(6):  # the digits double each time, from four
                value, slope = _legendre(count, x)
                x -= value / slope
            _, slope = _legendre(count, x)
            nodes.append(float((1 + x) / 2))
            weights.append(float(1 / ((1 - x * x) * slope * slope)))
    return tuple(nodes), tuple(weights)


def _legendre(degree: int, x: Decimal) -> tuple[Decimal, Decimal]:
    """The Legendre polynomial at x and its derivative."""
    before, value = Decimal(1), x
    for k in range(2, degree + 1):
        before, value = value, ((2 * k - 1) * x * value - (k - 1) * before) / k
    return value, degree * (x * value - before) / (x * x - 1)
