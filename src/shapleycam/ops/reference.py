"""The operators in plain PyTorch: the oracle of the tests, the last rung of the ladder, and what exports trace.

Every function here takes checked arguments and computes in float32 (float64 for float64 activations).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .coefficients import COEFFICIENTS, Coefficients

EPS_DISPLAY = 1e-7  # of the min-max in the display form
EPS_ACTIVATION = 1e-7  # of the rows "activation" (XGradCAM, ShapleyCAM-X)
EPS_PLUSPLUS = 1e-6  # of GradCAM++


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over activations of ``dtype`` are kept, and in which maps are returned."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def weighted_reduce(activations: Tensor, gradient: Tensor, hvp: Tensor | None, pooling: str) -> Tensor:
    """The signed map [N, S] of one method row; see :func:`shapleycam.ops.weighted_reduce`."""
    wide = accumulator(activations.dtype)
    a = activations.to(wide)
    w = gradient.to(wide)
    if hvp is not None:
        w = w - hvp.to(wide) / 2
    if pooling == "mean":
        weight = w.mean(2, keepdim=True)
    elif pooling == "elementwise":
        weight = w
    elif pooling == "elementwise_relu":
        # clamp and relu keep NaN; a comparison would not
        return (w * a).clamp_min(0).sum(1)
    elif pooling == "activation":
        weight = (w * a).sum(2, keepdim=True) / (a.sum(2, keepdim=True) + EPS_ACTIVATION)
    elif pooling == "positive_gradient":
        weight = w.clamp_min(0)
    else:
        square = w * w
        ratio = square / (2 * square + square * w * a.sum(2, keepdim=True) + EPS_PLUSPLUS)
        weight = torch.where(w != 0, w.clamp_min(0) * ratio, torch.zeros_like(w)).sum(2, keepdim=True)
    return (weight * a).sum(1)


def channel_weighted_sum(activations: Tensor, alpha: Tensor) -> Tensor:
    """``sum_c alpha[n, m, c] activations[n, c, s]``, [N, M, S]."""
    wide = accumulator(activations.dtype)
    return torch.matmul(alpha.to(wide), activations.to(wide))


def utility_rows(logits: Tensor, targets: Tensor, bias: Tensor | None, utility: str, order: int, scale: float) -> Tensor:
    """``scale (U' - U'' z0 / 2)`` in the logits, [N, M, K]; see :func:`shapleycam.ops.utility_rows`."""
    wide = accumulator(logits.dtype)
    z = logits.to(wide)
    classes = z.shape[1]
    known = (targets >= 0) & (targets < classes)
    safe = targets.clamp(0, classes - 1)
    row = COEFFICIENTS[utility]
    unit = torch.zeros((*targets.shape, classes), dtype=wide, device=z.device).scatter_(2, safe[:, :, None], 1.0)
    if row.curved:
        p = z.softmax(1)
        z0 = z if bias is None else z - bias.to(wide)
        pz = p * z0
        first = row.gradient(p.gather(1, safe))
        second: Coefficients = (0.0, 0.0, 0.0)
        if order == 2:
            second = row.curvature(p.gather(1, safe), z0.gather(1, safe), pz.sum(1, keepdim=True))
        on_class, on_p, on_pz = (torch.as_tensor(a - b / 2, device=z.device) for a, b in zip(first, second, strict=True))
        on_class, on_p, on_pz = (c.to(wide).expand(targets.shape)[:, :, None] for c in (on_class, on_p, on_pz))
        unit = on_class * unit + on_p * p[:, None]
        if order == 2:
            unit = unit + on_pz * pz[:, None]
    return torch.where(known[:, :, None], unit * scale, float("nan"))


def class_maps(
    activations: Tensor, alpha: Tensor, grid: Sequence[int], size: Sequence[int], renormalize: bool, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """The signed maps [N, M, S] and their display form [N, M, *size]; see :func:`shapleycam.ops.class_maps`."""
    raw = channel_weighted_sum(activations, alpha)
    shown = display_map(raw.flatten(0, 1).unflatten(1, tuple(grid)), size, renormalize, dtype)
    return raw, shown.reshape(*raw.shape[:2], *size)


def _unit(maps: Tensor) -> Tensor:
    dims = tuple(range(1, maps.ndim))
    maps = maps - maps.amin(dims, keepdim=True)
    return maps / (EPS_DISPLAY + maps.amax(dims, keepdim=True))


def display_map(raw: Tensor, size: Sequence[int], renormalize: bool, dtype: torch.dtype | None = None) -> Tensor:
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


def overlay(images: Tensor, heatmaps: Tensor, table: Tensor, alpha: float, mean: Tensor | None, std: Tensor | None) -> Tensor:
    """Colour the heatmaps by ``table`` uint8 [256, 3] and blend; see :func:`shapleycam.ops.overlay`."""
    base = images.to(torch.float32)
    if images.dtype == torch.uint8:
        base = base / 255
    if mean is not None and std is not None:
        base = base * std.to(base.device).view(1, 3, 1, 1) + mean.to(base.device).view(1, 3, 1, 1)
    base = base.clamp(0, 1).movedim(1, -1)  # [N, H, W, 3]
    heat = heatmaps.to(torch.float32)
    known = torch.isfinite(heat)
    index = (heat.nan_to_num(0.0, 0.0, 0.0).clamp(0, 1) * 255).round().long()
    colour = table.to(index.device)[index].to(torch.float32) / 255
    mixed = ((1 - alpha) * base + alpha * colour) * 255
    drawn = mixed.nan_to_num(0.0).round().clamp(0, 255).to(torch.uint8)
    magenta = torch.tensor((255, 0, 255), dtype=torch.uint8, device=drawn.device)
    return torch.where(known[..., None], drawn, magenta).contiguous()
