"""quadrature_rows: the softmaxes of all nodes of a path and the weights of the logits, one program per image."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# Order of shapleycam.ops.contract.UTILITIES.
LOGIT = tl.constexpr(0)
PROBABILITY = tl.constexpr(1)
REST = tl.constexpr(3)


@triton.jit
def _vector(values, rests, NODES: tl.constexpr, ACC: tl.constexpr):
    """A tensor [NODES] of scalars, which come as float32 with, for float64, what that leaves of them."""
    node = tl.arange(0, NODES)
    out = tl.zeros((NODES,), ACC)
    for q in tl.static_range(NODES):
        value = tl.full((NODES,), values[q], ACC)
        if tl.float64 == ACC:
            value += tl.full((NODES,), rests[q], ACC)
        out = tl.where(node == q, value, out)
    return out


@triton.jit
def _point(to_z, to_start, logits, start, at, K, HAS_START: tl.constexpr, ACC: tl.constexpr):
    """The path at every node, [NODES, BLOCK]; lanes beyond the end repeat the first logit, which changes no maximum."""
    inside = tl.where(at < K, at, 0)
    x = to_z[:, None] * tl.load(logits + inside).to(ACC)[None, :]
    if HAS_START:
        x += to_start[:, None] * tl.load(start + inside).to(ACC)[None, :]
    return x


@triton.jit
def _kernel(
    logits, start, targets, rows,
    to_z, to_start, weights, z_rests, start_rests, weight_rests,
    stride, start_stride, K, M,
    UTILITY: tl.constexpr, HAS_START: tl.constexpr, ACC: tl.constexpr, NODES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    logits += n * stride
    start += n * start_stride
    lane = tl.arange(0, BLOCK)
    on_z = _vector(to_z, z_rests, NODES, ACC)
    on_start = _vector(to_start, start_rests, NODES, ACC)
    weight = _vector(weights, weight_rests, NODES, ACC)
    top = tl.zeros((NODES,), ACC)
    total = tl.zeros((NODES,), ACC)
    if UTILITY != LOGIT:
        # The maximum drops NaN, which the sums bring back.
        most = _point(on_z, on_start, logits, start, lane, K, HAS_START, ACC)
        for first in range(BLOCK, K, BLOCK):
            most = tl.maximum(most, _point(on_z, on_start, logits, start, first + lane, K, HAS_START, ACC))
        top = tl.max(most, 1)
        sums = tl.zeros((NODES, BLOCK), ACC)
        for first in range(0, K, BLOCK):
            at = first + lane
            e = tl.exp(_point(on_z, on_start, logits, start, at, K, HAS_START, ACC) - top[:, None])
            sums += tl.where((at < K)[None, :], e, 0.0)
        total = tl.sum(sums, 1)
    for m in range(0, M):
        c = tl.load(targets + n * M + m)
        known = (c >= 0) & (c < K)
        share = weight
        factor = weight
        if UTILITY == PROBABILITY:
            safe = tl.where(known, c, 0)
            x_c = on_z * tl.load(logits + safe).to(ACC)
            if HAS_START:
                x_c += on_start * tl.load(start + safe).to(ACC)
            share = weight * (tl.exp(x_c - top) / total)
        if UTILITY != LOGIT:
            factor = share / total
        on_class = tl.sum(share, 0)
        if UTILITY == REST:
            on_class *= 2
        for first in range(0, K, BLOCK):
            at = first + lane
            row = tl.zeros((BLOCK,), ACC)
            if UTILITY != LOGIT:
                e = tl.exp(_point(on_z, on_start, logits, start, at, K, HAS_START, ACC) - top[:, None])
                row -= tl.sum(factor[:, None] * e, 0)
            row = tl.where(at == c, row + on_class, row)
            tl.store(rows + (n * M + m) * K + at, tl.where(known, row, float("nan")), mask=at < K)


def _halves(values: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The values in float32, and what that leaves of them: Triton passes a float as float32."""
    near = tuple(ctypes.c_float(value).value for value in values)
    return near, tuple(value - high for value, high in zip(values, near, strict=True))


def quadrature_rows(
    logits: Tensor,
    targets: Tensor,
    start: Tensor | None,
    utility: int,
    scale: float,
    nodes: Sequence[float],
    weights: Sequence[float],
    rows: Tensor,
) -> None:
    """Fill ``rows`` [N, M, K] (float32, or float64 for float64 logits).

    The last strides of the logits and the start [N, K] are 1, the rest contiguous. The number of nodes is rounded up to a power
    of two, by nodes of no weight: it is what the kernel is compiled for, with what Triton makes of the extents.
    """
    n, k = logits.shape
    count = triton.next_power_of_2(len(nodes))
    places = [*nodes, *[nodes[0]] * (count - len(nodes))]
    parts = [weight * scale for weight in weights] + [0.0] * (count - len(nodes))
    wide = rows.dtype == torch.float64
    values, rests = zip(*(_halves(v) for v in (places, [1 - t for t in places], parts)), strict=True)
    _kernel[(n,)](
        logits, logits if start is None else start, targets, rows,
        *values, *(rests if wide else (None, None, None)),
        logits.stride(0), 0 if start is None else start.stride(0), k, targets.shape[1],
        UTILITY=utility, HAS_START=start is not None, ACC=tl.float64 if wide else tl.float32, NODES=count,
        BLOCK=min(1024, 4096 // count, triton.next_power_of_2(k)), num_warps=4,
    )  # fmt: skip
