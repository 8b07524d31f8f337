"""Tile sizes, in one readable table."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

# (channels, positions, warps) of a tile. The lanes walk along the dimension with unit stride, so that one is the longer.
# Chosen by counting bytes in flight (a tile of float32 is 16 KiB); no measurement has been made yet.
CHANNELS_FIRST = (32, 128, 4)
CHANNELS_LAST = (128, 32, 4)

# As in the CUDA kernel: small batches are cut into more pieces, so that the device is full.
BLOCKS_WANTED = 264


def channels_last(activations: Tensor) -> bool:
    """Whether the channels are the closer neighbours in memory; a single position has no layout."""
    return activations.stride(1) == 1 and activations.stride(2) != 1


def tile_of(activations: Tensor) -> tuple[int, int, int]:
    """(channels, positions, warps) of a tile for activations [N, C, S]."""
    n, c, s = activations.shape
    channels, positions, warps = CHANNELS_LAST if channels_last(activations) else CHANNELS_FIRST
    channels = min(channels, triton.next_power_of_2(c))
    positions = min(positions, triton.next_power_of_2(s))
    while channels > 16 and n * triton.cdiv(c, channels) < BLOCKS_WANTED:
        channels //= 2
    return channels, positions, warps


def partial_maps(activations: Tensor, rows: int, pieces: int, dtype: torch.dtype) -> Tensor:
    """Room for one partial result [N, pieces, rows, S] per piece of the channels."""
    n, _, s = activations.shape
    return torch.empty((n, pieces, rows, s), dtype=dtype, device=activations.device)
