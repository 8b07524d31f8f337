"""utility_rows: softmax, coefficients and the weights of the logits, one program per image."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Order of shapleycam.ops.contract.UTILITIES.
LOGIT = tl.constexpr(0)
PROBABILITY = tl.constexpr(1)
REST = tl.constexpr(3)


@triton.jit
def _kernel(
    logits, bias, targets, rows,
    stride, scale: tl.float64, K, M,
    UTILITY: tl.constexpr, SECOND: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    logits += n * stride
    lane = tl.arange(0, BLOCK)
    factor = tl.full((), scale, ACC)  # Triton passes a float as float32 where nothing says otherwise
    # Lanes beyond the end repeat the first logit, which changes no maximum; tl.max drops NaN, which the sum below brings back.
    most = tl.load(logits + lane * 0).to(ACC)
    for start in range(0, K, BLOCK):
        most = tl.maximum(most, tl.load(logits + tl.where(start + lane < K, start + lane, 0)).to(ACC))
    top = tl.max(most, 0)
    sums = tl.zeros((BLOCK,), ACC)
    weighted = tl.zeros((BLOCK,), ACC)
    for start in range(0, K, BLOCK):
        at = start + lane
        z = tl.load(logits + at, mask=at < K, other=0.0).to(ACC)
        z0 = z
        if HAS_BIAS:
            z0 -= tl.load(bias + at, mask=at < K, other=0.0).to(ACC)
        e = tl.where(at < K, tl.exp(z - top), 0.0)
        sums += e
        weighted += tl.where(at < K, e * z0, 0.0)
    total = tl.sum(sums, 0)
    s = tl.sum(weighted, 0) / total
    for m in range(0, M):
        c = tl.load(targets + n * M + m)
        known = (c >= 0) & (c < K)
        safe = tl.where(known, c, 0)
        z_c = tl.load(logits + safe).to(ACC)
        z0_c = z_c
        if HAS_BIAS:
            z0_c -= tl.load(bias + safe).to(ACC)
        p_c = tl.exp(z_c - top) / total
        if UTILITY == PROBABILITY:
            on_c = p_c
            on_p = -p_c
            on_pz = p_c * 0
            if SECOND:
                on_c = p_c * (1 - 0.5 * (z0_c - s))
                on_p = -p_c * (1 + 0.5 * (2 * s - z0_c))
                on_pz = 0.5 * p_c
        else:
            on_c = tl.full((), 1.0, ACC)
            on_p = tl.full((), -1.0, ACC)
            on_pz = tl.full((), 0.0, ACC)
            if UTILITY == REST:
                on_c += 1.0
            if SECOND:
                on_p -= 0.5 * s
                on_pz += 0.5
        for start in range(0, K, BLOCK):
            at = start + lane
            row = tl.zeros((BLOCK,), ACC)
            if UTILITY != LOGIT:
                z = tl.load(logits + at, mask=at < K, other=0.0).to(ACC)
                z0 = z
                if HAS_BIAS:
                    z0 -= tl.load(bias + at, mask=at < K, other=0.0).to(ACC)
                p = tl.exp(z - top) / total
                row = on_p * p
                if SECOND:
                    row += on_pz * (p * z0)
            row = tl.where(at == c, row + on_c, row) * factor
            tl.store(rows + (n * M + m) * K + at, tl.where(known, row, float("nan")), mask=at < K)


def utility_rows(
    logits: Tensor, targets: Tensor, bias: Tensor | None, utility: int, order: int, scale: float, rows: Tensor
) -> None:
    """Fill ``rows`` [N, M, K] (float32, or float64 for float64 logits); the logits' last stride is 1, the rest contiguous."""
    n, k = logits.shape
    _kernel[(n,)](
        logits, logits if bias is None else bias, targets, rows,
        logits.stride(0), scale, k, targets.shape[1],
        UTILITY=utility, SECOND=order == 2, HAS_BIAS=bias is not None,
        ACC=tl.float64 if rows.dtype == torch.float64 else tl.float32, BLOCK=min(1024, triton.next_power_of_2(k)), num_warps=4,
    )  # fmt: skip
