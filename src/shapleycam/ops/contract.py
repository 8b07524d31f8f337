"""The operators' contract: what their arguments must be, and one allocator for what they return.

The eager implementation and the fake one (used under ``torch.compile`` and export) call the same functions here, so their
shapes and dtypes cannot drift apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .reference import accumulator

POOLINGS = ("mean", "elementwise", "elementwise_relu", "activation", "positive_gradient", "plusplus")
UTILITIES = ("logit", "probability", "log_probability", "rest")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _floating(name: str, tensor: Tensor, operator: str) -> None:
    if not isinstance(tensor, Tensor):
        raise InputError(f"{operator}: {name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if tensor.dtype not in DTYPES:
        raise InputError(f"{operator}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}.")


def check_weighted_reduce(activations: Tensor, gradient: Tensor, hvp: Tensor | None, pooling: str) -> None:
    """Raise InputError unless the arguments are [N, C, S] alike, on one device, and the pooling is known."""
    operator = "weighted_reduce"
    _floating("activations", activations, operator)
    if activations.ndim != 3 or activations.shape[1] == 0 or activations.shape[2] == 0:
        raise InputError(f"{operator}: activations must be [N, C, S] with C, S >= 1, got shape {tuple(activations.shape)}.")
    if pooling not in POOLINGS:
        raise InputError(f"{operator}: unknown pooling {pooling!r}; expected one of {', '.join(POOLINGS)}.")
    for name, tensor in (("gradient", gradient), ("hvp", hvp)):
        if tensor is None:
            continue
        _floating(name, tensor, operator)
        if tensor.shape != activations.shape or tensor.device != activations.device:
            raise InputError(
                f"{operator}: {name} must be {tuple(activations.shape)} on {activations.device} like the activations, "
                f"got {tuple(tensor.shape)} on {tensor.device}. A constant weight is passed as tensor.expand_as(activations)."
            )


def check_channel_weighted_sum(activations: Tensor, alpha: Tensor) -> None:
    """Raise InputError unless activations are [N, C, S] and alpha [N, M, C] on one device."""
    operator = "channel_weighted_sum"
    _floating("activations", activations, operator)
    _floating("alpha", alpha, operator)
    if activations.ndim != 3 or activations.shape[1] == 0 or activations.shape[2] == 0:
        raise InputError(f"{operator}: activations must be [N, C, S] with C, S >= 1, got shape {tuple(activations.shape)}.")
    n, c, _ = activations.shape
    if alpha.ndim != 3 or alpha.shape[0] != n or alpha.shape[2] != c or alpha.device != activations.device:
        raise InputError(
            f"{operator}: alpha must be [{n}, M, {c}] on {activations.device}, got {tuple(alpha.shape)} on {alpha.device}."
        )


def check_utility_rows(logits: Tensor, targets: Tensor, bias: Tensor | None, utility: str, order: int) -> None:
    """Raise InputError unless logits are [N, K], targets int64 [N, M] and bias [K] on one device, and the names are known."""
    operator = "utility_rows"
    _floating("logits", logits, operator)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise InputError(f"{operator}: logits must be [N, K] with K >= 1, got shape {tuple(logits.shape)}.")
    n, k = logits.shape
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        got = str(targets.dtype) if isinstance(targets, Tensor) else type(targets).__name__
        raise InputError(f"{operator}: targets must be an int64 tensor [{n}, M], got {got}.")
    if targets.ndim != 2 or targets.shape[0] != n or targets.device != logits.device:
        raise InputError(
            f"{operator}: targets must be [{n}, M] on {logits.device}, got {tuple(targets.shape)} on {targets.device}."
        )
    if bias is not None:
        _floating("bias", bias, operator)
        if bias.shape != (k,) or bias.device != logits.device:
            raise InputError(f"{operator}: bias must be [{k}] on {logits.device}, got {tuple(bias.shape)} on {bias.device}.")
    if utility not in UTILITIES:
        raise InputError(f"{operator}: unknown utility {utility!r}; expected one of {', '.join(UTILITIES)}.")
    if order not in (1, 2):
        raise InputError(f"{operator}: order must be 1 (gradient) or 2 (Shapley weight), got {order!r}.")


def check_head_weight(weight: Tensor, rows: Tensor, activations: Tensor) -> None:
    """Raise InputError unless weight is [K, C] on the device of the logits' rows and the activations."""
    _floating("weight", weight, "shapley_head")
    wanted = (rows.shape[2], activations.shape[1])
    if weight.shape != wanted or weight.device != rows.device:
        raise InputError(
            f"shapley_head: weight must be {wanted} on {rows.device}, got {tuple(weight.shape)} on {weight.device}."
        )


def check_class_maps(
    activations: Tensor, alpha: Tensor, grid: Sequence[int], size: Sequence[int], dtype: torch.dtype | None
) -> None:
    """Raise InputError unless the arguments fit :func:`check_channel_weighted_sum` and ``grid`` multiplies to S."""
    check_channel_weighted_sum(activations, alpha)
    if not 1 <= len(grid) <= 3 or math.prod(grid) != activations.shape[2] or any(g < 1 for g in grid):
        raise InputError(
            f"class_maps: grid must be one to three extents whose product is the {activations.shape[2]} positions, got "
            f"{tuple(grid)}."
        )
    if len(size) != len(grid) or any(s < 1 for s in size):
        raise InputError(f"class_maps: size must be {len(grid)} positive integers, got {tuple(size)}.")
    if dtype not in (None, accumulator(activations.dtype), torch.float16, torch.uint8):
        raise InputError(f"class_maps: dtype must be None, {accumulator(activations.dtype)}, float16 or uint8, got {dtype}.")


def check_display_map(raw: Tensor, size: Sequence[int], dtype: torch.dtype | None) -> None:
    """Raise InputError unless raw is [N, *grid] with one to three spatial dimensions, and size and dtype fit."""
    _floating("raw", raw, "display_map")
    if not 2 <= raw.ndim <= 4 or 0 in raw.shape[1:]:
        raise InputError(f"display_map: raw must be [N, h, w] (or [N, l], [N, d, h, w]), got shape {tuple(raw.shape)}.")
    if len(size) != raw.ndim - 1 or any(s < 1 for s in size):
        raise InputError(f"display_map: size must be {raw.ndim - 1} positive integers, got {tuple(size)}.")
    if dtype not in (None, accumulator(raw.dtype), torch.float16, torch.uint8):
        raise InputError(f"display_map: dtype must be None, {accumulator(raw.dtype)}, float16 or uint8, got {dtype}.")


def check_overlay(
    images: Tensor, heatmaps: Tensor, alpha: float, mean: Sequence[float] | None, std: Sequence[float] | None
) -> None:
    """Raise InputError unless images are [N, 3, H, W], heatmaps [N, H, W] on the same device, and alpha is in [0, 1]."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"overlay: images must be [N, 3, H, W], got {got}.")
    if images.dtype != torch.uint8:
        _floating("images", images, "overlay")
    _floating("heatmaps", heatmaps, "overlay")
    wanted = (images.shape[0], *images.shape[2:])
    if heatmaps.shape != wanted or heatmaps.device != images.device:
        raise InputError(
            f"overlay: heatmaps must be {wanted} on {images.device}, got {tuple(heatmaps.shape)} on {heatmaps.device}."
        )
    if not 0 <= alpha <= 1:
        raise InputError(f"overlay: alpha must be between 0 and 1, got {alpha}.")
    if (mean is None) != (std is None):
        raise InputError("overlay: give both mean and std, or neither.")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != 3:
            raise InputError(f"overlay: {name} must have three numbers, one per channel, got {values!r}.")


def empty_reduced(activations: Tensor) -> Tensor:
    """The result of ``weighted_reduce``, not filled: [N, S]."""
    shape = (activations.shape[0], activations.shape[2])
    return torch.empty(shape, dtype=accumulator(activations.dtype), device=activations.device)


def empty_summed(activations: Tensor, alpha: Tensor) -> Tensor:
    """The result of ``channel_weighted_sum``, not filled: [N, M, S]."""
    shape = (activations.shape[0], alpha.shape[1], activations.shape[2])
    return torch.empty(shape, dtype=accumulator(activations.dtype), device=activations.device)


def empty_rows(logits: Tensor, targets: Tensor) -> Tensor:
    """The result of ``utility_rows``, not filled: [N, M, K]."""
    shape = (logits.shape[0], targets.shape[1], logits.shape[1])
    return torch.empty(shape, dtype=accumulator(logits.dtype), device=logits.device)


def empty_maps(activations: Tensor, alpha: Tensor, size: Sequence[int], dtype: torch.dtype | None) -> Tensor:
    """The display form of ``class_maps``, not filled: [N, M, *size]."""
    shape = (activations.shape[0], alpha.shape[1], *size)
    return torch.empty(shape, dtype=dtype or accumulator(activations.dtype), device=activations.device)


def empty_display(raw: Tensor, size: Sequence[int], dtype: torch.dtype | None) -> Tensor:
    """The result of ``display_map``, not filled: [N, *size]."""
    return torch.empty((raw.shape[0], *size), dtype=dtype or accumulator(raw.dtype), device=raw.device)


def empty_overlay(heatmaps: Tensor) -> Tensor:
    """The result of ``overlay``, not filled: uint8 [N, H, W, 3]."""
    return torch.empty((*heatmaps.shape, 3), dtype=torch.uint8, device=heatmaps.device)
