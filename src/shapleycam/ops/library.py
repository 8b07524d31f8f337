"""Registration with torch.library: one operator per function, with the ladder inside it.

One opaque operator and not a ``triton_op``: there is nothing around these kernels left to fuse, and the interpreter, opcheck
and export all work with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from . import contract, launch, reference
from .colormaps import table_of
from .ladder import select

# torch.library reads these signatures: Optional and int lists are spelt the way its schema inference knows.
# ruff: noqa: UP045


@torch.library.custom_op("shapleycam::weighted_reduce", mutates_args=())
def weighted_reduce(activations: Tensor, gradient: Tensor, hvp: Optional[Tensor], pooling: str, backend: str) -> Tensor:
    served = select("weighted_reduce", activations, pooling=pooling, backend=backend)
    if served == "torch":
        return reference.weighted_reduce(activations, gradient, hvp, pooling)
    out = contract.empty_reduced(activations)
    if out.numel():
        launch.weighted_reduce(served, activations, gradient, hvp, pooling, out)
    return out


@weighted_reduce.register_fake
def _(activations: Tensor, gradient: Tensor, hvp: Optional[Tensor], pooling: str, backend: str) -> Tensor:
    return contract.empty_reduced(activations)


@torch.library.custom_op("shapleycam::channel_weighted_sum", mutates_args=())
def channel_weighted_sum(activations: Tensor, alpha: Tensor, backend: str) -> Tensor:
    served = select("channel_weighted_sum", activations, backend=backend)
    if served == "torch":
        return reference.channel_weighted_sum(activations, alpha)
    out = contract.empty_summed(activations, alpha)
    if out.numel():
        launch.channel_weighted_sum(served, activations, alpha, out)
    return out


@channel_weighted_sum.register_fake
def _(activations: Tensor, alpha: Tensor, backend: str) -> Tensor:
    return contract.empty_summed(activations, alpha)


@torch.library.custom_op("shapleycam::utility_rows", mutates_args=())
def utility_rows(
    logits: Tensor, targets: Tensor, bias: Optional[Tensor], utility: str, order: int, scale: float, backend: str
) -> Tensor:
    served = select("utility_rows", logits, backend=backend)
    if served == "torch":
        return reference.utility_rows(logits, targets, bias, utility, order, scale)
    out = contract.empty_rows(logits, targets)
    if out.numel():
        launch.utility_rows(served, logits, targets, bias, utility, order, scale, out)
    return out


@utility_rows.register_fake
def _(logits: Tensor, targets: Tensor, bias: Optional[Tensor], utility: str, order: int, scale: float, backend: str) -> Tensor:
    return contract.empty_rows(logits, targets)


@torch.library.custom_op("shapleycam::class_maps", mutates_args=())
def class_maps(
    activations: Tensor,
    alpha: Tensor,
    grid: Sequence[int],
    size: Sequence[int],
    renormalize: bool,
    dtype: Optional[torch.dtype],
    backend: str,
) -> tuple[Tensor, Tensor]:
    served = select("class_maps", activations, backend=backend)
    if served == "torch":
        return reference.class_maps(activations, alpha, grid, size, renormalize, dtype)
    raw, maps = contract.empty_summed(activations, alpha), contract.empty_maps(activations, alpha, size, dtype)
    if raw.numel():
        launch.class_maps(served, activations, alpha, grid, renormalize, raw, maps)
    return raw, maps


@class_maps.register_fake
def _(
    activations: Tensor,
    alpha: Tensor,
    grid: Sequence[int],
    size: Sequence[int],
    renormalize: bool,
    dtype: Optional[torch.dtype],
    backend: str,
) -> tuple[Tensor, Tensor]:
    return contract.empty_summed(activations, alpha), contract.empty_maps(activations, alpha, size, dtype)


@torch.library.custom_op("shapleycam::display_map", mutates_args=())
def display_map(raw: Tensor, size: Sequence[int], renormalize: bool, dtype: Optional[torch.dtype], backend: str) -> Tensor:
    served = select("display_map", raw, backend=backend)
    if served == "torch":
        return reference.display_map(raw, size, renormalize, dtype)
    out = contract.empty_display(raw, size, dtype)
    if out.numel():
        launch.display_map(served, raw, renormalize, out)
    return out


@display_map.register_fake
def _(raw: Tensor, size: Sequence[int], renormalize: bool, dtype: Optional[torch.dtype], backend: str) -> Tensor:
    return contract.empty_display(raw, size, dtype)


@torch.library.custom_op("shapleycam::overlay", mutates_args=())
def overlay(
    images: Tensor,
    heatmaps: Tensor,
    colormap: str,
    alpha: float,
    mean: Optional[Sequence[float]],
    std: Optional[Sequence[float]],
    backend: str,
) -> Tensor:
    served = select("overlay", heatmaps, backend=backend)
    table = table_of(colormap, images.device)
    if served == "torch":
        shift = None if mean is None else torch.tensor(mean, dtype=torch.float32)
        scale = None if std is None else torch.tensor(std, dtype=torch.float32)
        return reference.overlay(images, heatmaps, table, alpha, shift, scale)
    out = contract.empty_overlay(heatmaps)
    if out.numel():
        launch.overlay(served, images, heatmaps, table, alpha, mean, std, out)
    return out


@overlay.register_fake
def _(
    images: Tensor,
    heatmaps: Tensor,
    colormap: str,
    alpha: float,
    mean: Optional[Sequence[float]],
    std: Optional[Sequence[float]],
    backend: str,
) -> Tensor:
    return contract.empty_overlay(heatmaps)
