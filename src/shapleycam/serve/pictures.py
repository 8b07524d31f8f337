"""From the bytes that a client sent to a picture, and back; nothing here opens a path or an address.

What a file claims is checked before its pixels are decoded: the format by its first bytes, against a list, and the size in its
header, against a limit.
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.images import read_image, to_picture
from ..errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

#: The formats a server may take, and how their files begin.
FORMATS = ("PNG", "JPEG", "WEBP")


class BadImage(InputError):
    """What was sent is no picture that the server takes.

    Attributes:
        reason: "empty", "format", "too_large" or "damaged".
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def format_of(data: bytes) -> str | None:
    """Which of :data:`FORMATS` the bytes begin like; None for another."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def decode(data: bytes, *, pixels: int, formats: tuple[str, ...] = FORMATS) -> Image:
    """Decode a picture: upright 8-bit RGB.

    Args:
        data: the file.
        pixels: most width times height that is decoded.
        formats: which of :data:`FORMATS` are taken.

    Raises:
        BadImage: no bytes, another format, too many pixels, or damaged; nothing was decoded but in the last case.
    """
    from PIL import Image

    if not data:
        raise BadImage("empty", "The image is empty: 0 bytes arrived.")
    form = format_of(data)
    if form is None or form not in formats:
        raise BadImage("format", f"The image is no {' or '.join(formats)} file, by its first bytes.")
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=[form]) as header:
            width, height = header.size
    except Image.DecompressionBombError as error:
        raise BadImage("too_large", f"The image has more than the {pixels} pixels that are taken.") from error
    except Exception as error:  # whatever damage provokes in Pillow
        raise BadImage("damaged", f"The image is damaged: {type(error).__name__} in its header.") from error
    if width * height > pixels:
        raise BadImage("too_large", f"The image has {width} × {height} pixels; at most {pixels} are taken.")
    try:
        return read_image(io.BytesIO(data), "The image")
    except InputError as error:
        raise BadImage("damaged", str(error)) from error


def png(pixels: Tensor) -> bytes:
    """A PNG file of uint8 [H, W, 3], or of uint8 [H, W] in grey."""
    from PIL import Image

    if pixels.ndim == 3:
        picture = to_picture(pixels)
    else:
        picture = Image.frombytes("L", (pixels.shape[1], pixels.shape[0]), pixels.contiguous().numpy().tobytes())
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)  # a quarter of the time of the default, for a tenth more bytes
    return file.getvalue()


def npy(tensor: Tensor) -> bytes:
    """A NumPy file of a tensor in host memory."""
    import numpy

    file = io.BytesIO()
    numpy.lib.format.write_array(file, tensor.contiguous().numpy(), allow_pickle=False)
    return file.getvalue()


def grey(heatmap: Tensor) -> Tensor:
    """[0, 1] as uint8; what is not finite is 0."""
    return (heatmap.nan_to_num(0.0, 0.0, 0.0).clamp(0, 1) * 255).round().to(torch.uint8)
