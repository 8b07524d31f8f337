"""Where pictures come from: folders, tables, tars, data sets of Hugging Face; listed once, then read in any order.

A source lists its pictures as entries, in an order that depends on nothing but their names, and gives the encoded bytes of one
entry to any thread.
"""

from __future__ import annotations

import glob
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike, fspath
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from ..errors import InputError
from ..optional import need
from .files import Files, Found, LocalFiles, files_of, shown
from .images import image_endings


class Entry(NamedTuple):
    """One picture.

    Attributes:
        key: its name, unique in the source.
        path: the file, or the file that holds it (a tar, a table), relative to the source.
        offset: its first byte in a tar, or its row in a table; -1 for a file of its own.
        length: its bytes in a tar; -1 where it is not known beforehand.
        size: the bytes of ``path`` when it was listed; -1 if they are not known.
        changed: when ``path`` was changed, in nanoseconds; 0 if it is not known.
        label: the name of its folder, the number or text in a label column, or of a tar's .cls file; None if there is none.
    """

    key: str
    path: str
    offset: int = -1
    length: int = -1
    size: int = -1
    changed: int = 0
    label: str | int | None = None


class Source(ABC):
    """Pictures that can be listed and read.

    Attributes:
        address, columns: how to open it again (:func:`open_source`): address, and columns of pictures, keys and labels.
        holds: what its entries are called.
    """

    address: str
    columns: tuple[str | None, str | None, str | None] = (None, None, None)
    holds = "rows"

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """All pictures.

        Raises:
            InputError: the source cannot be read.
        """

    @abstractmethod
    def load(self, entry: Entry) -> bytes:
        """The encoded picture; from any thread.

        Raises:
            InputError: it cannot be read, or is not what was listed.
        """

    @abstractmethod
    def locate(self, entry: Entry) -> str:
        """Where the picture is, for people and other programs."""


class PictureFolder(Source):
    """The image files below a folder, or those of them that match a pattern, by relative path.

    The first folder on the way to a file is its label.
    """

    holds = "image files"

    def __init__(self, files: Files, folder: str, address: str, pattern: str = "**/*", *, recursive: bool = True) -> None:
        self.files, self.folder, self.address = files, folder, address
        self.pattern, self.recursive = pattern, recursive
        self._endings = image_endings()

    def entries(self) -> Iterator[Entry]:
        for found in self.files.walk(self.folder, recursive=self.recursive):
            if PurePosixPath(found.path).suffix.lower() in self._endings and matches(found.path, self.pattern):
                first, nested, _ = found.path.partition("/")
                yield Entry(shown(found.path), *_file(found), label=shown(first) if nested else None)

    def load(self, entry: Entry) -> bytes:
        content = self.files.read(self.files.join(self.folder, entry.path))
        if 0 <= entry.size != len(content):
            raise InputError(f"{entry.key} has {len(content)} bytes, and had {entry.size} when it was listed.")
        return content

    def locate(self, entry: Entry) -> str:
        return shown(self.files.join(self.folder, entry.path))


class Tars(Source):
    """Tar files in WebDataset's manner: the files of one sample stand together and differ in their endings.

    The key is the path up to the first dot of the file's name; the label is the number in the ``.cls`` file.
    """

    def __init__(self, files: Files, paths: Sequence[str], address: str) -> None:
        self.files, self.paths, self.address = files, tuple(paths), address
        self._endings = image_endings()

    def entries(self) -> Iterator[Entry]:
        for path in self.paths:
            at = self.files.find(path)
            for key, members in itertools.groupby(self._members(path), key=lambda member: member[0]):
                image: tuple[int, int] | None = None
                label: str | int | None = None
                for _, ending, offset, length, content in members:
                    if ending == "cls":
                        label = _number(content.decode(errors="replace").strip())
                    elif image is None and f".{ending.rpartition('.')[2]}" in self._endings:
                        image = (offset, length)
                if image is not None:
                    yield Entry(key, path, *image, -1 if at is None else at.size, 0 if at is None else at.changed, label)

    def _members(self, path: str) -> Iterator[tuple[str, str, int, int, bytes]]:
        """(key, ending, offset, length, content of a .cls file) of every regular file."""
        import tarfile

        with self.files.open(path) as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    headers: Any = tar
                    for member in tar:
                        folder, _, name = member.name.rpartition("/")
                        stem, dot, ending = name.partition(".")
                        headers.members.clear()  # or the tar keeps every one
                        if not member.isreg() or not dot or not stem:
                            continue
                        ending = ending.lower()
                        small = tar.extractfile(member) if ending == "cls" and member.size < 1024 else None
                        key = shown(f"{folder}/{stem}" if folder else stem)
                        yield key, ending, member.offset_data, member.size, small.read() if small else b""
            except tarfile.TarError as error:
                raise InputError(f"{shown(path)} is not a plain tar file (a compressed one has no offsets): {error}") from error

    def load(self, entry: Entry) -> bytes:
        return self.files.read(entry.path, entry.offset, entry.length)

    def locate(self, entry: Entry) -> str:
        return f"{shown(entry.path)}:{entry.offset}+{entry.length}"


class HuggingFace(Source):
    """A ``datasets.Dataset`` with a column of images; the label is that of a column "label".

    It cannot be opened again by its address: whoever needs the pictures later brings the object.

    Args:
        dataset: with random access (not a streaming one).
        image: the column; None for the only one of type Image, or "image".
        key: a column of unique names; None for the number of the row.

    Raises:
        InputError: no such column, or a streaming data set.
    """

    def __init__(self, dataset: Any, image: str | None = None, key: str | None = None) -> None:
        datasets = need("datasets", "datasets")
        if not isinstance(dataset, datasets.Dataset):
            raise InputError(
                f"Expected a datasets.Dataset with random access, got {type(dataset).__name__}: name one split, "
                "without streaming=True."
            )
        features = dataset.features
        images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        if image is None and len(images) != 1 and "image" not in features:
            raise InputError(f"Name the column of images (image=); the data set has {list(features)}.")
        self._image = image or ("image" if "image" in features else images[0])
        self._key = key
        for name in filter(None, (self._image, key)):
            if name not in features:
                raise InputError(f"The data set has no column {name!r}; it has {list(features)}.")
        self._label = "label" if "label" in features else None
        kept = [name for name in (self._image, self._key, self._label) if name]
        self._rows = dataset.select_columns(kept).cast_column(self._image, datasets.Image(decode=False)).with_format(None)
        self._names = getattr(features.get("label"), "names", None)
        self.address = f"datasets.Dataset {dataset._fingerprint}"

    def entries(self) -> Iterator[Entry]:
        small = [name for name in (self._key, self._label) if name]
        labels: Iterable[Any] = self._rows.select_columns(small) if small else ({} for _ in range(len(self._rows)))
        for row, values in enumerate(labels):
            label = values.get("label")
            if self._names and isinstance(label, int) and 0 <= label < len(self._names):
                label = self._names[label]
            key = str(values[self._key]) if self._key else f"{row:08}"
            yield Entry(key, self.address, row, label=label)

    def load(self, entry: Entry) -> bytes:
        cell = self._rows[entry.offset][self._image] or {}
        return content_of(cell, entry.key, LocalFiles(), "")

    def locate(self, entry: Entry) -> str:
        return f"{entry.path}:{entry.offset}"


def open_source(
    source: str | PathLike[str] | Source | Any,
    *,
    image: str | None = None,
    key: str | None = None,
    label: str | None = None,
    recursive: bool = True,
) -> Source:
    """The pictures behind an address, or in an object.

    Args:
        source: a folder of image files, tables (.parquet, .arrow) or tars; one table or tar; a pattern such as
            ``photos/**/*.jpg`` or ``shards/{000..099}.tar``; each also as an address of fsspec; or a ``datasets.Dataset``.
        image, key, label: of tables: the columns with the pictures (encoded, or paths relative to the table), with unique
            names and with labels; None to find the first and the last by their names and types, and to number the rows.
        recursive: also the folders below a folder.

    Raises:
        InputError: nothing there, no pictures, or a package is missing.
    """
    if isinstance(source, Source):
        return source
    if not isinstance(source, (str, PathLike)):
        return HuggingFace(source, image, key)
    found = _at(fspath(source), image, key, label, recursive)
    if (image or key or label) and found.columns == (None, None, None):
        raise InputError(f"{shown(found.address)} is no table, so it has no columns {image or key or label!r}.")
    return found


def _at(address: str, image: str | None, key: str | None, label: str | None, recursive: bool) -> Source:
    files, path = files_of(address)
    if files.is_folder(path):
        names = [found.path for found in files.walk(path, recursive=False)]
        for endings in (TABLES, (".tar",)):
            chosen = [name for name in names if name.lower().endswith(endings)]
            if chosen:
                return _shards(files, [files.join(path, name) for name in chosen], address, image, key, label)
        return PictureFolder(files, path, address, recursive=recursive)
    if files.find(path) is not None:
        if path.lower().endswith((*TABLES, ".tar")):
            return _shards(files, [path], address, image, key, label)
        raise InputError(f"{shown(address)} is neither a folder nor a table (.parquet, .arrow) nor a .tar file.")
    if glob.has_magic(path) or "{" in path:
        return _matching(files, path, address, image, key, label)
    raise InputError(f"{shown(address)}: there is no such folder or file.")


TABLES = (".parquet", ".arrow")


def _matching(files: Files, path: str, address: str, image: str | None, key: str | None, label: str | None) -> Source:
    parts = path.split("/")
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part) or "{" in part)
    folder, pattern = "/".join(parts[:fixed]) or ("/" if path.startswith("/") else ""), "/".join(parts[fixed:])
    if files.is_folder(folder or "."):
        found = [f.path for f in files.walk(folder) if matches(f.path, pattern)]
        shards = [name for name in found if name.lower().endswith((*TABLES, ".tar"))]
        if shards:
            return _shards(files, [files.join(folder, name) for name in shards], address, image, key, label)
        if found:
            return PictureFolder(files, folder, address, pattern)
    raise InputError(f"{shown(address)}: nothing matches.")


def _shards(files: Files, paths: Sequence[str], address: str, image: str | None, key: str | None, label: str | None) -> Source:
    from .tables import Tables

    kinds = {path.lower().rpartition(".")[2] for path in paths}
    if len(kinds) > 1:
        raise InputError(f"{shown(address)} mixes {' and '.join(sorted(kinds))} files: name one kind, such as *.tar.")
    if kinds == {"tar"}:
        return Tars(files, paths, address)
    return Tables(files, paths, address, image=image, key=key, label=label)


def matches(path: str, pattern: str) -> bool:
    """Whether a relative path matches a pattern: ``*``, ``?``, ``[]``, ``**`` for any folders, ``{a,b}``, ``{00..19}``."""
    return any(_glob(one).fullmatch(path) is not None for one in _braces(pattern))


def _glob(pattern: str) -> re.Pattern[str]:
    said = {"**/": "(?:[^/]+/)*", "*": "[^/]*", "?": "[^/]"}
    parts = []
    for token in re.findall(r"\*\*/|\*|\?|\[!?\]?[^]]*\]|.", pattern, re.DOTALL):
        if token in said:
            parts.append(said[token])
        elif len(token) > 1:  # a choice of characters
            parts.append("[" + token[1:-1].replace("\\", r"\\").replace("!", "^", token[1] == "!") + "]")
        else:
            parts.append(re.escape(token))
    return re.compile("".join(parts), re.DOTALL)


def _braces(pattern: str) -> list[str]:
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    numbers = range(int(span[1]), int(span[2]) + 1) if span else ()
    choices = [f"{n:0{len(span[1])}}" for n in numbers] if span else found[1].split(",")
    return [one for choice in choices for one in _braces(pattern[: found.start()] + choice + pattern[found.end() :])]


def content_of(cell: Any, key: str, files: Files, folder: str) -> bytes:
    """The encoded picture in a cell: bytes, a path, or Hugging Face's struct of both.

    Raises:
        InputError: there is none, or the file cannot be read.
    """
    path = None
    if isinstance(cell, dict):
        cell, path = cell.get("bytes"), cell.get("path")
    elif isinstance(cell, str):
        cell, path = None, cell
    if cell:
        return bytes(cell)
    if path:
        absolute = path.startswith("/") or "://" in path
        there, path = files_of(path) if absolute else (files, files.join(folder, path))
        return there.read(path)
    raise InputError(f"{key} has no bytes and no path in the table.")


def _file(found: Found) -> tuple[str, int, int, int, int]:
    return found.path, -1, -1, found.size, found.changed


def _number(text: str) -> str | int:
    return int(text) if text.isdecimal() else text
