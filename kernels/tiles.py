"""Tiles: how the activations are cut among programs, and what is done inside a tile.

docs/triton_model.md has what these choices lead to, as predictions: no measurement has been made yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Elements of a tile of the general kernels, channels at most, and warps. The lanes walk along the dimension with unit stride.
GENERAL, GENERAL_CHANNELS = 4096, {"first": 32, "last": 128}

#: Elements of a tile that has all positions, at most, by the tensors that are read; and at least, where the images are too few
#: to fill a device.
WHOLE, WHOLE_LEAST = {1: 8192, 3: 4096}, 1024

# As in the CUDA kernel: small batches are cut into more pieces, so that the device is full.
BLOCKS_WANTED = 264

#: Positions at most of a tile that has all of them, by layout: with more there would be too few channels side by side.
MOST = {"first": 512, "last": 64}


@dataclass(frozen=True, slots=True)
class Whole:
    """Tiles that have all positions of their channels.

    Attributes:
        flat: whether what a tile covers lies side by side in memory. 7 x 7 positions of float32 are 196 bytes, so that a
            channel begins anywhere; the tile begins at a multiple of 16 bytes and is read in loads of that width, as if it had
            one dimension, and spread into its two inside the multiprocessor.
        channels: of a tile, a power of two.
        positions: columns of a tile, a power of two, at least as many as there are positions.
        warps: of a program.
    """

    flat: bool
    channels: int
    positions: int
    warps: int


def channels_last(x: Tensor) -> bool:
    """Whether the channels are the closer neighbours in memory; a single position has no layout."""
    return x.stride(1) == 1 and x.stride(2) != 1


def whole(*tensors: Tensor, again: bool = False) -> Whole | None:
    """The tile for these tensors [N, C, S] of one layout; None where the positions are too many, or the layouts differ.

    Channels last are read in wide loads by any tile: there it is worth its sums if others would read something ``again``.
    """
    n, c, s = tensors[0].shape
    flat = all(x.stride(2) == 1 and x.stride(1) == s for x in tensors)
    if s > MOST["first" if flat else "last"] or not (flat or (again and all(map(channels_last, tensors)))):
        return None
    positions = triton.next_power_of_2(s)
    channels = min(WHOLE[len(tensors)] // positions, triton.next_power_of_2(c))
    while channels * positions > WHOLE_LEAST and channels > 8 and n * triton.cdiv(c, channels) < BLOCKS_WANTED:
        channels //= 2
    return Whole(flat, channels, positions, 8 if channels * positions >= 4096 else 4)


def tile_of(activations: Tensor) -> tuple[int, int, int]:
    """(channels, positions, warps) of a tile for activations [N, C, S] of any layout."""
    n, c, s = activations.shape
    channels = min(GENERAL_CHANNELS["last" if channels_last(activations) else "first"], triton.next_power_of_2(c))
    while channels > 16 and n * triton.cdiv(c, channels) < BLOCKS_WANTED:
        channels //= 2
    # What the channels give up, the positions take: as many bytes are under way.
    positions = min(GENERAL // channels, triton.next_power_of_2(s), 128)
    return channels, positions, 4


def partial_maps(activations: Tensor, rows: int, pieces: int, dtype: torch.dtype) -> Tensor:
    """Room for one partial result [N, pieces, rows, S] per piece of the channels."""
    n, _, s = activations.shape
    return torch.empty((n, pieces, rows, s), dtype=dtype, device=activations.device)


@triton.jit
def load_whole(
    x, n, first, C, S, stride_n, stride_c, stride_s, FLAT: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr
):
    """The tile of an image from channel ``first`` on, zero where there is nothing: [CHANNELS * POSITIONS] if FLAT, else in two
    dimensions.
    """
    if FLAT:
        i = tl.arange(0, CHANNELS * POSITIONS)
        return tl.load(x + n * stride_n + first * S + i, mask=(i < CHANNELS * S) & (first * S + i < C * S), other=0.0)
    else:
        c = first + tl.arange(0, CHANNELS)[:, None]
        s = tl.arange(0, POSITIONS)[None, :].to(tl.int64)
        return tl.load(x + n * stride_n + c * stride_c + s * stride_s, mask=(c < C) & (s < S), other=0.0)


@triton.jit
def spread(x, S, FLAT: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr):
    """A tile of :func:`load_whole` in two dimensions."""
    if FLAT:
        s = tl.arange(0, POSITIONS)[None, :]
        index = tl.arange(0, CHANNELS)[:, None] * S + s
        made = tl.gather(x, tl.reshape(index, [CHANNELS * POSITIONS]), 0)
        return tl.where(s < S, tl.reshape(made, [CHANNELS, POSITIONS]), 0.0)
    else:
        return x
