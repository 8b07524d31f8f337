"""From an image file to the tensor a network takes, and to the crop it saw.

Everything here needs Pillow (``pip install 'shapleycam[cli]'``) and neither numpy nor torchvision.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from ..errors import InputError
from ..optional import need
from .files import LocalFiles

if TYPE_CHECKING:
    from PIL.Image import Image

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


#: Pixels of the largest picture that is decoded if nothing else is said: Pillow's own limit of what it takes without a warning.
MAX_PIXELS = 89_478_485


class TooManyPixels(InputError):
    """A picture has more pixels than may be decoded."""


def read_image(
    path: str | PathLike[str] | BinaryIO,
    name: str | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
    reduce: int = 1,
    formats: Sequence[str] | None = None,
) -> Image:
    """Decode a file as an upright 8-bit RGB picture.

    The EXIF orientation is applied. Transparency is laid over white. 16-bit greyscale is scaled by 1/257, where
    Pillow's own conversion would saturate; CMYK, palette and 8-bit greyscale are converted. Of an animation the first
    frame is taken.

    Args:
        path: any format Pillow reads; or an open file.
        name: what errors call the picture; the path by default.
        max_pixels: a picture with more is refused before it is decoded (a small file may unpack to gigabytes).
        reduce: 1, 2, 4 or 8: decode a JPEG at this part of its width and height, from that many fewer of its coefficients;
            of no effect on other formats.
        formats: Pillow's names of those that are tried; None for all.

    Returns:
        A Pillow image in mode "RGB".

    Raises:
        TooManyPixels: it is too large.
        InputError: the file is missing, unreadable, truncated, not an image, or holds 32-bit samples, which have no defined
            white point.
        ImportError: Pillow is not installed.
    """
    from PIL import ImageOps, UnidentifiedImageError

    name = str(path) if name is None else name
    try:
        with _open(path, formats) as picture:
            check_pixels(picture.width, picture.height, max_pixels, name)
            if reduce > 1:
                picture.draft(None, (picture.width // reduce, picture.height // reduce))
            picture.load()
            upright = ImageOps.exif_transpose(picture)
        return _rgb(upright, picture.format)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not an image in a format that Pillow reads.") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder: name the files in it, for example {path}/*.jpg.") from error
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise InputError(f"{name} cannot be read: {reason}.") from error
    except Exception as error:
        # Pillow's decoders let through whatever a damaged file provokes in them (SyntaxError, struct.error, …).
        raise InputError(f"{name} cannot be decoded: {type(error).__name__}: {error}.") from error


def _open(path: str | PathLike[str] | BinaryIO, formats: Sequence[str] | None) -> Image:
    """``Image.open`` without Pillow's own limit, a global that cannot be set for one call alone; ours is checked instead."""
    from PIL import Image

    with _LIMIT:
        theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(path, formats=None if formats is None else list(formats))
        finally:
            Image.MAX_IMAGE_PIXELS = theirs


_LIMIT = threading.Lock()


def check_pixels(width: int, height: int, max_pixels: int, name: str) -> None:
    """Refuse a picture that is too large to decode.

    Raises:
        TooManyPixels: it has more than ``max_pixels``.
    """
    if width * height > max_pixels:
        raise TooManyPixels(f"{name} has {width} × {height} pixels, more than the limit of {max_pixels}.")


def image_files(folder: Path, *, recursive: bool = False) -> list[Path]:
    """The image files in a folder, relative to it and sorted: all with an ending that Pillow reads, hidden ones left out.

    Args:
        folder: where to look.
        recursive: also in the folders below it.

    Raises:
        InputError: Pillow is not installed, or the folder cannot be read.
    """
    endings = image_endings()
    found = (Path(file.path) for file in LocalFiles().walk(str(folder), recursive=recursive))
    return [path for path in found if path.suffix.lower() in endings]


def image_endings() -> frozenset[str]:
    """ ".jpg", ".png" and all others that Pillow reads.

    Raises:
        InputError: Pillow is not installed.
    """
    image = need("PIL.Image", "cli")
    image.init()
    return frozenset(image.registered_extensions())


def _rgb(picture: Image, form: str | None) -> Image:
    from PIL import Image

    if picture.mode.startswith("I;16") or (picture.mode == "I" and form in ("PNG", "PPM")):
        # 65535 is white; adding a half rounds to the nearest level where convert("L") truncates.
        wide = picture.convert("I")
        return wide.point(lambda value: value * (1 / 257) + 0.5).convert("L").convert("RGB")
    if picture.mode in ("I", "F"):
        raise InputError(
            f"The image has 32-bit samples (Pillow mode {picture.mode!r}), which have no defined white point: save it "
            "with 8 or 16 bits."
        )
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        coloured = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured).convert("RGB")
    return picture.convert("RGB")


@dataclass(frozen=True, slots=True)
class Preprocess:
    """How a network wants its pictures.

    Attributes:
        crop: (height, width) of the input, in pixels.
        resize: (height, width) to resize to without keeping the aspect ratio; or the length the shorter side gets.
        interpolation: one of :data:`INTERPOLATIONS`; with antialiasing, as Pillow does it.
        mean, std: per channel, of pixels in [0, 1].
    """

    crop: tuple[int, int] = (224, 224)
    resize: int | tuple[int, int] = 256
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def view(self, picture: Image, of: tuple[int, int] | None = None) -> Tensor:
        """The crop that the network sees: uint8 [3, H, W] on the CPU, from an RGB picture of any size.

        Args:
            picture: in mode "RGB".
            of: (width, height) of the picture that this is a reduced copy of, which says where the crop lies.

        Raises:
            InputError: the resized picture would be smaller than the crop, or its aspect ratio is above 1000.
        """
        from PIL import Image

        size, (left, top) = self._geometry(*(of or picture.size))
        resized = picture.resize(size, Image.Resampling[self.interpolation.upper()])
        return to_tensor(resized.crop((left, top, left + self.crop[1], top + self.crop[0])))

    def view_of(self, pixels: Tensor, of: tuple[int, int] | None = None) -> Tensor:
        """The same of decoded pixels, by PyTorch's resize, several times faster: single levels differ by one, seldom by two.

        Args:
            pixels: uint8 [3, height, width] of any strides; best with the channels innermost. The view is on their device.
            of: as for :meth:`view`.

        Raises:
            InputError: as :meth:`view`.
        """
        if self.interpolation not in ("bilinear", "bicubic"):
            return self.view(to_picture(pixels.permute(1, 2, 0)), of)
        (width, height), (left, top) = self._geometry(*(of or (pixels.shape[2], pixels.shape[1])))
        resized = pixels[None].contiguous(memory_format=torch.channels_last)
        passes = [(height, width)]
        if takes_columns_first() and pixels.shape[1] - height > 2 * max(0, pixels.shape[2] - width):
            passes = [(height, pixels.shape[2]), (height, width)]  # levels are rounded, and cut off, after the first
        if pixels.is_cuda:
            resized = in_floats(resized, passes if len(passes) > 1 else [(pixels.shape[1], width), *passes], self.interpolation)
        else:
            for size in passes:
                resized = torch.nn.functional.interpolate(resized, size, mode=self.interpolation, antialias=True)
        return resized[0, :, top : top + self.crop[0], left : left + self.crop[1]]

    def reduction(self, width: int, height: int) -> int:
        """1, 2, 4 or 8: how much smaller a picture may be decoded and still have twice the pixels of the resize, either way up.

        Both sides are multiples of it: of others the last pixels would be parts of pixels, and the crop a little off.
        """
        side = self.resize if isinstance(self.resize, int) else max(self.resize)
        fits = (part for part in (8, 4, 2) if min(width, height) >= 2 * side * part and width % part == height % part == 0)
        return next(fits, 1)

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The part of a picture of this size that the crop shows: left, top, right, bottom in its pixels.

        Raises:
            InputError: as :meth:`view`.
        """
        size, (left, top) = self._geometry(width, height)
        x, y = width / size[0], height / size[1]
        return left * x, top * y, (left + self.crop[1]) * x, (top + self.crop[0]) * y

    def _geometry(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(width, height) to resize a picture to, and (left, top) of the crop in it."""
        if isinstance(self.resize, int):
            short, long = sorted((width, height))
            if long > 1000 * short:
                raise InputError(f"The picture is {width} × {height}: one side is more than 1000 times the other.")
            other = int(self.resize * long / short)  # truncated, as torchvision does
            size = (self.resize, other) if width <= height else (other, self.resize)
        else:
            size = (self.resize[1], self.resize[0])
        if size[0] < self.crop[1] or size[1] < self.crop[0]:
            raise InputError(f"A resize to {size[0]} × {size[1]} is smaller than the crop of {self.crop[1]} × {self.crop[0]}.")
        return size, (round((size[0] - self.crop[1]) / 2), round((size[1] - self.crop[0]) / 2))

    def normalise(self, views: Tensor) -> Tensor:
        """uint8 [..., 3, H, W] to float32 of the same shape, on the same device, as the network takes it."""
        mean = torch.tensor(self.mean, device=views.device)[:, None, None]
        std = torch.tensor(self.std, device=views.device)[:, None, None]
        return (views.float() / 255 - mean) / std

    def __str__(self) -> str:
        side = self.resize if isinstance(self.resize, int) else f"{self.resize[1]} × {self.resize[0]}"
        return f"{self.interpolation} resize to {side}, centre crop {self.crop[1]} × {self.crop[0]}"


def in_floats(pixels: Tensor, passes: Sequence[tuple[int, int]], interpolation: str) -> Tensor:
    """Resize uint8 [N, 3, H, W] to one (height, width) after the other, where PyTorch has no antialiasing of bytes: on a GPU.

    Levels are rounded, and cut off, after each, as Pillow does after its two.
    """
    for size in passes:
        wide = torch.nn.functional.interpolate(pixels.float(), tuple(size), mode=interpolation, antialias=True)
        pixels = wide.round_().clamp_(0, 255).byte()
    return pixels


@cache
def takes_columns_first() -> bool:
    """Whether the Pillow that is installed resizes columns before rows where more than twice as many rows as columns are lost.

    Since version 13 (Pillow's #9549).
    """
    return int(need("PIL", "cli").__version__.partition(".")[0]) >= 13


def to_tensor(picture: Image) -> Tensor:
    """An RGB picture as uint8 [3, H, W]."""
    return pixels_of(picture).contiguous()


def pixels_of(picture: Image) -> Tensor:
    """An RGB picture as uint8 [3, H, W] with the channels innermost, as pictures are stored."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1)


def to_picture(pixels: Tensor) -> Image:
    """uint8 [H, W, 3] on any device as an RGB picture.

    Raises:
        InputError: another shape or dtype.
    """
    from PIL import Image

    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != torch.uint8:
        raise InputError(f"Expected uint8 [H, W, 3], got {pixels.dtype} {tuple(pixels.shape)}.")
    buffer = bytearray(pixels.numel())
    torch.frombuffer(buffer, dtype=torch.uint8).copy_(pixels.reshape(-1))
    return Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), bytes(buffer))
