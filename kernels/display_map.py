"""display_map: ReLU, min-max, half-pixel linear resize, min-max, several programs to an image.

The second min-max needs the extent of the resized map. Between two neighbours of the raw map the resized one is linear along
every axis, so that it is extreme beside the positions where an axis goes on to its next neighbours: every program computes
these few, and then its share of the map.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import BLOCKS_WANTED


@triton.jit
def _lower(a, b):
    # tl.min drops NaN: carry it along.
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def _higher(a, b):
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def _reciprocal(x, ACC: tl.constexpr):
    # Once for a map, instead of a division for every position. Correctly rounded, so that x * (1 / x) is never above 1.
    if tl.float64 == ACC:
        return 1 / x
    else:
        return tl.div_rn(tl.full((), 1.0, ACC), x)


@triton.jit
def _axis(i, low_count, scale, ACC: tl.constexpr):
    x = scale * (i.to(ACC) + 0.5) - 0.5
    x = tl.where(x < 0, 0.0, x)
    low = tl.minimum(x.to(tl.int32), low_count - 1)
    high = tl.minimum(low + 1, low_count - 1)
    return low, high, x - low.to(ACC)


@triton.jit
def _above(raw, index, low, mask, ACC: tl.constexpr):
    x = tl.load(raw + index, mask=mask, other=0.0).to(ACC)
    return tl.where(x < 0, 0.0, x) - low


@triton.jit
def _plane(raw, y0, y1, x0, x1, u, v, w, low, mask, ACC: tl.constexpr):
    upper = (1 - u) * _above(raw, y0 * w + x0, low, mask, ACC) + u * _above(raw, y0 * w + x1, low, mask, ACC)
    lower = (1 - u) * _above(raw, y1 * w + x0, low, mask, ACC) + u * _above(raw, y1 * w + x1, low, mask, ACC)
    return (1 - v) * upper + v * lower


@triton.jit
def _apart(flat, H, W, DEEP: tl.constexpr):
    row = flat // W
    if DEEP:
        return row // H, row % H, flat - row * W
    else:
        return row * 0, row, flat - row * W


@triton.jit
def _value(raw, z, y, x, d, h, w, scale_z, scale_y, scale_x, low, scale, mask, DEEP: tl.constexpr, ACC: tl.constexpr):
    # Scaled after the neighbours have met: what each is above the least is exactly 0 where they are all the same.
    x0, x1, u = _axis(x, w, scale_x, ACC)
    y0, y1, v = _axis(y, h, scale_y, ACC)
    if DEEP:
        z0, z1, t = _axis(z, d, scale_z, ACC)
        near = _plane(raw, z0 * h + y0, z0 * h + y1, x0, x1, u, v, w, low, mask, ACC)
        near = (1 - t) * near + t * _plane(raw, z1 * h + y0, z1 * h + y1, x0, x1, u, v, w, low, mask, ACC)
    else:
        near = _plane(raw, y0, y1, x0, x1, u, v, w, low, mask, ACC)
    return near * scale


@triton.jit
def _candidate(q, count, to, scale, ACC: tl.constexpr):
    # Two positions before and after an axis reaches a neighbour, one of each to spare for rounding; or every position.
    reached = tl.floor(((q // 4).to(ACC) + 0.5) / scale - 0.5).to(tl.int32) + q % 4 - 1
    return tl.where(count == to, q, tl.minimum(tl.maximum(reached, 0), to - 1))


@triton.jit
def _display(
    raw, out, begin, end,
    d, h, w, D, H, W, scale_z, scale_y, scale_x, cz, cy, cx,
    RENORMALIZE: tl.constexpr, DEEP: tl.constexpr, BYTES: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The positions [begin, end) of the display form of the map at ``raw``, written to ``out``."""
    count = d * h * w
    candidates = cz * cy * cx
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
    scale = _reciprocal(1e-7 + (tl.reduce(most, 0, _higher) - low), ACC)
    low2 = low * 0
    scale2 = low2 + 1
    if RENORMALIZE:
        at = lane * 0
        least = _value(raw, at, at, at, d, h, w, scale_z, scale_y, scale_x, low, scale, lane >= 0, DEEP, ACC)
        most = least
        for start in range(0, candidates, BLOCK):
            qz, qy, qx = _apart(tl.where(start + lane < candidates, start + lane, 0), cy, cx, DEEP)
            z = _candidate(qz, cz, D, scale_z, ACC) if DEEP else qz
            y = _candidate(qy, cy, H, scale_y, ACC)
            x = _candidate(qx, cx, W, scale_x, ACC)
            found = _value(raw, z, y, x, d, h, w, scale_z, scale_y, scale_x, low, scale, lane >= 0, DEEP, ACC)
            least = _lower(found, least)
            most = _higher(found, most)
        low2 = tl.reduce(least, 0, _lower)
        scale2 = _reciprocal(1e-7 + (tl.reduce(most, 0, _higher) - low2), ACC)
    for start in range(begin, end, BLOCK):
        at = start + lane
        mask = at < end
        z, y, column = _apart(at, H, W, DEEP)
        x = _value(raw, z, y, column, d, h, w, scale_z, scale_y, scale_x, low, scale, mask, DEEP, ACC)
        if RENORMALIZE:
            x = (x - low2) * scale2
        if BYTES:
            x = tl.where(x > 0, x, 0.0)  # NaN too: a byte cannot say it
            # Rounds half to even, as torch.round does: 1.5 · 2²³ leaves no room for a fraction.
            x = (tl.minimum(x, 1.0) * 255).to(tl.float32) + 12582912.0 - 12582912.0
        tl.store(out + at, x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _kernel(
    raw, out, blocks, part,
    d, h, w, D, H, W, scale_z, scale_y, scale_x, cz, cy, cx,
    RENORMALIZE: tl.constexpr, DEEP: tl.constexpr, BYTES: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    n = (program // blocks).to(tl.int64)
    begin = program % blocks * part
    _display(
        raw + n * (d * h * w), out + n * (D * H * W), begin, tl.minimum(begin + part, D * H * W),
        d, h, w, D, H, W, scale_z, scale_y, scale_x, cz, cy, cx,
        RENORMALIZE, DEEP, BYTES, ACC, BLOCK,
    )  # fmt: skip


def _candidates(low: int, high: int) -> int:
    return min(4 * low, high)


def display_map(raw: Tensor, renormalize: bool, out: Tensor) -> None:
    """Fill ``out`` [N, *size] (the dtype of ``raw``, float16 or uint8) from contiguous ``raw`` [N, *grid]."""
    grid, size = raw.shape[1:], out.shape[1:]
    d, h, w = (1,) * (3 - len(grid)) + tuple(grid)
    D, H, W = (1,) * (3 - len(size)) + tuple(size)
    total, n = math.prod(size), raw.shape[0]
    block = min(1024, triton.next_power_of_2(total))
    blocks = max(1, min(triton.cdiv(total, block), BLOCKS_WANTED // max(n, 1)))
    part = triton.cdiv(triton.cdiv(total, blocks), block) * block
    blocks = triton.cdiv(total, part)
    _kernel[(n * blocks,)](
        raw, out, blocks, part, d, h, w, D, H, W, d / D, h / H, w / W, *map(_candidates, (d, h, w), (D, H, W)),
        RENORMALIZE=renormalize, DEEP=d > 1 or D > 1, BYTES=out.dtype == torch.uint8,
        ACC=tl.float64 if raw.dtype == torch.float64 else tl.float32, BLOCK=block, num_warps=8,
    )  # fmt: skip
