"""The classes to explain: checked on the host where that costs nothing, placed on the device."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import TargetError


def check_targets(targets: Any, batch: int, classes: int | None) -> None:
    """Check what can be checked of ``targets`` on the host, before any work.

    Raises:
        TargetError: wrong type, dtype, shape, one-hot instead of indices, or (for an int or a tensor in host memory) out of
            range.
    """
    if targets is None or (isinstance(targets, int) and not isinstance(targets, bool)):
        _check_range(targets, classes)
        return
    if not isinstance(targets, Tensor):
        raise TargetError(f"targets must be None, an int, or integers [N] or [N, M]; got {type(targets).__name__}.")
    shape = tuple(targets.shape)
    if targets.numel() == 0:
        raise TargetError(
            f"targets is empty, shape {shape}: expected [{batch}] or [{batch}, M] for a batch of {batch} images. For the "
            "predicted classes use targets=None."
        )
    if targets.dtype.is_floating_point or targets.dtype.is_complex or targets.dtype == torch.bool:
        use = "targets.argmax(1), if they are one-hot or scores [N, K]" if targets.ndim == 2 else "targets.long()"
        raise TargetError(f"targets must be integers (class indices), got {targets.dtype} {shape}. Use {use}.")
    if targets.ndim not in (1, 2) or targets.shape[0] != batch:
        hint = " For one class for all images use an int: int(targets)." if targets.ndim == 0 else ""
        raise TargetError(
            f"targets must have shape [{batch}] or [{batch}, M] for a batch of {batch} images, got {shape}.{hint}"
        )
    _check_range(targets, classes)


def _check_range(targets: Any, classes: int | None) -> None:
    """Check the values of targets of the right form, where they are on the host."""
    if targets is None:
        return
    if isinstance(targets, int):
        if targets < 0 or (classes is not None and targets >= classes):
            raise _out_of_range(targets, classes)
    elif targets.device.type == "cpu":
        encoded = _one_hot(targets, classes)
        if encoded is not None and bool(encoded.all()):
            raise TargetError(
                f"targets {tuple(targets.shape)} are one-hot, but class indices are expected. Use targets.argmax(1)."
            )
        low, high = _extremes(targets)
        if low < 0 or (classes is not None and high >= classes):
            wrong = targets < 0 if classes is None else (targets < 0) | (targets >= classes)
            raise _out_of_range(int(targets[wrong][0]), classes)


def _extremes(targets: Tensor) -> tuple[int, int]:
    """The smallest and the largest of targets in host memory; of few, a list tells that faster than an operator."""
    if targets.ndim == 1 and targets.shape[0] <= 64:
        numbers = targets.tolist()
        return min(numbers), max(numbers)
    low, high = targets.aminmax()
    return int(low), int(high)


def _out_of_range(target: int, classes: int | None) -> TargetError:
    if classes is None:
        return TargetError(f"target {target} is out of range: classes are counted from 0.")
    return TargetError(f"target {target} is out of range: the model has {classes} classes, 0 to {classes - 1}.")


def _one_hot(targets: Tensor, classes: int | None) -> Tensor | None:
    """Bool [N]: which rows are one-hot, [N, K] of 0 and 1; as indices such a row would name class 0 again and again."""
    if targets.ndim != 2 or targets.shape[1] != classes or classes < 3:
        return None
    return ((targets == 0) | (targets == 1)).all(1) & (targets.sum(1) == 1)


def as_targets(targets: Any) -> Any:
    """Integers, ranges, (nested) sequences and arrays of integers as an int or a tensor; everything else as it is.

    Raises:
        TargetError: a sequence that is no rectangle of numbers.
    """
    if targets is None or isinstance(targets, Tensor):
        return targets
    if isinstance(targets, numbers.Integral) and not isinstance(targets, bool):
        return int(targets)
    if (isinstance(targets, Sequence) and not isinstance(targets, (str, bytes))) or hasattr(targets, "__array_interface__"):
        try:
            if isinstance(targets, Sequence) and any(hasattr(row, "__array__") for row in targets):
                return torch.stack([torch.as_tensor(row) for row in targets])  # tensors stay on their device
            return torch.as_tensor(targets)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TargetError(f"targets {targets!r} are not a rectangular list of class indices: {error}") from error
    return targets


def place_targets(
    targets: Any, logits: Tensor | None, batch: int, device: torch.device, *, checked: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Targets as int64 [N, M] on ``device``, and a mark [N].

    They are checked as :func:`check_targets` does; of those ``checked`` so before, the range only, which the logits tell.

    An index that lives on the device cannot be checked without waiting for it. It is clamped, and its image
    marked with NaN, which makes its map NaN, so that a wrong index is neither an illegal read nor a pretty map.
    """
    classes = logits.shape[1] if logits is not None and logits.ndim == 2 else None
    if checked:
        _check_range(targets, classes)
    else:
        check_targets(targets, batch, classes)
    if targets is None:
        if logits is None or classes is None:
            return None, None
        return logits.argmax(1, keepdim=True), None
    if isinstance(targets, int):
        return torch.full((batch, 1), targets, dtype=torch.int64, device=device), None
    placed = targets
    if targets.is_inference():
        placed = targets.clone()  # an index made in inference mode cannot be saved for a backward pass
    if placed.dtype != torch.int64 or placed.device != device:
        placed = placed.to(device, torch.int64, non_blocking=True)
    placed = placed.unsqueeze(1) if placed.ndim == 1 else placed
    if classes is None or targets.device.type == "cpu":
        return placed, None
    safe = placed.clamp(0, classes - 1)
    wrong, encoded = (safe != placed).any(1), _one_hot(placed, classes)
    return safe, torch.where(wrong if encoded is None else wrong | encoded, float("nan"), 0.0)
