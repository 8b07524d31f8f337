"""display_map: the display form of signed maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .operator import Operator
from .shared import accumulator, check_floating, refuse_gradients
from .tolerance import TOLERANCE, Expected

EPS_DISPLAY = 1e-7  # of the min-max


def check(raw: Tensor, size: Sequence[int], dtype: torch.dtype | None) -> None:
    """Raise InputError unless raw is [N, *grid] with one to three spatial dimensions, and size and dtype fit."""
    check_floating("raw", raw, "display_map")
    if not 2 <= raw.ndim <= 4 or 0 in raw.shape[1:]:
        raise InputError(f"display_map: raw must be [N, h, w] (or [N, l], [N, d, h, w]), got shape {tuple(raw.shape)}.")
    if len(size) != raw.ndim - 1 or any(s < 1 for s in size):
        raise InputError(f"display_map: size must be {raw.ndim - 1} positive integers, got {tuple(size)}.")
    if dtype not in (None, accumulator(raw.dtype), torch.float16, torch.uint8):
        raise InputError(f"display_map: dtype must be None, {accumulator(raw.dtype)}, float16 or uint8, got {dtype}.")


def _unit(maps: Tensor) -> Tensor:
    dims = tuple(range(1, maps.ndim))
    maps = maps - maps.amin(dims, keepdim=True)
    return maps / (EPS_DISPLAY + maps.amax(dims, keepdim=True))


def reference(raw: Tensor, size: Sequence[int], renormalize: bool, dtype: torch.dtype | None = None) -> Tensor:
    """ReLU, min-max, half-pixel linear resize, min-max; see :func:`shapleycam.ops.display_map`."""
    if raw.shape[0] == 0:
        return raw.new_empty((0, *size), dtype=dtype or accumulator(raw.dtype))
    maps = _unit(raw.to(accumulator(raw.dtype)).clamp_min(0))
    if tuple(size) != tuple(maps.shape[1:]):
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[maps.ndim - 1]
        maps = F.interpolate(maps[:, None], tuple(size), mode=mode, align_corners=False)[:, 0]
    maps = (_unit(maps) if renormalize else maps).contiguous()
    if dtype == torch.uint8:
        return (maps.nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    return maps.to(dtype or maps.dtype)


def empty(raw: Tensor, size: Sequence[int], renormalize: bool, dtype: torch.dtype | None) -> Tensor:
    """The result, not filled: [N, *size]."""
    return torch.empty((raw.shape[0], *size), dtype=dtype or accumulator(raw.dtype), device=raw.device)


def expect(arguments: tuple[Any, ...], results: tuple[Tensor, ...]) -> list[Expected]:
    """What the result should be.

    The weights of a resize lose digits with the length of an axis, and the second min-max divides what was lost by the spread
    of the resized map: one that varies by a millionth of its height is at the mercy of rounding, in every implementation.
    """
    raw, size, renormalize, dtype = arguments
    if raw.shape[0] == 0:
        nothing = raw.new_empty((0, *size), dtype=torch.float64)
        return [Expected(nothing, nothing)]
    value = reference(raw.double(), size, False)
    of_value, of_magnitude = TOLERANCE[accumulator(raw.dtype)]
    allowed = torch.full_like(value, of_magnitude * (1 + max(raw.shape[1:]) / 16))
    if renormalize:
        dims = tuple(range(1, value.ndim))
        allowed = allowed / (value.amax(dims, keepdim=True) - value.amin(dims, keepdim=True) + EPS_DISPLAY)
        value = _unit(value)
    allowed = (allowed + of_value * value.abs()).nan_to_num(0.0)
    if dtype == torch.uint8:
        return [Expected(value.nan_to_num(0.0).clamp(0, 1) * 255, 255 * allowed + 1e-3, 0.5)]
    if dtype == torch.float16:
        return [Expected(value, allowed, value.abs() * 2**-11 + 2**-25)]  # half a unit in the last place
    return [Expected(value, allowed)]


OPERATOR = Operator(
    "display_map",
    "(Tensor raw, SymInt[] size, bool renormalize, ScalarType? dtype, str backend) -> Tensor",
    reference=reference,
    empty=empty,
    expect=expect,
)


def display_map(
    raw: Tensor,
    size: Sequence[int],
    *,
    renormalize: bool = True,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """The display form of signed maps: max(·, 0), min-max, linear resize with half-pixel centres, min-max.

    Min-max is ``(m - min) / (1e-7 + max)`` per image, the maximum taken after the subtraction.

    Args:
        raw: [N, h, w], or [N, l], or [N, d, h, w]; any float dtype.
        size: the spatial size of the result.
        renormalize: whether to do the second min-max (left out before several layers' maps are averaged).
        dtype: of the result: None for float32 (float64 for float64 maps), or float16, or uint8 (0 to 255; NaN becomes 0).
        backend: as for :func:`weighted_reduce`.

    Returns:
        [N, *size], contiguous; an image with NaN is NaN.

    Raises:
        InputError, BackendError, DerivativeError: as for :func:`weighted_reduce`.
    """
    check(raw, size, dtype)
    refuse_gradients("display_map", raw)
    out: Tensor = OPERATOR(backend, raw, list(size), renormalize, dtype)
    return out
