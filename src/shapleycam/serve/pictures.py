"""From the bytes that a client sent to a picture, and back; nothing here opens a path or an address.

What a file claims is checked before its pixels are decoded: the format by its first bytes, against a list, and the size in its
header and a JPEG's scans, against limits.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.images import TooManyPixels, read_image, to_picture
from ..errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

#: The formats a server may take, and how their files begin.
FORMATS = ("PNG", "JPEG", "WEBP")
#: Of a JPEG. Encoders write up to about 20; each may take some bytes of the file, and as long as the whole picture.
MOST_SCANS = 50


class BadImage(InputError):
    """What was sent is no picture that the server takes.

    Attributes:
        reason: "empty", "format", "too_large", "scans" or "damaged".
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
        BadImage: no bytes, another format, too many pixels or scans, or damaged; nothing was decoded but in the last case.
    """
    if not data:
        raise BadImage("empty", "The image is empty: 0 bytes arrived.")
    form = format_of(data)
    if form is None or form not in formats:
        raise BadImage("format", f"The image is no {' or '.join(formats)} file, by its first bytes.")
    if form == "JPEG" and (found := scans(data)) > MOST_SCANS:
        raise BadImage("scans", f"The JPEG has {found} scans; at most {MOST_SCANS} are taken: save it again.")
    try:
        return read_image(io.BytesIO(data), "The image", max_pixels=pixels, formats=(form,))
    except TooManyPixels as error:
        raise BadImage("too_large", str(error)) from error
    except InputError as error:
        raise BadImage("damaged", str(error)) from error


def scans(data: bytes) -> int:
    """How often a JPEG's decoder goes over the whole picture, by the markers in it; damage is left to the decoder.

    Read as libjpeg reads it: to the next marker, wherever that is, and over the lengths that follow it.
    """
    found, at = 0, 2
    for _ in range(_MOST_SEGMENTS):
        marker = _MARKER.search(data, at)
        if marker is None:
            return found
        kind, at = marker[1][0], marker.end()
        if kind in (0xD8, 0xD9):  # the end, or a second beginning, at which the decoder gives up
            return found
        if found and kind < 0xC0:  # libjpeg may look for a marker within what this one is long
            raise BadImage("damaged", f"The JPEG has the marker {kind:02x} between its scans.")
        found += kind == 0xDA
        at += max(2, int.from_bytes(data[at : at + 2], "big"))
    raise BadImage("damaged", f"The JPEG has more than {_MOST_SEGMENTS} segments.")


_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")  # but those that stand alone
_MOST_SEGMENTS = 2000  # to go over each of millions takes Pillow, which does it in Python, many seconds


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
