"""Tables of pictures: Parquet and Arrow files with the encoded images, or their paths, in a column."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

from ..errors import InputError
from ..optional import need
from .files import ARROW_ERRORS, Files, Found, LocalFiles, refuse_other, shown
from .sources import Entry, Source, content_of, label_of, local_file, paths_of, place_of

_EXTRA = "attribute"
_KEPT = 4  # pieces (row groups) in memory: threads that decode in order are rarely further apart


class Tables(Source):
    """Rows of Parquet files, or of Arrow's (as Hugging Face ``datasets`` saves), which must have the same columns.

    The image column holds bytes, a struct with a field "bytes" (and "path"), or paths relative to the table's folder. It is
    ``image``, or the one called "image", or the only one with bytes or a struct, or the one called "path" or "file". A whole
    number or a text in the column ``label`` ("label") is the label. Keys are the texts of the column ``key``, or file name and
    row.
    """

    folder: str

    def __init__(
        self,
        files: Files,
        folder: str,
        paths: Sequence[str],
        address: str,
        *,
        image: str | None = None,
        key: str | None = None,
        label: str | None = None,
    ) -> None:
        need("pyarrow.parquet", _EXTRA)
        self.files, self.folder, self.paths, self.address = files, folder, tuple(paths), address
        self._start()
        seen: Any = None
        for path in self.paths:
            columns = _columns(shown(path), self._pieces(path).schema, image, key, label)
            if seen not in (None, columns):
                raise InputError(f"{shown(path)} has other columns than {shown(self.paths[0])}.")
            seen = columns
        self.columns = self._image, self._key, self._label = seen

    def _start(self) -> None:
        self._lock = threading.Lock()  # of the dictionaries; never held while something is read
        self._files: OrderedDict[str, _Pieces] = OrderedDict()
        self._held: OrderedDict[tuple[_Pieces, int], _Held] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """For other processes, which open the files themselves."""
        own = ("_lock", "_files", "_held")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def entries(self) -> Iterator[Entry]:
        for path in self.paths:
            whole = self.files.join(self.folder, path)
            at = self.files.find(whole)
            size, changed = (-1, 0) if at is None else (at.size, at.changed)
            pieces = self._pieces(path)
            row = 0
            small = [column for column in (self._key, self._label) if column]
            for index in range(len(pieces.starts)):
                table = pieces.read(index, small) if small else None
                keys = table.column(self._key).to_pylist() if table is not None and self._key else None
                labels = table.column(self._label).to_pylist() if table is not None and self._label else None
                named = pieces.paths(index, self._image, partial(self._local, path))
                for i in range(pieces.rows(index)):
                    key = f"{shown(path)}:{row}" if keys is None else str(keys[i])
                    label = None if labels is None else label_of(labels[i])
                    own = self._local(path, named[i] if named else None)
                    if own is None:
                        yield Entry(key, path, row, -1, size, changed, label)
                    else:
                        yield Entry(key, path, row, own.size, size, own.changed, label)
                    row += 1

    def _local(self, path: str, named: str | None) -> Found | None:
        """The file that a row of a table names, if it is one of this machine's."""
        return local_file(named, self.files, self._folder_of(path))

    def _folder_of(self, path: str) -> str:
        return self.files.join(self.folder, path).rpartition("/")[0] or "."

    def load(self, entry: Entry) -> bytes:
        own = entry.length >= 0  # the picture is a file, and it is that file's time which is known
        pieces = self._pieces(entry.path, entry.size, 0 if own else entry.changed)
        content = content_of(self._cell(pieces, entry), entry.key)
        if isinstance(content, bytes):
            if own:
                raise InputError(f"{entry.key} is not what was listed: the table held a path.")
            return content
        files, place = place_of(content, self.files, self._folder_of(entry.path))
        return files.read(place, size=entry.length, changed=entry.changed if own else 0)

    def _cell(self, pieces: _Pieces, entry: Entry) -> Any:
        """What the image column holds; whoever reads its piece keeps only those waiting who want the same one."""
        index = bisect_right(pieces.starts, entry.offset) - 1
        with self._lock:
            held = self._held.setdefault((pieces, index), _Held())
            self._held.move_to_end((pieces, index))
            while len(self._held) > _KEPT:
                self._held.popitem(last=False)
        with held.lock:
            if held.column is None:
                held.column = pieces.read(index, [self._image]).column(self._image)
        try:
            return held.column[entry.offset - pieces.starts[index]].as_py()
        except IndexError as error:
            raise InputError(f"{entry.key}: the table has fewer rows than when it was listed.") from error

    def locate(self, entry: Entry) -> str:
        return f"{shown(self.files.join(self.folder, entry.path))}:{entry.offset}"

    def _pieces(self, path: str, size: int = -1, changed: int = 0) -> _Pieces:
        """A table, opened; one that was changed since it was listed is refused, and one since it was opened is opened again."""
        whole = self.files.join(self.folder, path)
        now = None
        if isinstance(self.files, LocalFiles):
            now = self.files.find(whole)
            if now is not None:
                refuse_other(whole, now.size, now.changed, size, changed)
        elif size >= 0 or changed:
            self.files.check_listed(whole, size, changed)
        with self._lock:
            pieces = self._files.get(path)
            if pieces is None or pieces.stamp != now:
                pieces = self._files[path] = _Pieces(self.files, whole, now)
            self._files.move_to_end(path)
            while len(self._files) > _KEPT:
                self._files.popitem(last=False)
        pieces.open()
        return pieces


@dataclass(slots=True)
class _Held:
    """A piece's image column, once it is read."""

    column: Any = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Pieces:
    """A table file in pieces that are read as a whole, from any thread: Parquet's row groups, Arrow's record batches."""

    schema: Any
    counts: list[int]
    starts: list[int]

    def __init__(self, files: Files, path: str, stamp: Found | None) -> None:
        self._where, self.path, self.stamp = files, path, stamp
        self._meta: Any = None  # of Parquet
        self._table: Any = None  # of Arrow
        self._opening = threading.Lock()

    def open(self) -> None:
        """Read what the file says of itself, once.

        Raises:
            InputError: it is no table.
        """
        with self._opening:
            if not hasattr(self, "counts"):
                counts = self._open()
                self.starts = [0, *accumulate(counts)][: len(counts)]
                self.counts = counts

    def _open(self) -> list[int]:
        path = self.path
        try:
            if path.lower().endswith(".parquet"):
                with self._parquet() as file:
                    self._meta, self.schema = file.metadata, file.schema_arrow
                return [self._meta.row_group(i).num_rows for i in range(self._meta.num_row_groups)]
            self._table = _arrow(self._where, path)
            self.schema = self._table.schema
            return [batch.num_rows for batch in self._table.to_batches()]
        except InputError:
            raise
        except ARROW_ERRORS as error:
            raise InputError(f"{shown(path)} is not a table that can be read: {error}") from error

    def _parquet(self) -> Any:
        """A reader of its own for each reading, as one must not serve two threads; the footer is parsed once."""
        where = self.path if isinstance(self._where, LocalFiles) else self._where.open(self.path)
        return need("pyarrow.parquet", _EXTRA).ParquetFile(where, metadata=self._meta)

    def rows(self, index: int) -> int:
        return self.counts[index]

    def read(self, index: int, columns: list[str]) -> Any:
        """These columns of a piece.

        Raises:
            InputError: it cannot be read.
        """
        try:
            if self._table is not None:
                return self._table.slice(self.starts[index], self.counts[index]).select(columns)
            with self._parquet() as file:
                return file.read_row_group(index, columns=columns)
        except InputError:
            raise
        except ARROW_ERRORS as error:
            raise InputError(f"{shown(self.path)} cannot be read: {error}") from error

    def paths(self, index: int, image: str, there: Callable[[str], object]) -> list[str | None] | None:
        """The paths that a piece's image column holds in the place of pictures; None if it holds pictures only.

        Of Parquet without statistics, or with both, pictures are read only where ``there`` knows a path beside one.
        """
        kind = self.schema.field(image).type
        if _is_text(kind):
            return list(self.read(index, [image]).column(image).to_pylist())
        if not need("pyarrow", _EXTRA).types.is_struct(kind) or kind.get_field_index("path") < 0:
            return None
        if self._table is not None:
            return paths_of(self.read(index, [image]).column(image))
        group = self._meta.row_group(index)
        columns = {group.column(i).path_in_schema: group.column(i).statistics for i in range(group.num_columns)}
        said = columns.get(f"{image}.bytes")
        nulls = said.null_count if said is not None and said.has_null_count else None
        if nulls == 0:
            return None
        cells = self.read(index, [f"{image}.path"]).column(image).to_pylist()
        paths = [(cell or {}).get("path") for cell in cells]
        if nulls == self.counts[index]:
            return paths
        if not any(path and there(path) for path in paths):
            return None
        return paths_of(self.read(index, [image]).column(image))


def _arrow(files: Files, path: str) -> Any:
    """Arrow's stream or file format; of a local file the pages are mapped, not read."""
    arrow = need("pyarrow", _EXTRA)
    where = arrow.memory_map(path) if isinstance(files, LocalFiles) else arrow.py_buffer(files.read(path))
    try:
        return arrow.ipc.open_stream(where).read_all()
    except arrow.ArrowInvalid:
        return arrow.ipc.open_file(where).read_all()


def _columns(
    path: str, schema: Any, image: str | None, key: str | None, label: str | None
) -> tuple[str, str | None, str | None]:
    types = need("pyarrow", _EXTRA).types
    for asked in (image, key, label):
        if asked is not None and schema.get_field_index(asked) < 0:
            raise InputError(f"{path} has no column {asked!r}; it has {schema.names}.")
    images = []
    for column in schema:
        inner = column.type
        if types.is_struct(inner) and inner.get_field_index("bytes") >= 0:
            inner = inner.field(inner.get_field_index("bytes")).type
        if types.is_binary(inner) or types.is_large_binary(inner):
            images.append(column.name)
    paths = [
        name for name in ("image", "path", "file", "filename") if name in schema.names and _is_text(schema.field(name).type)
    ]
    name = image or ("image" if "image" in images else images[0] if len(images) == 1 else paths[0] if paths else None)
    if name is None:
        raise InputError(
            f"{path} needs one column of encoded images (binary), or one named 'image', or one of paths; it has {schema.names}."
        )
    if label is None:
        at = schema.get_field_index("label")
        label = "label" if at >= 0 and (types.is_integer(schema.field(at).type) or _is_text(schema.field(at).type)) else None
    return name, key, label


def _is_text(kind: Any) -> bool:
    types = need("pyarrow", _EXTRA).types
    return bool(types.is_string(kind) or types.is_large_string(kind))
