"""overlay: heatmaps in colour over images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .colormaps import check_name, table_of
from .operator import Operator
from .shared import check_floating
from .tolerance import Expected


def check(images: Tensor, heatmaps: Tensor, alpha: float, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Raise InputError unless images are [N, 3, H, W], heatmaps [N, H, W] on the same device, and alpha is in [0, 1]."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"overlay: images must be [N, 3, H, W], got {got}.")
    if images.dtype != torch.uint8:
        check_floating("images", images, "overlay")
    check_floating("heatmaps", heatmaps, "overlay")
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


def reference(images: Tensor, heatmaps: Tensor, table: Tensor, alpha: float, mean: Tensor | None, std: Tensor | None) -> Tensor:
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


def _by_name(
    images: Tensor,
    heatmaps: Tensor,
    colormap: str,
    alpha: float,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Tensor:
    shift = None if mean is None else torch.tensor(mean, dtype=torch.float32)
    scale = None if std is None else torch.tensor(std, dtype=torch.float32)
    return reference(images, heatmaps, table_of(colormap, images.device), alpha, shift, scale)


def empty(
    images: Tensor,
    heatmaps: Tensor,
    colormap: str,
    alpha: float,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Tensor:
    """The result, not filled: uint8 [N, H, W, 3]."""
    return torch.empty((*heatmaps.shape, 3), dtype=torch.uint8, device=heatmaps.device)


def _expect(arguments: tuple[Any, ...], results: tuple[Tensor, ...]) -> list[Expected]:
    # In float32, as it is defined. Where the sum lies half-way between two bytes, the order of the additions decides.
    value = _by_name(*arguments).double()
    return [Expected(value, torch.ones_like(value))]


OPERATOR = Operator(
    "overlay",
    "(Tensor images, Tensor heatmaps, str colormap, float alpha, float[]? mean, float[]? std, str backend) -> Tensor",
    reference=_by_name,
    empty=empty,
    expect=_expect,
)


def overlay(
    images: Tensor,
    heatmaps: Tensor,
    *,
    colormap: str = "jet",
    alpha: float = 0.5,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Heatmaps in colour over images.

    Args:
        images: [N, 3, H, W]: uint8, or floating in [0, 1], or normalised by ``mean`` and ``std`` (three numbers each).
        heatmaps: [N, H, W] in [0, 1] on the same device.
        colormap: "jet", "turbo", "viridis" or "magma".
        alpha: weight of the colours, in [0, 1].
        backend: as for :func:`weighted_reduce`.

    Returns:
        uint8 [N, H, W, 3]; positions where the heatmap is NaN or Inf are magenta.

    Raises:
        InputError: an argument does not fit.
        BackendError: the backend named cannot serve.
    """
    check(images, heatmaps, alpha, mean, std)
    check_name(colormap)
    shift = None if mean is None else [float(x) for x in mean]
    scale = None if std is None else [float(x) for x in std]
    out: Tensor = OPERATOR(backend, images.detach(), heatmaps.detach(), colormap, alpha, shift, scale)
    return out
