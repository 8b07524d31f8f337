"""class_maps: the weighted sum over channels and the display form of its maps.

Two launches, and a third that adds the pieces of the channels up. One program to an image and class would need one, but would
read an image's activations, and write its display form, on one multiprocessor: docs/gpu_model.md has what that costs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .channel_weighted_sum import channel_weighted_sum
from .display_map import display_map


def class_maps(activations: Tensor, alpha: Tensor, grid: Sequence[int], renormalize: bool, raw: Tensor, maps: Tensor) -> None:
    """Fill ``raw`` [N, M, S] and ``maps`` [N, M, *size]."""
    channel_weighted_sum(activations, alpha, raw)
    n, m = raw.shape[:2]
    display_map(raw.view(n * m, *grid), renormalize, maps.view(n * m, *maps.shape[2:]))
