"""class_maps: the weighted sum over channels and the display form of its maps, in one launch where that pays.

A program makes the signed map of one image and class and goes on to its display form, which needs the whole map. So one
program reads all activations of an image: right where they are small or the images many; otherwise two kernels serve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channel_weighted_sum import channel_weighted_sum
from .display_map import display_map, display_one, shape_arguments
from .tiles import BLOCKS_WANTED, tile_of

#: Bytes of activations that one program may read alone, as in csrc/cuda/head.cu; not measured yet.
MOST_BYTES = 1 << 19


@triton.jit
def _kernel(
    a, alpha, raw, maps,
    a_n, a_c, a_s, w_n, w_m, w_c, C, S, M,
    d, h, w, D, H, W, scale_z, scale_y, scale_x,
    RENORMALIZE: tl.constexpr, DEEP: tl.constexpr, BYTES: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    n = program // M
    m = program % M
    raw += program * S
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S).to(tl.int64)
        total = tl.zeros((BLOCK_S,), ACC)
        for first in range(0, C, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C).to(tl.int64)
            mask = (c < C)[:, None] & (s < S)[None, :]
            x = tl.load(a + n * a_n + c[:, None] * a_c + s[None, :] * a_s, mask=mask, other=0.0).to(ACC)
            weight = tl.load(alpha + n * w_n + m * w_m + c * w_c, mask=c < C, other=0.0).to(ACC)
            total += tl.sum(x * weight[:, None], 0)
        tl.store(raw + s, total, mask=s < S)
    # The whole program reads what its other threads have just written.
    tl.debug_barrier()
    display_one(
        raw, maps + program * (D * H * W), d, h, w, D, H, W, scale_z, scale_y, scale_x, RENORMALIZE, DEEP, BYTES, ACC, BLOCK
    )


def class_maps(activations: Tensor, alpha: Tensor, grid: Sequence[int], renormalize: bool, raw: Tensor, maps: Tensor) -> None:
    """Fill ``raw`` [N, M, S] and ``maps`` [N, M, *size]."""
    n, c, s = activations.shape
    m = alpha.shape[1]
    if c * s * activations.element_size() > MOST_BYTES and n * m < BLOCKS_WANTED:
        channel_weighted_sum(activations, alpha, raw)
        display_map(raw.view(n * m, *grid), renormalize, maps.view(n * m, *maps.shape[2:]))
        return
    channels, positions, _ = tile_of(activations)
    shape, deep = shape_arguments(grid, maps.shape[2:])
    _kernel[(n * m,)](
        activations, alpha, raw, maps,
        *activations.stride(), *alpha.stride(), c, s, m, *shape,
        RENORMALIZE=renormalize, DEEP=deep, BYTES=maps.dtype == torch.uint8,
        ACC=tl.float64 if raw.dtype == torch.float64 else tl.float32,
        BLOCK_C=channels, BLOCK_S=positions, BLOCK=min(1024, triton.next_power_of_2(math.prod(maps.shape[2:]))), num_warps=8,
    )  # fmt: skip
