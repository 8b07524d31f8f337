"""Where pictures come from: folders, tables, tars, data sets of Hugging Face; listed once, then read in any order.

A source lists its pictures as entries, in an order that depends on nothing but their names, and gives the encoded bytes of one
entry to any thread.
"""

from __future__ import annotations

import glob
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike, fspath
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..errors import InputError
from ..optional import need
from .files import Files, Found, LocalFiles, files_of, matches, shown
from .images import image_endings


class Entry(NamedTuple):
    """One picture.

    Attributes:
        key: its name, unique in the source.
        path: the file, or the file that holds it (a tar, a table), relative to the source.
        offset: its first byte in a tar, or its row in a table; -1 for a file of its own.
        length: its bytes in a tar, or those of the file that a table's row names; -1 where it is not known beforehand.
        size: the bytes of ``path`` when it was listed; -1 if they are not known.
        changed: when ``path`` was changed, or the file that a table's row names, as in :class:`shapleycam.data.files.Found`; 0
            if it is not known.
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
        files, folder: what the paths of its entries are relative to; None for ``folder`` where they are no files.
        recursive: whether it also lists what is in the folders below.
    """

    address: str
    columns: tuple[str | None, str | None, str | None] = (None, None, None)
    holds = "rows"
    files: Files
    folder: str | None = None
    recursive = False

    @property
    def local(self) -> Path | None:
        """The folder of this machine that the pictures are in; None if they are elsewhere."""
        return Path(self.folder or ".") if self.folder is not None and isinstance(self.files, LocalFiles) else None

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
    folder: str

    def __init__(self, files: Files, folder: str, address: str, pattern: str = "**/*", *, recursive: bool = True) -> None:
        self.files, self.folder, self.address = files, folder, address
        self.pattern, self.recursive = pattern, recursive
        self._endings = image_endings()

    def entries(self) -> Iterator[Entry]:
        for found in self.files.walk(self.folder, recursive=self.recursive):
            if PurePosixPath(found.path).suffix.lower() in self._endings and matches(found.path, self.pattern):
                first, nested, _ = found.path.partition("/")
                label = shown(first) if nested else None
                yield Entry(shown(found.path), found.path, size=found.size, changed=found.changed, label=label)

    def load(self, entry: Entry) -> bytes:
        return self.files.read(self.files.join(self.folder, entry.path), size=entry.size, changed=entry.changed)

    def locate(self, entry: Entry) -> str:
        return shown(self.files.join(self.folder, entry.path))


class Tars(Source):
    """Tar files in WebDataset's manner: the files of one sample stand together and differ in their endings.

    The key is the path up to the first dot of the file's name; the label is the number in the ``.cls`` file.
    """

    folder: str

    def __init__(self, files: Files, folder: str, paths: Sequence[str], address: str) -> None:
        self.files, self.folder, self.paths, self.address = files, folder, tuple(paths), address
        self._endings = image_endings()

    def entries(self) -> Iterator[Entry]:
        for path in self.paths:
            whole = self.files.join(self.folder, path)
            at = self.files.find(whole)
            for key, members in itertools.groupby(self._members(whole), key=lambda member: member[0]):
                image: tuple[int, int] | None = None
                label: str | int | None = None
                for _, ending, offset, length, content in members:
                    if ending == "cls":
                        text = content.decode(errors="replace").strip()
                        label = label_of(int(text)) if text.isdecimal() else text
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
                    file.seek(tar.offset)
                    if file.read(512).strip(b"\0"):  # where tarfile takes a damaged header for the end
                        raise InputError(f"{shown(path)} is damaged: there is no header at byte {tar.offset}, and no end.")
            except InputError:
                raise
            except tarfile.TarError as error:
                raise InputError(f"{shown(path)} is not a plain tar file (a compressed one has no offsets): {error}") from error
            except Exception as error:  # of the file system
                raise InputError(f"{shown(path)} cannot be read: {type(error).__name__}: {error}") from error

    def load(self, entry: Entry) -> bytes:
        path = self.files.join(self.folder, entry.path)
        return self.files.read(path, entry.offset, entry.length, size=entry.size, changed=entry.changed)

    def locate(self, entry: Entry) -> str:
        return f"{shown(self.files.join(self.folder, entry.path))}:{entry.offset}+{entry.length}"


class HuggingFace(Source):
    """A ``datasets.Dataset`` with a column of images.

    It cannot be opened again by its address: whoever needs the pictures later brings the object.

    Args:
        dataset: with random access (not a streaming one).
        image: the column; None for the only one of type Image, or "image".
        key: a column of unique names; None for the number of the row.
        label: a column of labels; None for "label", if there is one.

    Raises:
        InputError: no such column, or a streaming data set.
    """

    def __init__(self, dataset: Any, image: str | None = None, key: str | None = None, label: str | None = None) -> None:
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
        for name in filter(None, (self._image, key, label)):
            if name not in features:
                raise InputError(f"The data set has no column {name!r}; it has {list(features)}.")
        self._label = label or ("label" if "label" in features else None)
        self.columns = (self._image, self._key, self._label)
        kept = [name for name in (self._image, self._key, self._label) if name]
        self._rows = dataset.select_columns(kept).cast_column(self._image, datasets.Image(decode=False)).with_format(None)
        self._names = getattr(features.get(self._label), "names", None)
        self.address = f"datasets.Dataset {dataset._fingerprint}"

    def entries(self) -> Iterator[Entry]:
        small = [name for name in (self._key, self._label) if name]
        labels: Iterable[Any] = self._rows.select_columns(small) if small else ({} for _ in range(len(self._rows)))
        named = paths_of(self._rows.data.column(self._image))
        mapped = None if named is None or self._rows._indices is None else self._rows._indices.column(0)
        for row, values in enumerate(labels):
            label = values[self._label] if self._label else None
            if self._names and isinstance(label, int) and 0 <= label < len(self._names):
                label = self._names[label]
            key = str(values[self._key]) if self._key else f"{row:08}"
            path = named[row if mapped is None else mapped[row].as_py()] if named else None
            own = local_file(path, LocalFiles(), "")
            length, changed = (-1, 0) if own is None else (own.size, own.changed)
            yield Entry(key, self.address, row, length, changed=changed, label=label_of(label))

    def load(self, entry: Entry) -> bytes:
        row = self._rows[entry.offset]
        if self._key and str(row[self._key]) != entry.key:
            raise InputError(f"{entry.key} is not what was listed: the row is {str(row[self._key])!r} now.")
        content = content_of(row[self._image] or {}, entry.key)
        if isinstance(content, bytes):
            if entry.length >= 0:
                raise InputError(f"{entry.key} is not what was listed: the data set held a path.")
            return content
        files, path = place_of(content, LocalFiles(), "")
        return files.read(path, size=entry.length, changed=entry.changed)

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
        return HuggingFace(source, image, key, label)
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
                return _shards(files, path, chosen, address, image, key, label)
        return PictureFolder(files, path, address, recursive=recursive)
    if files.find(path) is not None:
        if path.lower().endswith((*TABLES, ".tar")):
            folder, _, name = path.rpartition("/")
            folder = folder or path[: -len(name)]  # "/", or nothing
            return _shards(files, folder, [name], address, image, key, label)
        raise InputError(f"{shown(address)} is neither a folder nor a table (.parquet, .arrow) nor a .tar file.")
    if glob.has_magic(path) or "{" in path:
        return _matching(files, path, address, image, key, label)
    raise InputError(f"{shown(address)}: there is no such folder or file.")


TABLES = (".parquet", ".arrow")


def _matching(files: Files, path: str, address: str, image: str | None, key: str | None, label: str | None) -> Source:
    parts = path.split("/")
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part) or "{" in part)
    folder, pattern = "/".join(parts[:fixed]) or ("/" if path.startswith("/") else ""), "/".join(parts[fixed:])
    deep = "/" in pattern or "**" in pattern
    if files.is_folder(folder or "."):
        found = [f.path for f in files.walk(folder, recursive=deep) if matches(f.path, pattern)]
        shards = [name for name in found if name.lower().endswith((*TABLES, ".tar"))]
        if shards:
            source = _shards(files, folder, shards, address, image, key, label)
            source.recursive = deep
            return source
        if found:
            return PictureFolder(files, folder, address, pattern, recursive=deep)
    raise InputError(f"{shown(address)}: nothing matches.")


def _shards(
    files: Files, folder: str, paths: Sequence[str], address: str, image: str | None, key: str | None, label: str | None
) -> Source:
    from .tables import Tables

    kinds = {path.lower().rpartition(".")[2] for path in paths}
    if len(kinds) > 1:
        raise InputError(f"{shown(address)} mixes {' and '.join(sorted(kinds))} files: name one kind, such as *.tar.")
    if kinds == {"tar"}:
        return Tars(files, folder, paths, address)
    return Tables(files, folder, paths, address, image=image, key=key, label=label)


def content_of(cell: Any, key: str) -> bytes | str:
    """The encoded picture in a cell, or the path of one: from bytes, a path, or Hugging Face's struct of both.

    Raises:
        InputError: there is neither.
    """
    path = None
    if isinstance(cell, dict):
        cell, path = cell.get("bytes"), cell.get("path")
    elif isinstance(cell, str):
        cell, path = None, cell
    if cell:
        return bytes(cell)
    if path:
        return str(path)
    raise InputError(f"{key} has no bytes and no path in the table.")


def place_of(path: str, files: Files, folder: str) -> tuple[Files, str]:
    """Where a path in a table leads: it is relative to the table's folder, or absolute, or an address."""
    return files_of(path) if path.startswith("/") or "://" in path else (files, files.join(folder, path))


def local_file(path: str | None, files: Files, folder: str) -> Found | None:
    """The file that a row names, if it is one of this machine's; elsewhere it would be a request for each."""
    if not path or ("://" in path and not path.startswith("file://")):
        return None
    there, place = place_of(path, files, folder)
    return there.find(place) if isinstance(there, LocalFiles) else None


def paths_of(column: Any) -> list[str | None] | None:
    """Of Arrow's structs of "bytes" and "path" the paths of those without bytes; None if all have bytes. No bytes are read."""
    compute = need("pyarrow.compute", "attribute")
    found: list[str | None] = []
    for chunk in column.chunks:
        content, path = (compute.struct_field(chunk, name) for name in ("bytes", "path"))  # null where the struct is
        empty = compute.equal(compute.fill_null(compute.binary_length(content), 0), 0)
        found += compute.if_else(empty, path, None).to_pylist()
    return found if any(found) else None


def label_of(value: Any) -> str | int | None:
    """A label as manifests hold it: whole numbers of 64 bits, also where they come as 1.0 or True; all else as a text."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if value != value:  # NaN is how tables of numbers say that there is none
        return None
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return str(value)
    return number if number == value and -(2**63) <= number < 2**63 else str(value)
