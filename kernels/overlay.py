"""overlay: heatmaps in colour over images, one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _round(x):
    # Half to even, as torch.round does: 1.5 · 2²³ leaves no room for a fraction.
    return x + 12582912.0 - 12582912.0


@triton.jit
def _kernel(
    images, heat, table, out,
    i_n, i_c, i_h, i_w, W, pixels, total,
    alpha, keep, m0, m1, m2, s0, s1, s2,
    BYTES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < total
    n = at // pixels
    y = at % pixels // W
    x = at % W
    h = tl.load(heat + at, mask=mask, other=0.0)
    known = h - h == 0
    unit = tl.where(h < 0, 0.0, tl.where(h > 1, 1.0, h))
    index = _round(tl.where(known, unit, 0.0) * 255).to(tl.int32)
    for c in tl.static_range(3):
        base = tl.load(images + n * i_n + c * i_c + y * i_h + x * i_w, mask=mask, other=0).to(tl.float32)
        if BYTES:
            base = base / 255
        if c == 0:
            base = base * s0 + m0
        elif c == 1:
            base = base * s1 + m1
        else:
            base = base * s2 + m2
        base = tl.where(base < 0, 0.0, tl.where(base > 1, 1.0, base))
        colour = tl.load(table + index * 3 + c).to(tl.float32) / 255
        mixed = (keep * base + alpha * colour) * 255
        mixed = _round(tl.where(mixed > 0, tl.where(mixed < 255, mixed, 255.0), 0.0))
        magenta = 0.0 if c == 1 else 255.0
        tl.store(out + at * 3 + c, tl.where(known, mixed, magenta).to(tl.uint8), mask=mask)


def overlay(
    images: Tensor,
    heatmaps: Tensor,
    table: Tensor,
    alpha: float,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    out: Tensor,
) -> None:
    """Fill ``out`` uint8 [N, H, W, 3] from images [N, 3, H, W], float32 contiguous heatmaps [N, H, W] and a colour table."""
    n, _, h, w = images.shape
    _kernel[(triton.cdiv(n * h * w, BLOCK),)](
        images, heatmaps, table, out,
        *images.stride(), w, h * w, n * h * w,
        float(alpha), 1.0 - alpha, *(mean or (0.0, 0.0, 0.0)), *(std or (1.0, 1.0, 1.0)),
        BYTES=images.dtype == torch.uint8, BLOCK=BLOCK,
    )  # fmt: skip
