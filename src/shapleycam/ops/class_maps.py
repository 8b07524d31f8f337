"""class_maps: the channel-weighted sums of an image and their display form in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .channel_weighted_sum import check as check_sum
from .channel_weighted_sum import empty as empty_sum
from .channel_weighted_sum import expect as expect_sum
from .channel_weighted_sum import reference as sum_reference
from .display_map import expect as expect_display
from .display_map import reference as display_reference
from .operator import Operator
from .shared import accumulator, refuse_gradients
from .tolerance import Expected


def check(activations: Tensor, alpha: Tensor, grid: Sequence[int], size: Sequence[int], dtype: torch.dtype | None) -> None:
    """Raise InputError unless the arguments fit :func:`shapleycam.ops.channel_weighted_sum` and ``grid`` multiplies to S."""
    check_sum(activations, alpha)
    if not 1 <= len(grid) <= 3 or math.prod(grid) != activations.shape[2] or any(g < 1 for g in grid):
        raise InputError(
            f"class_maps: grid must be one to three extents whose product is the {activations.shape[2]} positions, got "
            f"{tuple(grid)}."
        )
    if len(size) != len(grid) or any(s < 1 for s in size):
        raise InputError(f"class_maps: size must be {len(grid)} positive integers, got {tuple(size)}.")
    if dtype not in (None, accumulator(activations.dtype), torch.float16, torch.uint8):
        raise InputError(f"class_maps: dtype must be None, {accumulator(activations.dtype)}, float16 or uint8, got {dtype}.")


def reference(
    activations: Tensor, alpha: Tensor, grid: Sequence[int], size: Sequence[int], renormalize: bool, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """The signed maps [N, M, S] and their display form [N, M, *size]; see :func:`shapleycam.ops.class_maps`."""
    raw = sum_reference(activations, alpha)
    shown = display_reference(raw.flatten(0, 1).unflatten(1, tuple(grid)), size, renormalize, dtype)
    return raw, shown.reshape(*raw.shape[:2], *size)


def empty(
    activations: Tensor, alpha: Tensor, grid: Sequence[int], size: Sequence[int], renormalize: bool, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """The results, not filled: [N, M, S] and [N, M, *size]."""
    raw = empty_sum(activations, alpha)
    return raw, torch.empty((*raw.shape[:2], *size), dtype=dtype or raw.dtype, device=raw.device)


def _expect(arguments: tuple[Any, ...], results: tuple[Tensor, ...]) -> list[Expected]:
    activations, alpha, grid, size, renormalize, dtype = arguments
    [raw] = expect_sum((activations, alpha), results[:1])
    # The display form belongs to the signed maps that were returned: it would amplify what these may miss.
    flat = results[0].flatten(0, 1).unflatten(1, tuple(grid))
    [shown] = expect_display((flat, size, renormalize, dtype), (results[1].flatten(0, 1),))
    shape, like = results[1].shape, shown.value
    rounding = shown.rounding.reshape(shape) if isinstance(shown.rounding, Tensor) else shown.rounding
    return [raw, Expected(like.reshape(shape), shown.allowed.expand_as(like).reshape(shape), rounding)]


OPERATOR = Operator(
    "class_maps",
    "(Tensor activations, Tensor alpha, SymInt[] grid, SymInt[] size, bool renormalize, ScalarType? dtype, str backend) "
    "-> (Tensor, Tensor)",
    reference=reference,
    empty=empty,
    expect=_expect,
)


def class_maps(
    activations: Tensor,
    alpha: Tensor,
    grid: Sequence[int],
    size: Sequence[int],
    *,
    renormalize: bool = True,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`channel_weighted_sum` and the :func:`display_map` of its maps; on a GPU, two launches for maps of usual sizes.

    Args:
        activations: [N, C, S], any float dtype and strides.
        alpha: [N, M, C] on the same device, any float dtype and strides.
        grid: how the S positions lie: (h, w), or (l,), or (d, h, w).
        size, renormalize, dtype: as for :func:`display_map`.
        backend: as for :func:`weighted_reduce`.

    Returns:
        The signed maps [N, M, S] and the display form [N, M, *size], both contiguous.

    Raises:
        InputError, BackendError, DerivativeError: as for :func:`weighted_reduce`.
    """
    check(activations, alpha, grid, size, dtype)
    refuse_gradients("class_maps", activations, alpha)
    raw, maps = OPERATOR(backend, activations, alpha, list(grid), list(size), renormalize, dtype)
    return raw, maps
