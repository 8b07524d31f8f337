"""display_map: ReLU, min-max, half-pixel linear resize, min-max, one program per image.

The second min-max needs the extent of the resized map, so the map is computed twice: that costs arithmetic on a small raw map
that stays in cache, where storing and reading it back would cost memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _lower(a, b):
    # tl.min drops NaN: carry it along.
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def _higher(a, b):
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def _axis(i, low_count, scale, ACC: tl.constexpr):
    x = scale * (i.to(ACC) + 0.5) - 0.5
    x = tl.where(x < 0, 0.0, x)
    low = tl.minimum(x.to(tl.int32), low_count - 1)
    high = tl.minimum(low + 1, low_count - 1)
    return low, high, x - low.to(ACC)


@triton.jit
def _unit(raw, index, low, scale, mask, ACC: tl.constexpr):
    x = tl.load(raw + index, mask=mask, other=0.0).to(ACC)
    return (tl.where(x < 0, 0.0, x) - low) / scale


@triton.jit
def _value(raw, flat, d, h, w, H, W, scale_z, scale_y, scale_x, low, scale, mask, DEEP: tl.constexpr, ACC: tl.constexpr):
    x0, x1, u = _axis(flat % W, w, scale_x, ACC)
    y0, y1, v = _axis(flat // W % H, h, scale_y, ACC)
    z0, z1, t = _axis(flat // (W * H), d, scale_z, ACC)
    upper = (1 - u) * _unit(raw, (z0 * h + y0) * w + x0, low, scale, mask, ACC) + u * _unit(
        raw, (z0 * h + y0) * w + x1, low, scale, mask, ACC
    )
    lower = (1 - u) * _unit(raw, (z0 * h + y1) * w + x0, low, scale, mask, ACC) + u * _unit(
        raw, (z0 * h + y1) * w + x1, low, scale, mask, ACC
    )
    near = (1 - v) * upper + v * lower
    if DEEP:
        upper = (1 - u) * _unit(raw, (z1 * h + y0) * w + x0, low, scale, mask, ACC) + u * _unit(
            raw, (z1 * h + y0) * w + x1, low, scale, mask, ACC
        )
        lower = (1 - u) * _unit(raw, (z1 * h + y1) * w + x0, low, scale, mask, ACC) + u * _unit(
            raw, (z1 * h + y1) * w + x1, low, scale, mask, ACC
        )
        near = (1 - t) * near + t * ((1 - v) * upper + v * lower)
    return near


@triton.jit
def display_one(
    raw, out,
    d, h, w, D, H, W, scale_z, scale_y, scale_x,
    RENORMALIZE: tl.constexpr, DEEP: tl.constexpr, BYTES: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The display form of the map at ``raw``, written to ``out``."""
    count = d * h * w
    total = D * H * W
    lane = tl.arange(0, BLOCK)
    # Lanes beyond the end repeat the first value: it changes no extent.
    least = tl.load(raw + lane * 0).to(ACC)
    least = tl.where(least < 0, 0.0, least)
    most = least
    for start in range(0, count, BLOCK):
        x = tl.load(raw + tl.where(start + lane < count, start + lane, 0)).to(ACC)
        x = tl.where(x < 0, 0.0, x)
        least = _lower(x, least)
        most = _higher(x, most)
    low = tl.reduce(least, 0, _lower)
    scale = 1e-7 + (tl.reduce(most, 0, _higher) - low)
    low2 = low * 0
    scale2 = low2 + 1
    if RENORMALIZE:
        first = _value(
            raw, lane * 0, d, h, w, H, W, scale_z, scale_y, scale_x, low, scale, lane >= 0, DEEP, ACC
        )  # fmt: skip
        least = first
        most = first
        for start in range(0, total, BLOCK):
            at = tl.where(start + lane < total, start + lane, 0)
            x = _value(raw, at, d, h, w, H, W, scale_z, scale_y, scale_x, low, scale, lane >= 0, DEEP, ACC)
            least = _lower(x, least)
            most = _higher(x, most)
        low2 = tl.reduce(least, 0, _lower)
        scale2 = 1e-7 + (tl.reduce(most, 0, _higher) - low2)
    for start in range(0, total, BLOCK):
        at = start + lane
        mask = at < total
        x = _value(raw, at, d, h, w, H, W, scale_z, scale_y, scale_x, low, scale, mask, DEEP, ACC)
        if RENORMALIZE:
            x = (x - low2) / scale2
        if BYTES:
            x = tl.where(x > 0, x, 0.0)  # NaN too: a byte cannot say it
            # Rounds half to even, as torch.round does: 1.5 · 2²³ leaves no room for a fraction.
            x = (tl.minimum(x, 1.0) * 255).to(tl.float32) + 12582912.0 - 12582912.0
        tl.store(out + at, x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _kernel(
    raw, out,
    d, h, w, D, H, W, scale_z, scale_y, scale_x,
    RENORMALIZE: tl.constexpr, DEEP: tl.constexpr, BYTES: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    display_one(
        raw + n * (d * h * w), out + n * (D * H * W), d, h, w, D, H, W, scale_z, scale_y, scale_x,
        RENORMALIZE, DEEP, BYTES, ACC, BLOCK,
    )  # fmt: skip


def shape_arguments(grid: Sequence[int], size: Sequence[int]) -> tuple[tuple[float, ...], bool]:
    """(d, h, w, D, H, W and the three scales) for up to three dimensions, and whether there are three."""
    d, h, w = (1,) * (3 - len(grid)) + tuple(grid)
    D, H, W = (1,) * (3 - len(size)) + tuple(size)
    return (d, h, w, D, H, W, d / D, h / H, w / W), d > 1 or D > 1


def display_map(raw: Tensor, renormalize: bool, out: Tensor) -> None:
    """Fill ``out`` [N, *size] (the dtype of ``raw``, float16 or uint8) from contiguous ``raw`` [N, *grid]."""
    shape, deep = shape_arguments(raw.shape[1:], out.shape[1:])
    acc = tl.float64 if raw.dtype == torch.float64 else tl.float32
    _kernel[(raw.shape[0],)](
        raw, out, *shape,
        RENORMALIZE=renormalize, DEEP=deep, BYTES=out.dtype == torch.uint8, ACC=acc,
        BLOCK=min(1024, triton.next_power_of_2(out[0].numel())), num_warps=8,
    )  # fmt: skip
