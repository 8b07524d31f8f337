"""Files that are there in whole or not at all, and that say when they are damaged."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ExportError


@contextmanager
def written(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its name when the block ends well, and is removed when it does not.

    Raises:
        ExportError: ``path`` exists, is a folder, or cannot be written; before the block is entered where that can be told.
    """
    if path.is_dir():
        raise ExportError(f"{path} is a folder: name a file in it.")
    if path.exists() and not overwrite:
        raise ExportError(f"{path} exists: give another name, or overwrite=True (--overwrite).")
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(8)}{path.suffix}")
    try:
        temporary.open("xb").close()
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}.") from error
    try:
        yield temporary
        _publish(temporary, path, overwrite)
    finally:
        temporary.unlink(missing_ok=True)


def _publish(temporary: Path, path: Path, overwrite: bool) -> None:
    try:
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if overwrite:
            temporary.replace(path)
        else:
            os.link(temporary, path)  # unlike a rename, it fails where somebody made the file meanwhile
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except FileExistsError as error:
        raise ExportError(f"{path} was made by somebody else meanwhile: give another name, or overwrite=True.") from error
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}.") from error


def sha256_of(path: Path, size: int | None = None) -> str:
    """Of the first ``size`` bytes of a file, in hexadecimal."""
    digest, left = hashlib.sha256(), path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()
