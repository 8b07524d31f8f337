"""Where bytes are: the local file system, or any that fsspec knows, behind the few questions that a data set asks."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..errors import InputError
from ..optional import need

#: What pyarrow raises of a file that is gone or damaged.
ARROW_ERRORS = (OSError, ValueError, NotImplementedError)


class Found(NamedTuple):
    """A file below a folder: its path relative to it with forward slashes, its bytes (-1: unknown), and when it was changed.

    ``changed`` is in nanoseconds; of a remote file it is a number made of what its store says (ETag, time of change); 0 is
    for unknown.
    """

    path: str
    size: int
    changed: int


class Files(ABC):
    """A file system. Paths are text; bytes of a local name that are not UTF-8 are surrogates, as Python has them."""

    @abstractmethod
    def walk(self, folder: str, *, recursive: bool = True) -> Iterator[Found]:
        """The files in a folder, hidden ones left out, in the order of their relative paths."""

    @abstractmethod
    def read(self, path: str, start: int = 0, length: int = -1, *, size: int = -1, changed: int = 0) -> bytes:
        """The bytes of a file, or of a piece of it; from any thread.

        Args:
            path: the file.
            start, length: the piece; -1 for all that is behind ``start``.
            size, changed: as the file was listed; -1 and 0 where that is not known, or shall not matter.

        Raises:
            InputError: it is gone, no regular file, cannot be read, ends before the piece does, or is not what was listed.
        """

    @abstractmethod
    def open(self, path: str) -> BinaryIO:
        """A file to read.

        Raises:
            InputError: it cannot be opened.
        """

    @abstractmethod
    def find(self, path: str) -> Found | None:
        """A regular file with its path as given; None if there is none."""

    @abstractmethod
    def is_folder(self, path: str) -> bool: ...

    def check_listed(self, path: str, size: int, changed: int) -> None:
        """Compare a file with what it was when it was listed, as :meth:`read` does; nothing is said of one that is gone.

        Raises:
            InputError: it has another size, or was changed.
        """
        if (now := self.find(path)) is not None:  # else whoever reads it says so
            refuse_other(path, now.size, now.changed, size, changed)

    def join(self, folder: str, path: str) -> str:
        return f"{folder.rstrip('/')}/{path}" if folder.strip("/") else f"{folder}{path}"


class LocalFiles(Files):
    """The local file system. Links to folders are followed, but not to one that the way has come through."""

    def walk(self, folder: str, *, recursive: bool = True) -> Iterator[Found]:
        yield from self._walk(folder or ".", "", recursive, ())

    def _walk(self, folder: str, prefix: str, recursive: bool, above: tuple[tuple[int, int], ...]) -> Iterator[Found]:
        try:
            at = os.stat(folder)
            with os.scandir(folder) as listing:
                entries = [(f"{e.name}/" if _is_folder(e) else e.name, e) for e in listing if not e.name.startswith(".")]
        except OSError as error:
            raise InputError(f"{folder} cannot be read: {error.strerror or error}.") from error
        here = (at.st_dev, at.st_ino)
        if here in above:
            return
        for name, entry in sorted(entries, key=lambda pair: pair[0]):  # a folder sorts as the paths of what is in it
            if name.endswith("/"):
                if recursive:
                    yield from self._walk(entry.path, prefix + name, recursive, (*above, here))
                continue
            try:
                at = entry.stat()
            except OSError:  # a link to nothing, or a file just removed: whoever reads it says so
                yield Found(prefix + name, -1, 0)
                continue
            if stat.S_ISREG(at.st_mode):
                yield Found(prefix + name, at.st_size, at.st_mtime_ns)

    def read(self, path: str, start: int = 0, length: int = -1, *, size: int = -1, changed: int = 0) -> bytes:
        try:
            # Without waiting: what was a file when it was listed may be a pipe now, whose opening would wait for a writer.
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
            with open(descriptor, "rb", buffering=0) as file:
                at = os.fstat(descriptor)
                if not stat.S_ISREG(at.st_mode):
                    raise InputError(f"{shown(path)} is no regular file.")
                refuse_other(path, at.st_size, at.st_mtime_ns, size, changed)
                if start:
                    file.seek(start)
                content: bytes = file.read() if length < 0 else file.read(length)
        except OSError as error:
            raise InputError(f"{shown(path)} cannot be read: {error.strerror or error}.") from error
        if 0 <= length != len(content):
            raise InputError(f"{shown(path)} ends before byte {start + length}: was it changed since it was listed?")
        return content

    def open(self, path: str) -> BinaryIO:
        try:
            return open(path, "rb")
        except OSError as error:
            raise InputError(f"{shown(path)} cannot be read: {error.strerror or error}.") from error

    def find(self, path: str) -> Found | None:
        try:
            at = os.stat(path)
        except (OSError, ValueError):
            return None
        return Found(path, at.st_size, at.st_mtime_ns) if stat.S_ISREG(at.st_mode) else None

    def is_folder(self, path: str) -> bool:
        return os.path.isdir(path)


class RemoteFiles(Files):
    """A file system of fsspec.

    Args:
        system: an ``fsspec.AbstractFileSystem``.
        protocol: its name, for addresses.
    """

    def __init__(self, system: Any, protocol: str) -> None:
        self.system, self.protocol = system, protocol
        self._checked: set[tuple[str, int, int]] = set()

    def __getstate__(self) -> dict[str, Any]:
        """For other processes, which look for themselves."""
        return {**self.__dict__, "_checked": set()}

    def check_listed(self, path: str, size: int, changed: int) -> None:
        if (path, size, changed) not in self._checked:  # once: it is a request to the store
            super().check_listed(path, size, changed)
            self._checked.add((path, size, changed))

    @contextmanager
    def _asking(self, path: str) -> Iterator[None]:
        """Every file system has errors of its own."""
        try:
            yield
        except Exception as error:
            raise InputError(f"{self.protocol}://{path} cannot be read: {type(error).__name__}: {error}.") from error

    def walk(self, folder: str, *, recursive: bool = True) -> Iterator[Found]:
        with self._asking(folder):
            listing = self.system.find(folder, maxdepth=None if recursive else 1, detail=True)
        start = folder.strip("/")
        for name in sorted(listing):
            info = listing[name]
            relative = name.strip("/")[len(start) :].lstrip("/")
            if info.get("type", "file") == "file" and not any(part.startswith(".") for part in relative.split("/")):
                yield Found(relative, _size(info), _changed(info))

    def read(self, path: str, start: int = 0, length: int = -1, *, size: int = -1, changed: int = 0) -> bytes:
        if length >= 0:  # of a file of its own only the size is compared, which needs no request
            self.check_listed(path, size, changed)
        with self._asking(path):
            content: bytes = self.system.cat_file(path, start=start or None, end=None if length < 0 else start + length)
        if 0 <= length != len(content):
            raise InputError(f"{self.protocol}://{path} ends before byte {start + length}: was it changed since it was listed?")
        if length < 0:
            refuse_other(path, start + len(content), 0, size, changed)
        return content

    def open(self, path: str) -> BinaryIO:
        with self._asking(path):
            file: BinaryIO = self.system.open(path, "rb")
        return file

    def find(self, path: str) -> Found | None:
        with self._asking(path):
            try:
                info = self.system.info(path)
            except FileNotFoundError:
                return None
        return Found(path, _size(info), _changed(info)) if info.get("type", "file") == "file" else None

    def is_folder(self, path: str) -> bool:
        with self._asking(path):
            return bool(self.system.isdir(path))


def files_of(address: str) -> tuple[Files, str]:
    """The file system of an address, and the path in it: "photos/", or "memory://bucket/photos" and the like by fsspec.

    Raises:
        InputError: fsspec is not installed, or does not know the protocol.
    """
    protocol, separator, rest = address.partition("://")
    if not separator:
        return LocalFiles(), address
    if protocol in ("file", "local"):
        return LocalFiles(), rest
    fsspec = need("fsspec.core", "attribute")
    try:
        system, path = fsspec.url_to_fs(address)
    except (ValueError, ImportError, OSError) as error:
        raise InputError(f"{address}: fsspec cannot open it: {error}") from error
    return RemoteFiles(system, protocol), str(path)


def matches(path: str, pattern: str) -> bool:
    """Whether a relative path matches a pattern: ``*``, ``?``, ``[]``, ``**`` for any folders, ``{a,b}``, ``{00..19}``.

    A last ``**`` stands for all files below.
    """
    return _compiled(pattern).fullmatch(path) is not None


@lru_cache(maxsize=8)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile("|".join(map(_glob, _braces(pattern))), re.DOTALL)


def _glob(pattern: str) -> str:
    said = {"**/": "(?:[^/]+/)*", "*": "[^/]*", "?": "[^/]"}
    parts = []
    if pattern == "**" or pattern.endswith("/**"):
        pattern += "/*"
    for token in re.findall(r"\*\*/|\*|\?|\[!?\]?[^]]*\]|.", pattern, re.DOTALL):
        if token in said:
            parts.append(said[token])
        elif len(token) > 1:  # a choice of characters
            parts.append("[" + token[1:-1].replace("\\", r"\\").replace("!", "^", token[1] == "!") + "]")
        else:
            parts.append(re.escape(token))
    return "".join(parts)


def _braces(pattern: str) -> list[str]:
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    numbers = range(int(span[1]), int(span[2]) + 1) if span else ()
    choices = [f"{n:0{len(span[1])}}" for n in numbers] if span else found[1].split(",")
    return [one for choice in choices for one in _braces(pattern[: found.start()] + choice + pattern[found.end() :])]


def shown(path: str) -> str:
    r"""A path as text that every encoding has: bytes that are not UTF-8 as ``\xff``."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def write_whole(file: Path, text: str) -> None:
    """Write a file in one piece: whoever reads it finds the old content or the new, also after a crash."""
    beside = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        with open(beside, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk, as fsync has the bytes of a file."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # where folders cannot be opened, there is nothing to ask for
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_other(path: str, now_size: int, now_changed: int, size: int, changed: int) -> None:
    """Raise InputError for a file that is not what was listed, by what is known then and now."""
    if 0 <= size != now_size >= 0:
        raise InputError(f"{shown(path)} is not what was listed: it has {now_size} bytes, and had {size}.")
    if changed and now_changed and changed != now_changed:
        raise InputError(f"{shown(path)} is not what was listed: it was changed since.")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _size(info: dict[str, Any]) -> int:
    size = info.get("size")
    return -1 if size is None else int(size)


_VERSIONS = ("ETag", "etag", "LastModified", "last_modified", "mtime", "modified", "updated", "created")


def _changed(info: dict[str, Any]) -> int:
    """63 bits of the first thing that a store says of a file's version; 0 if it says nothing."""
    said = next((info[name] for name in _VERSIONS if info.get(name)), None)
    if said is None:
        return 0
    bare = str(said).strip('"')  # Azure's ETag has quotes when a file is asked for, and none in a listing
    return int.from_bytes(hashlib.blake2b(bare.encode(), digest_size=8).digest(), "little") >> 1
