"""The formats of artefacts: how each is written, sealed, read and run."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

from ...errors import InputError
from .aoti import Aoti
from .base import Format, Run
from .onnx import Onnx
from .pt2 import Pt2

__all__ = ["FORMATS", "Format", "Run", "check_runtimes", "format_for", "format_of"]

FORMATS: dict[str, Format] = {each.name: each for each in (Onnx(), Pt2(), Aoti())}


def format_for(name: str, path: Path) -> Format:
    """The format that was asked for; "auto" goes by the ending.

    Raises:
        InputError: unknown, or the path has an ending that the format's runtime does not take.
    """
    if name == "auto":
        name = {".onnx": "onnx", ".pt2": "pt2"}.get(path.suffix, "")
        if not name:
            raise InputError(
                f"{path} says no format: end it in .onnx or .pt2, or give format={' or '.join(map(repr, FORMATS))}."
            )
    if name not in FORMATS:
        raise InputError(f"Unknown format {name!r}: expected 'auto', {', '.join(map(repr, FORMATS))}.")
    found = FORMATS[name]
    if path.suffix != found.suffix:
        raise InputError(f"Files of format {name!r} end in {found.suffix}, and {path} does not.")
    return found


def check_runtimes(form: Format, runtimes: Sequence[str]) -> tuple[str, ...]:
    """The runtimes that were asked for, the usual one of the format where none was; InputError where it has no such one."""
    for name in runtimes:
        if name not in form.runtimes:
            raise InputError(f"Files of format {form.name!r} run in {', '.join(map(repr, form.runtimes))}, not in {name!r}.")
    return tuple(runtimes) or form.runtimes[:1]


def format_of(path: Path) -> tuple[Format, str]:
    """The format of an artefact and its metadata, as JSON.

    Raises:
        InputError: missing, unreadable, foreign or damaged.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    if start == b"PK\x03\x04":
        text = _of_archive(path)
        return FORMATS["aoti" if '"format": "aoti"' in text else "pt2"], text
    return FORMATS["onnx"], Onnx.metadata(path)


def _of_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares the checksum of everything inside
            if damaged is not None:
                raise InputError(f"{path} is damaged: the checksum of {damaged} is another.")
            found = [name for name in archive.namelist() if name.partition("/")[2] == Pt2.MEMBER]
            if len(found) != 1:
                raise InputError(f"{path} was not made by shapleycam: it has no {Pt2.MEMBER}.")
            return archive.read(found[0]).decode()
    except (zipfile.BadZipFile, EOFError, OSError, UnicodeDecodeError, NotImplementedError) as error:
        raise InputError(f"{path} is damaged: {error}.") from error
