"""Pictures in and out, as NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ... import ops
from ...errors import InputError

#: OpenCV's numbers of the colour maps that are here.
COLORMAPS = {2: "jet", 13: "magma", 16: "viridis", 20: "turbo"}


def preprocess_image(
    img: npt.NDArray[Any], mean: Sequence[float] = (0.5, 0.5, 0.5), std: Sequence[float] = (0.5, 0.5, 0.5)
) -> Tensor:
    """An image [H, W, 3] as a normalised batch of one, float32 [1, 3, H, W] on the CPU.

    Args:
        img: uint8 in 0 to 255, which is divided by 255, or floating, which is taken as it is.
        mean, std: per channel.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(img)).movedim(-1, 0)
    pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
    shape = (-1, 1, 1)
    centre, scale = (torch.as_tensor(list(values), dtype=pixels.dtype).view(shape) for values in (mean, std))
    return ((pixels - centre) / scale)[None].contiguous()


def deprocess_image(img: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Any array as a picture: mean 0.5, standard deviation 0.1, cut to [0, 1], as uint8."""
    spread = (img - np.mean(img)) / (np.std(img) + 1e-5) * 0.1 + 0.5
    picture: npt.NDArray[np.uint8] = (np.clip(spread, 0, 1) * 255).astype(np.uint8)
    return picture


def show_cam_on_image(
    img: npt.NDArray[Any],
    mask: npt.NDArray[Any],
    use_rgb: bool = False,
    colormap: int | str = 2,
    image_weight: float = 0.5,
) -> npt.NDArray[np.uint8]:
    """A heatmap in colour over a picture, scaled so that the brightest value is 255.

    Args:
        img: float [H, W, 3] in [0, 1].
        mask: [H, W] in [0, 1].
        use_rgb: the picture is RGB; otherwise it is BGR, as OpenCV reads it.
        colormap: the number of one of OpenCV's colour maps (any, where OpenCV is installed), or "jet", "turbo", "viridis",
            "magma".
        image_weight: the picture's share, in [0, 1].

    Returns:
        uint8 [H, W, 3], RGB or BGR as the picture.

    Raises:
        InputError: the picture exceeds 1, the weight is out of range, or the colour map is not to be had.
    """
    if np.max(img) > 1:
        raise InputError(f"img must be floating in [0, 1], but its maximum is {np.max(img)}. Divide an 8-bit picture by 255.")
    if not 0 <= image_weight <= 1:
        raise InputError(f"image_weight must be in [0, 1], got {image_weight}.")
    rgb = _colours(colormap)
    heat = (rgb if use_rgb else rgb[:, ::-1])[(255 * mask).astype(np.uint8)].astype(np.float32) / 255
    mixed = (1 - image_weight) * heat + image_weight * img
    return (255 * (mixed / np.max(mixed))).astype(np.uint8)


def _colours(colormap: int | str) -> npt.NDArray[np.uint8]:
    """256 colours, RGB."""
    name = COLORMAPS.get(colormap) if isinstance(colormap, int) else colormap
    if name is not None and name != "jet":
        table: npt.NDArray[np.uint8] = ops.table_of(name, torch.device("cpu")).numpy()
        return table
    try:
        import cv2
    except ImportError as error:
        if name is None:
            known = ", ".join(f"{number} ({name})" for number, name in COLORMAPS.items())
            raise InputError(f"Colour map {colormap!r} needs opencv-python; without it there are {known}.") from error
        jet: npt.NDArray[np.uint8] = ops.table_of("jet", torch.device("cpu")).numpy()
        return jet
    # OpenCV's jet differs from the formula by one step in places.
    number = colormap if isinstance(colormap, int) else cv2.COLORMAP_JET
    return np.asarray(cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], number)[:, 0, ::-1], np.uint8)
