"""What ``shapleycam explain`` is given: files, folders of images, and standard input."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.images import image_files, read_image
from ..errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

STANDARD_INPUT = "-"


@dataclass(frozen=True, slots=True)
class Source:
    """One image to explain.

    Attributes:
        path: the file, or "-" for standard input.
        stem: what the files written for it are called after.
        problem: why there is nothing to read, known before it is tried.
    """

    path: Path
    stem: str
    problem: str = ""
    standard_input: bool = False

    def read(self) -> Image:
        """The decoded picture.

        Raises:
            InputError: it cannot be read.
        """
        if self.problem:
            raise InputError(self.problem)
        if not self.standard_input:
            return read_image(self.path)
        content = sys.stdin.buffer.read()
        if not content:
            raise InputError(f"{self.path} is empty: nothing came on standard input.")
        return read_image(io.BytesIO(content), STANDARD_INPUT)


def sources(arguments: Sequence[str], *, recursive: bool, out: Path) -> list[Source]:
    """The images that the arguments name, in their order; those of a folder by name.

    Args:
        arguments: files, folders, or "-" for an image on standard input.
        recursive: also the images in the folders below a folder.
        out: where overlays go. Overlays of an earlier run that lie below a folder are no images to explain.

    Raises:
        InputError: standard input is named twice or is a terminal, or ``out`` is one of the folders.
    """
    if arguments.count(STANDARD_INPUT) > 1:
        raise InputError("'-' is given more than once, and standard input holds one image.")
    if STANDARD_INPUT in arguments and sys.stdin.isatty():
        raise InputError("'-' reads an image from standard input, which is a terminal: shapleycam explain - < photo.jpg")
    found: list[Source] = []
    for argument in arguments:
        path = Path(argument)
        if argument == STANDARD_INPUT:
            found.append(Source(path, "stdin", standard_input=True))
        elif path.is_dir():
            if path.resolve() == out.resolve():
                raise InputError(f"{path} is also where the overlays go: choose another folder with --out.")
            found += _in_folder(path, recursive, out)
        else:
            found.append(Source(path, path.stem))
    return found


def _in_folder(folder: Path, recursive: bool, out: Path) -> Iterator[Source]:
    count = 0
    try:
        for file in image_files(folder, recursive=recursive):
            if out.resolve() in (folder / file).resolve().parents and out.resolve() not in folder.resolve().parents:
                continue
            count += 1
            yield Source(folder / file, "-".join(file.with_suffix("").parts))
    except InputError as error:
        yield Source(folder, folder.name, str(error))
        return
    if not count:
        hint = "" if recursive else "; --recursive looks in the folders below it"
        yield Source(folder, folder.name, f"holds no image files{hint}.")
