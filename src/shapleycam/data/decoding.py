"""From the bytes of a picture to the crop that a network sees, as fast as one thread can.

Pillow decodes everything. torchcodec (``pip install 'shapleycam[decode]'``) is faster for what most data sets hold, and is
asked for that only: JPEG of one or three components, and 8-bit PNG without palette and transparency; there it gives Pillow's
pixels, bit for bit (tests/data/test_decoding.py). Both let go of Python's lock. nvJPEG, through torchcodec, is only asked for
where it is named: its pixels are not those of the others.
"""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..optional import need
from .images import MAX_PIXELS, Preprocess, check_pixels, pixels_of, read_image

DECODERS = ("auto", "torchcodec", "pillow", "exact", "scaled", "cuda")
_CPU = torch.device("cpu")


class Decoded(NamedTuple):
    """A picture as the network sees it.

    Attributes:
        view: uint8 [3, H, W], of any strides; on the CPU, or on the decoder's device.
        width, height: of the whole picture, upright.
    """

    view: Tensor
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Decoder:
    """Decodes encoded pictures; from any thread.

    Attributes:
        preprocess: how the network wants its pictures.
        name: "torchcodec"; "pillow"; "auto", which is torchcodec where it is installed; "exact", which also resizes by
            Pillow, as :meth:`Preprocess.view` does, where the others' resize differs by a level or two of 255; "scaled",
            which is "auto" but for large JPEGs: they are decoded at a half, a quarter or an eighth of their width and height
            while twice that of the resize is left (:meth:`Preprocess.reduction`), and differ by a few levels; or "cuda", which
            is "auto" but for plain JPEGs that stand upright: a GPU decodes and resizes them.
        max_pixels: of the largest picture that is decoded.
        device: for "cuda": the GPU, on which all views are then.

    Raises:
        InputError: an unknown name, torchcodec is named and not installed, or "cuda" where that cannot be done.
    """

    preprocess: Preprocess
    name: str = "auto"
    max_pixels: int = MAX_PIXELS
    device: torch.device = _CPU
    _on_gpu: Callable[[bytes], Tensor] | None = field(init=False, default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.name not in DECODERS:
            raise InputError(f"Unknown decoder {self.name!r}: expected {', '.join(map(repr, DECODERS))}.")
        if self.max_pixels < 1:
            raise InputError(f"max_pixels must be at least 1, got {self.max_pixels}.")
        if self.name == "torchcodec":
            need("torchcodec.decoders", "decode")
        if self.name == "cuda":
            object.__setattr__(self, "_on_gpu", nvjpeg(self.device))

    def __call__(self, content: bytes, name: str) -> Decoded:
        """Decode, turn upright, resize and crop.

        Raises:
            InputError: no image, damaged, too large, or not to be cut for this network.
        """
        if not content:
            raise InputError(f"{name} is empty.")
        if self.name == "exact":
            picture = read_image(io.BytesIO(content), name, max_pixels=self.max_pixels)
            return Decoded(self.preprocess.view(picture), picture.width, picture.height)
        if self.name == "scaled" and (found := self._reduced(content, name)) is not None:
            return found
        pixels = self._by_gpu(content, name)
        if pixels is None:
            pixels = self._fast(content, name)
        if pixels is None:
            pixels = pixels_of(read_image(io.BytesIO(content), name, max_pixels=self.max_pixels))
        view = self.preprocess.view_of(pixels)
        return Decoded(view.to(self.device) if self.name == "cuda" else view, pixels.shape[2], pixels.shape[1])

    def _by_gpu(self, content: bytes, name: str) -> Tensor | None:
        """By nvJPEG, of what it cannot take for something else; None for the way of all others."""
        if self._on_gpu is None or (found := _jpeg(content)) is None or not found.plain:
            return None
        if not content.endswith(b"\xff\xd9"):  # cut short, perhaps, which nobody promises that it notices
            return None
        check_pixels(found.width, found.height, self.max_pixels, name)
        try:
            pixels = self._on_gpu(content)
        except (torch.OutOfMemoryError, torch.AcceleratorError):  # of the device, not of the picture
            raise
        except (RuntimeError, ValueError):
            return None
        return pixels if pixels.dtype == torch.uint8 and pixels.shape == (3, found.height, found.width) else None

    def _reduced(self, content: bytes, name: str) -> Decoded | None:
        """By libjpeg's own reduction, of plain JPEGs that are large enough; None for all others."""
        size = simple(content) if content[:3] == b"\xff\xd8\xff" else None
        if size is None or (part := self.preprocess.reduction(*size)) == 1:
            return None
        picture = read_image(io.BytesIO(content), name, max_pixels=self.max_pixels, reduce=part)
        width, height = sorted(size, reverse=picture.width > picture.height)
        return Decoded(self.preprocess.view_of(pixels_of(picture), (width, height)), width, height)

    def _fast(self, content: bytes, name: str) -> Tensor | None:
        """By torchcodec; None where Pillow is to do it, which also finds the words for what is damaged."""
        decode = None if self.name == "pillow" else _torchcodec()
        size = None if decode is None else simple(content)
        if decode is None or size is None:
            return None
        check_pixels(*size, self.max_pixels, name)
        try:
            found = decode(content)
        except (RuntimeError, ValueError):
            return None
        return found if found.dtype == torch.uint8 and found.ndim == 3 and found.shape[0] == 3 else None


@cache
def _torchcodec() -> Callable[[bytes], Tensor] | None:
    try:
        decode: Callable[[bytes], Tensor] = importlib.import_module("torchcodec.decoders").decode_image
    except (ImportError, AttributeError, RuntimeError, OSError):  # not there, or for another torch
        return None
    return decode


def nvjpeg(device: torch.device) -> Callable[[bytes], Tensor]:
    """Decodes a JPEG to uint8 [3, H, W] on this device.

    Raises:
        InputError: it is no CUDA device, or torchcodec is missing or cannot decode there; it is tried.
    """
    if device.type != "cuda":
        raise InputError(f"The decoder 'cuda' needs the model on a CUDA device, and it is on {device}: choose another decoder.")
    if not torch.cuda.is_available():
        raise InputError("The decoder 'cuda' needs a CUDA device, and torch sees none here: choose another decoder.")
    decode = getattr(need("torchcodec.decoders", "decode"), "decode_jpeg", None)
    if decode is None:
        raise InputError("The decoder 'cuda' needs torchcodec 0.17 or newer: pip install --upgrade 'shapleycam[decode]'.")
    tried: Callable[[bytes], Tensor] = partial(decode, mode="RGB", device=device)
    sample = io.BytesIO()
    need("PIL.Image", "cli").new("RGB", (16, 16)).save(sample, "JPEG")
    try:
        tried(sample.getvalue())
    except (RuntimeError, ValueError, TypeError) as error:
        said = str(error).partition("\n")[0]  # what follows is a stack
        raise InputError(
            f"torchcodec cannot decode on {device} ({said}): it needs a build for CUDA, or choose another decoder."
        ) from error
    return tried


def simple(content: bytes) -> tuple[int, int] | None:
    """(width, height) as stored of a picture whose pixels no two decoders can read differently; None for all others."""
    if content[:8] == b"\x89PNG\r\n\x1a\n" and content[12:16] == b"IHDR" and len(content) > 33:
        return _simple_png(content)
    found = _jpeg(content)
    return None if found is None else (found.width, found.height)


#: Chunks that change no pixel, in any decoder: not what has transparency (tRNS), frames (acTL) or, in one decoder and not in
#: the other, the orientation (eXIf, and the texts that tools keep Exif and XMP in).
_HARMLESS = frozenset(
    (b"IDAT", b"IEND", b"PLTE", b"pHYs", b"tIME", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"bKGD", b"tEXt")
)
_ORIENTED = (b"Raw profile type", b"XML:com.adobe.xmp", b"exif\0")


def _simple_png(content: bytes) -> tuple[int, int] | None:
    depth, kind, interlaced = content[24], content[25], content[28]
    if depth != 8 or kind not in (0, 2) or interlaced:  # grey and RGB of 8 bits
        return None
    place, name = 33, b""
    while name != b"IEND":
        length, name = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8]
        if name not in _HARMLESS or content.startswith(_ORIENTED, place + 8):
            return None
        place += 12 + length
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def _orientation(segment: bytes) -> int | None:
    """The orientation in Exif, 1 where there is none; None if it does not stand where all decoders look, in the type that they
    expect, once."""
    if segment[:10] not in (b"Exif\0\0II*\0", b"Exif\0\0MM\0*"):
        return None
    small = segment[6:7] == b"I"
    order: Literal["little", "big"] = "little" if small else "big"
    first = 6 + int.from_bytes(segment[10:14], order)
    count = int.from_bytes(segment[first : first + 2], order)
    if not 0 < count <= (len(segment) - first - 2) // 12:
        return None
    fields = [segment[place : place + 12] for place in range(first + 2, first + 2 + 12 * count, 12)]
    usual = b"\x12\x01\x03\0\x01\0\0\0" if small else b"\x01\x12\0\x03\0\0\0\x01"  # tag, a number of 16 bits, one of them
    turns = [field for field in fields if field[:2] == usual[:2]]
    if not turns:
        return 1
    return int.from_bytes(turns[0][8:10], order) if [turn[:8] for turn in turns] == [usual] else None


#: as Pillow looks for it in XMP; Lightroom and its like write one, of a picture that is upright
_XMP_TURN = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


class _Jpeg(NamedTuple):
    """A JPEG that all decoders on a CPU read alike.

    Attributes:
        width, height: as stored.
        plain: whether it stands upright, and is grey or YCbCr by every sign there is, Adobe's and the components' names.
    """

    width: int
    height: int
    plain: bool


def _jpeg(content: bytes) -> _Jpeg | None:
    if content[:3] != b"\xff\xd8\xff":
        return None
    place, size, exif, plain = 2, None, False, True
    while place + 9 < len(content) and content[place] == 0xFF:
        marker, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4], "big")
        if marker == 0xDA:  # the scan; what else is told of the picture stands before
            return None if size is None else _Jpeg(*size, plain)
        if marker == 0xFF:  # fill
            place += 1
            continue
        segment = content[place + 4 : place + 2 + length] if marker in (0xE1, 0xEE) else b""
        if marker == 0xE1:
            if segment.startswith(b"Exif"):
                turn = _orientation(segment)
                if exif or turn is None:
                    return None
                exif, plain = True, plain and turn == 1
            elif set(_XMP_TURN.findall(segment)) - {b"1"}:
                return None
        if marker == 0xEE and segment.startswith(b"Adobe"):
            plain = plain and segment[11:12] == b"\1"  # its transform; 0 is for RGB that is stored as such
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # the frame's header
            depth, components = content[place + 4], content[place + 9]
            height = int.from_bytes(content[place + 5 : place + 7], "big")
            width = int.from_bytes(content[place + 7 : place + 9], "big")
            if marker > 0xC2 or depth != 8 or components not in (1, 3) or not width or not height or size:
                return None
            size = width, height
            plain = plain and (components == 1 or content[place + 10 : place + 19 : 3] == b"\1\2\3")
        place += 2 + length
    return None
