"""weighted_reduce: every method row, one program per image and piece of the channels.

A program first reduces the weights of its channels over the positions (rows that need it), then adds its channels up into a
partial map; the partial maps are added in a fixed order. Where the positions are few, a program has all of them in one tile
and reads everything once; else it goes over them tile by tile. See csrc/cuda/reduce.cu for the same plan in CUDA.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import load_whole, partial_maps, spread, tile_of, whole

# Order of shapleycam.ops.contract.POOLINGS.
MEAN = tl.constexpr(0)
ELEMENTWISE = tl.constexpr(1)
ELEMENTWISE_RELU = tl.constexpr(2)
ACTIVATION = tl.constexpr(3)
POSITIVE_GRADIENT = tl.constexpr(4)
PLUSPLUS = tl.constexpr(5)
_CODES = {
    "mean": 0,
    "elementwise": 1,
    "elementwise_relu": 2,
    "activation": 3,
    "positive_gradient": 4,
    "plusplus": 5,
}


@triton.jit
def _positive(x):
    # A comparison and not tl.maximum: NaN must stay NaN.
    return tl.where(x < 0, 0.0, x)


@triton.jit
def _weights(g, h, c_offsets_g, c_offsets_h, s, mask, g_s, h_s, HAS_H: tl.constexpr, ACC: tl.constexpr):
    w = tl.load(g + c_offsets_g[:, None] + s[None, :] * g_s, mask=mask, other=0.0).to(ACC)
    if HAS_H:
        w -= 0.5 * tl.load(h + c_offsets_h[:, None] + s[None, :] * h_s, mask=mask, other=0.0).to(ACC)
    return w


@triton.jit
def _kernel(
    a, g, h, parts,
    a_n, a_c, a_s, g_n, g_c, g_s, h_n, h_c, h_s,
    C, S, pieces,
    POOLING: tl.constexpr, HAS_H: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    n = program // pieces
    c = (program % pieces) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    live = c < C
    at_a = n * a_n + c * a_c
    at_g = n * g_n + c * g_c
    at_h = n * h_n + c * h_c
    alpha = tl.zeros((BLOCK_C,), ACC)
    total = tl.zeros((BLOCK_C,), ACC)
    if POOLING == ACTIVATION or POOLING == PLUSPLUS:  # noqa: SIM109
        for start in range(0, S, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S).to(tl.int64)
            mask = live[:, None] & (s < S)[None, :]
            total += tl.sum(tl.load(a + at_a[:, None] + s[None, :] * a_s, mask=mask, other=0.0).to(ACC), 1)
    if POOLING == MEAN or POOLING == ACTIVATION or POOLING == PLUSPLUS:  # noqa: SIM109
        for start in range(0, S, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S).to(tl.int64)
            mask = live[:, None] & (s < S)[None, :]
            w = _weights(g, h, at_g, at_h, s, mask, g_s, h_s, HAS_H, ACC)
            if POOLING == ACTIVATION:
                w *= tl.load(a + at_a[:, None] + s[None, :] * a_s, mask=mask, other=0.0).to(ACC)
            if POOLING == PLUSPLUS:
                square = w * w
                ratio = square / (2 * square + square * w * total[:, None] + 1e-6)
                w = tl.where(w == 0, 0.0, _positive(w) * ratio)
            alpha += tl.sum(w, 1)
        if POOLING == MEAN:
            alpha /= S
        if POOLING == ACTIVATION:
            alpha /= total + 1e-7
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S).to(tl.int64)
        mask = live[:, None] & (s < S)[None, :]
        x = tl.load(a + at_a[:, None] + s[None, :] * a_s, mask=mask, other=0.0).to(ACC)
        if POOLING == ELEMENTWISE:
            x *= _weights(g, h, at_g, at_h, s, mask, g_s, h_s, HAS_H, ACC)
        elif POOLING == ELEMENTWISE_RELU:
            x = _positive(x * _weights(g, h, at_g, at_h, s, mask, g_s, h_s, HAS_H, ACC))
        elif POOLING == POSITIVE_GRADIENT:
            x *= _positive(_weights(g, h, at_g, at_h, s, mask, g_s, h_s, HAS_H, ACC))
        else:
            # A channel beyond C has weight 0 / 0 in some rows; its activations are 0, but 0 · NaN is not.
            x *= tl.where(live, alpha, 0.0)[:, None]
        tl.store(parts + program * S + s, tl.sum(x, 0), mask=s < S)


@triton.jit
def _whole_kernel(
    a, g, h, parts,
    a_n, a_c, a_s, g_n, g_c, g_s, h_n, h_c, h_s,
    C, S, pieces,
    POOLING: tl.constexpr, HAS_H: tl.constexpr, ACC: tl.constexpr,
    FLAT: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """CHANNELS channels with all their positions: see Whole in tiles.py."""
    program = tl.program_id(0).to(tl.int64)
    n = program // pieces
    first = program % pieces * CHANNELS
    w = load_whole(g, n, first, C, S, g_n, g_c, g_s, FLAT, CHANNELS, POSITIONS).to(ACC)
    x = load_whole(a, n, first, C, S, a_n, a_c, a_s, FLAT, CHANNELS, POSITIONS)
    if HAS_H:
        w -= 0.5 * load_whole(h, n, first, C, S, h_n, h_c, h_s, FLAT, CHANNELS, POSITIONS).to(ACC)
    if POOLING == ELEMENTWISE:
        x = spread(x.to(ACC) * w, S, FLAT, CHANNELS, POSITIONS)
    elif POOLING == ELEMENTWISE_RELU:
        x = spread(_positive(x.to(ACC) * w), S, FLAT, CHANNELS, POSITIONS)
    elif POOLING == POSITIVE_GRADIENT:
        x = spread(x.to(ACC) * _positive(w), S, FLAT, CHANNELS, POSITIONS)
    else:
        x = spread(x, S, FLAT, CHANNELS, POSITIONS).to(ACC)
        w = spread(w, S, FLAT, CHANNELS, POSITIONS)
        if POOLING == MEAN:
            alpha = tl.sum(w, 1) / S
        elif POOLING == ACTIVATION:
            alpha = tl.sum(w * x, 1) / (tl.sum(x, 1) + 1e-7)
        else:
            square = w * w
            ratio = square / (2 * square + square * w * tl.sum(x, 1)[:, None] + 1e-6)
            alpha = tl.sum(tl.where(w == 0, 0.0, _positive(w) * ratio), 1)
        x *= alpha[:, None]
    s = tl.arange(0, POSITIONS)
    tl.store(parts + program * S + s, tl.sum(x, 0), mask=s < S)


def weighted_reduce(activations: Tensor, gradient: Tensor, hvp: Tensor | None, pooling: str, out: Tensor) -> None:
    """Fill ``out`` [N, S] (float32, or float64 for float64 activations) with the signed map of the row ``pooling``."""
    n, c, s = activations.shape
    second = gradient if hvp is None else hvp  # an unused pointer, when there is none
    tile = whole(activations, gradient, second, again=pooling in ("activation", "plusplus"))
    channels, positions, warps = tile_of(activations) if tile is None else (tile.channels, tile.positions, tile.warps)
    pieces = triton.cdiv(c, channels)
    parts = out[:, None] if pieces == 1 else partial_maps(activations, 1, pieces, out.dtype)
    code, acc = _CODES[pooling], tl.float64 if out.dtype == torch.float64 else tl.float32
    if tile is None:
        _kernel[(n * pieces,)](
            activations, gradient, second, parts,
            *activations.stride(), *gradient.stride(), *second.stride(),
            c, s, pieces,
            POOLING=code, HAS_H=hvp is not None, ACC=acc, BLOCK_C=channels, BLOCK_S=positions, num_warps=warps,
        )  # fmt: skip
    else:
        _whole_kernel[(n * pieces,)](
            activations, gradient, second, parts,
            *activations.stride(), *gradient.stride(), *second.stride(),
            c, s, pieces,
            POOLING=code, HAS_H=hvp is not None, ACC=acc,
            FLAT=tile.flat, CHANNELS=channels, POSITIONS=positions, num_warps=warps,
        )  # fmt: skip
    if pieces > 1:
        torch.sum(parts[:, :, 0], 1, out=out)
