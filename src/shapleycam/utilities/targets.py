"""The classes to explain: checked on the host where that costs nothing, placed on the device."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from ..errors import TargetError


def check_targets(targets: Any, batch: int, classes: int | None) -> None:
    """Check what can be checked of ``targets`` on the host, before any work.

    Raises:
        TargetError: wrong type, dtype, shape, or (for an int or a tensor in host memory) out of range.
    """
    if targets is None or (isinstance(targets, int) and not isinstance(targets, bool)):
        if targets is not None and (targets < 0 or (classes is not None and targets >= classes)):
            raise TargetError(f"target {targets} is out of range: the model has {classes or 'fewer'} classes, counted from 0.")
        return
    if not isinstance(targets, Tensor):
        raise TargetError(f"targets must be None, an int, or an integer tensor [N] or [N, M]; got {type(targets).__name__}.")
    if targets.dtype.is_floating_point or targets.dtype.is_complex or targets.dtype == torch.bool:
        raise TargetError(f"targets must be integers (class indices), got {targets.dtype}. Use targets.long().")
    if targets.ndim not in (1, 2) or targets.shape[0] != batch or (targets.ndim == 2 and targets.shape[1] == 0):
        raise TargetError(
            f"targets must have shape [{batch}] or [{batch}, M] for a batch of {batch} images, got {tuple(targets.shape)}."
        )
    if classes is not None and targets.device.type == "cpu":
        wrong = targets[(targets < 0) | (targets >= classes)]
        if wrong.numel():
            raise TargetError(f"target {int(wrong[0])} is out of range: the model has {classes} classes, 0 to {classes - 1}.")


def as_targets(targets: Any) -> Any:
    """Sequences and NumPy values of integers as an int or a tensor; everything else as it is."""
    if isinstance(targets, numbers.Integral) and not isinstance(targets, bool):
        return int(targets)
    if isinstance(targets, (list, tuple)) or hasattr(targets, "__array_interface__"):
        try:
            return torch.as_tensor(targets)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TargetError(f"targets {targets!r} are not a rectangular list of class indices: {error}") from error
    return targets


def place_targets(targets: Any, logits: Tensor | None, batch: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Targets as int64 [N, M] on ``device``, and a poison [N].

    An index that lives on the device cannot be checked without waiting for it. It is clamped, and its image's map poisoned
    with NaN, so that a wrong index is neither an illegal read nor a pretty map.
    """
    classes = logits.shape[1] if logits is not None and logits.ndim == 2 else None
    check_targets(targets, batch, classes)
    if targets is None:
        if logits is None or classes is None:
            return None, None
        return logits.detach().argmax(1, keepdim=True), None
    if isinstance(targets, int):
        return torch.full((batch, 1), targets, dtype=torch.int64, device=device), None
    if targets.is_inference():
        targets = targets.clone()  # an index made in inference mode cannot be saved for a backward pass
    placed = targets.to(device, torch.int64, non_blocking=True)
    placed = placed[:, None] if placed.ndim == 1 else placed
    if classes is None or targets.device.type == "cpu":
        return placed, None
    safe = placed.clamp(0, classes - 1)
    return safe, torch.where((safe != placed).any(1), float("nan"), 0.0)
