"""From decoded pixels to what a network takes, as a module that exports: resize, centre crop, normalisation.

The resize is Pillow's, which :meth:`shapleycam.data.images.Preprocess.view` uses: separable filters, widened when the picture
shrinks, rounded to whole levels after the first pass and again after the second. It is written as two products with matrices
that are made from the size of the picture. Their weights are whole multiples of 2^-22, as Pillow's are, so that all sums are
exact in float64, whatever their order: every runtime that has float64 gives Pillow's own levels. Which pass comes first is seen
in single levels: along the rows before Pillow 13, and since then (Pillow's #9549) down the columns where a picture loses more
than twice as many rows as columns. A module does as the Pillow does that is installed when it is made.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..data.images import Preprocess, takes_columns_first
from ..errors import InputError
from ..ops.operator import traced

_BITS = 22  # after the point, in Pillow's weights
#: The radius of every filter, in pixels of the result where the picture is enlarged.
_RADIUS = {"bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}


class Pixels(nn.Module):
    """uint8 pixels [N, H, W, 3] to normalised images [N, 3, h, w].

    Args:
        preprocess: the mean and the deviation, the size of the crop, and how pictures are resized.
        resize: take pictures of any size (all of a batch have the same) and resize and crop them; else they have the
            crop's size.
        dtype: of the images.

    Raises:
        InputError: an interpolation that has no filter ("nearest"), or Pillow is missing where pictures are resized.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, preprocess: Preprocess, resize: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if resize and preprocess.interpolation not in _RADIUS:
            raise InputError(
                f"A resize inside the artefact has {', '.join(_RADIUS)} interpolation, not {preprocess.interpolation!r}: feed "
                "pixels of the model's size."
            )
        self.preprocess, self.resize, self.dtype = preprocess, resize, dtype
        self.high_first = resize and takes_columns_first()
        self.register_buffer("mean", torch.tensor(preprocess.mean, dtype=dtype)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std, dtype=dtype)[:, None, None], persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised images, ``dtype`` [N, 3, h, w]."""
        views = self.view(pixels) if self.resize else pixels.to(self.dtype)
        return (views.permute(0, 3, 1, 2) / 255 - self.mean) / self.std

    def view(self, pixels: Tensor) -> Tensor:
        """Whole levels 0 to 255, ``dtype`` [N, h, w, 3]: the resized crop."""
        height, width = (_length(pixels, dim) for dim in (1, 2))
        crop, wanted = self.preprocess.crop, self.preprocess.resize
        if isinstance(wanted, int):
            # The shorter side gets ``wanted``, the other is truncated, as torchvision does it.
            short = torch.minimum(height, width)
            resized = [torch.div(wanted * side, short, rounding_mode="floor") for side in (height, width)]
        else:
            resized = [torch.full_like(height, side) for side in wanted]
        rows = self._filter(pixels.shape[1], height, resized[0], crop[0])
        columns = self._filter(pixels.shape[2], width, resized[1], crop[1])
        given = (pixels.double(), rows, columns)
        if not self.high_first:
            return _along_first(*given).to(self.dtype)
        down_first = height - resized[0] > 2 * (width - resized[1]).clamp_min(0)
        if traced():
            levels: Tensor = torch.cond(down_first, _down_first, _along_first, given)
        else:  # torch.cond would call the compiler
            levels = (_down_first if bool(down_first) else _along_first)(*given)
        return levels.to(self.dtype)

    def _filter(self, count: int, length: Tensor, resized: Tensor, crop: int) -> Tensor:
        """Weights [crop, count] of one axis times 2^22, for the pixels of the centre crop of the resized axis."""
        radius = _RADIUS[self.preprocess.interpolation]
        scale = length.double() / resized.double()  # float64, as in Pillow: centres must not drift along an axis
        widened = scale.clamp_min(1.0)
        first = torch.round((resized - crop).double() / 2)
        centre = (torch.arange(crop, device=length.device).double() + first + 0.5) * scale
        # Pillow reads whole pixels only whose centre may be within the radius.
        low = torch.floor(centre - radius * widened + 0.5).clamp_min(0.0)
        high = torch.floor(centre + radius * widened + 0.5)
        place = torch.arange(count, device=length.device).double()
        weights = _kernel(self.preprocess.interpolation, (place + 0.5 - centre[:, None]) / widened)
        weights = torch.where((place >= low[:, None]) & (place < high[:, None]), weights, torch.zeros_like(weights))
        weights = weights / weights.sum(1, keepdim=True) * 2**_BITS
        return torch.where(weights < 0, torch.ceil(weights - 0.5), torch.floor(weights + 0.5))


def _length(pixels: Tensor, dim: int) -> Tensor:
    """The length of an axis as int64 [], made so that a traced graph does not remember it."""
    return torch.arange(pixels.shape[dim], device=pixels.device).amax(0) + 1


def _along_first(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[N, H, W, 3] by [h, H] and [w, W] to levels [N, h, w, 3]."""
    return _down(_along(pixels, columns), rows)


def _down_first(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return _along(_down(pixels, rows), columns)


def _along(x: Tensor, columns: Tensor) -> Tensor:
    return _levels(torch.matmul(columns, x))


def _down(x: Tensor, rows: Tensor) -> Tensor:
    return _levels(torch.matmul(rows, x.flatten(2)).unflatten(2, (x.shape[2], 3)))


def _levels(x: Tensor) -> Tensor:
    return torch.floor((x + 2 ** (_BITS - 1)) / 2**_BITS).clamp(0.0, 255.0)


def _kernel(interpolation: str, x: Tensor) -> Tensor:
    """Pillow's filters."""
    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp_min(0.0)
    if interpolation == "bicubic":  # a = -1/2
        near = (1.5 * x - 2.5) * x * x + 1
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    angle = math.pi * x
    safe = torch.where(x == 0, torch.ones_like(x), angle)
    value = torch.sin(safe) / safe * torch.sin(safe / 3) / (safe / 3)
    return torch.where(x == 0, torch.ones_like(x), torch.where(x < 3, value, torch.zeros_like(x)))
