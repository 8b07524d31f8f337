"""channel_weighted_sum: M maps per image from one pass over its activations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import load_whole, partial_maps, spread, tile_of, whole


@triton.jit
def _kernel(
    a, alpha, parts,
    a_n, a_c, a_s, w_n, w_m, w_c,
    C, S, M, pieces,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    n = program // pieces
    c = (program % pieces) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    live = c < C
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S).to(tl.int64)
        mask = live[:, None] & (s < S)[None, :]
        x = tl.load(a + n * a_n + c[:, None] * a_c + s[None, :] * a_s, mask=mask, other=0.0).to(ACC)
        for m in range(0, M):
            w = tl.load(alpha + n * w_n + m * w_m + c * w_c, mask=live, other=0.0).to(ACC)
            tl.store(parts + (program * M + m) * S + s, tl.sum(x * w[:, None], 0), mask=s < S)


@triton.jit
def _whole_kernel(
    a, alpha, parts,
    a_n, a_c, a_s, w_n, w_m, w_c,
    C, S, M, pieces,
    ACC: tl.constexpr, FLAT: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """CHANNELS channels with all their positions: see Whole in tiles.py."""
    program = tl.program_id(0).to(tl.int64)
    n = program // pieces
    first = program % pieces * CHANNELS
    c = first + tl.arange(0, CHANNELS)
    s = tl.arange(0, POSITIONS)
    x = load_whole(a, n, first, C, S, a_n, a_c, a_s, FLAT, CHANNELS, POSITIONS)
    x = spread(x, S, FLAT, CHANNELS, POSITIONS).to(ACC)
    for m in range(0, M):
        w = tl.load(alpha + n * w_n + m * w_m + c * w_c, mask=c < C, other=0.0).to(ACC)
        tl.store(parts + (program * M + m) * S + s, tl.sum(x * w[:, None], 0), mask=s < S)


def channel_weighted_sum(activations: Tensor, alpha: Tensor, out: Tensor) -> None:
    """Fill ``out`` [N, M, S] (float32, or float64 for float64 activations)."""
    n, c, s = activations.shape
    classes = alpha.shape[1]
    tile = whole(activations)
    channels, positions, warps = tile_of(activations) if tile is None else (tile.channels, tile.positions, tile.warps)
    pieces = triton.cdiv(c, channels)
    parts = out[:, None] if pieces == 1 else partial_maps(activations, classes, pieces, out.dtype)
    acc = tl.float64 if out.dtype == torch.float64 else tl.float32
    if tile is None:
        _kernel[(n * pieces,)](
            activations, alpha, parts,
            *activations.stride(), *alpha.stride(),
            c, s, classes, pieces,
            ACC=acc, BLOCK_C=channels, BLOCK_S=positions, num_warps=warps,
        )  # fmt: skip
    else:
        _whole_kernel[(n * pieces,)](
            activations, alpha, parts,
            *activations.stride(), *alpha.stride(),
            c, s, classes, pieces,
            ACC=acc, FLAT=tile.flat, CHANNELS=channels, POSITIONS=positions, num_warps=warps,
        )  # fmt: skip
    if pieces > 1:
        torch.sum(parts, 1, out=out)
