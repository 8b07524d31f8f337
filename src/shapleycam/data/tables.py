"""Tables of pictures: Parquet and Arrow files with the encoded images, or their paths, in a column."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from ..errors import InputError
from ..optional import need
from .files import Files, LocalFiles, shown
from .sources import Entry, Source, content_of

_EXTRA = "attribute"
_KEPT = 4  # pieces (row groups) in memory: threads that decode in order are rarely further apart


class Tables(Source):
    """Rows of Parquet files, or of Arrow's (as Hugging Face ``datasets`` saves), which must have the same columns.

    The image column holds bytes, a struct with a field "bytes" (and "path"), or paths relative to the table's folder. It is
    ``image``, or the one called "image", or the only one with bytes or a struct, or the one called "path" or "file". A whole
    number or a text in the column ``label`` ("label") is the label. Keys are the texts of the column ``key``, or file name and
    row.
    """

    def __init__(
        self,
        files: Files,
        paths: Sequence[str],
        address: str,
        *,
        image: str | None = None,
        key: str | None = None,
        label: str | None = None,
    ) -> None:
        need("pyarrow.parquet", _EXTRA)
        self.files, self.paths, self.address = files, tuple(paths), address
        self.columns = (image, key, label)
        self._start()
        seen: Any = None
        for path in self.paths:
            columns = _columns(shown(path), self._piece_file(path).schema, *self.columns)
            if seen not in (None, columns):
                raise InputError(f"{shown(path)} has other columns than {shown(self.paths[0])}.")
            seen = columns
        self._image, self._key, self._label = seen

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[str, _Pieces] = OrderedDict()
        self._held: OrderedDict[tuple[str, int], Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """For other processes, which open the files themselves."""
        own = ("_lock", "_files", "_held")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def entries(self) -> Iterator[Entry]:
        for path in self.paths:
            name = shown(path).rpartition("/")[2]
            at = self.files.find(path)
            size, changed = (-1, 0) if at is None else (at.size, at.changed)
            pieces = self._piece_file(path)
            row = 0
            small = [column for column in (self._key, self._label) if column]
            for index in range(len(pieces.starts)):
                table = pieces.read(index, small) if small else None
                keys = table.column(self._key).to_pylist() if table is not None and self._key else None
                labels = table.column(self._label).to_pylist() if table is not None and self._label else None
                for i in range(pieces.rows(index)):
                    key = f"{name}:{row}" if keys is None else str(keys[i])
                    yield Entry(key, path, row, -1, size, changed, None if labels is None else labels[i])
                    row += 1

    def load(self, entry: Entry) -> bytes:
        with self._lock:
            pieces = self._piece_file(entry.path)
            index = bisect_right(pieces.starts, entry.offset) - 1
            table = self._held.get((entry.path, index))
            if table is None:
                table = self._held[entry.path, index] = pieces.read(index, [self._image])
                while len(self._held) > _KEPT:
                    self._held.popitem(last=False)
        try:
            cell = table.column(self._image)[entry.offset - pieces.starts[index]].as_py()
        except IndexError as error:
            raise InputError(f"{entry.key}: the table has fewer rows than when it was listed.") from error
        return content_of(cell, entry.key, self.files, entry.path.rpartition("/")[0] or ".")

    def locate(self, entry: Entry) -> str:
        return f"{shown(entry.path)}:{entry.offset}"

    def _piece_file(self, path: str) -> _Pieces:
        pieces = self._files.get(path)
        if pieces is None:
            pieces = self._files[path] = _Pieces(self.files, path)
            while len(self._files) > _KEPT:
                self._files.popitem(last=False)
        return pieces


class _Pieces:
    """A table file in pieces that are read as a whole: the row groups of Parquet, the record batches of Arrow."""

    def __init__(self, files: Files, path: str) -> None:
        self._parquet: Any = None
        self._table: Any = None
        try:
            if path.lower().endswith(".parquet"):
                where = path if isinstance(files, LocalFiles) else files.open(path)
                self._parquet = need("pyarrow.parquet", _EXTRA).ParquetFile(where)
                meta = self._parquet.metadata
                counts = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
                self.schema = self._parquet.schema_arrow
            else:
                self._table = _arrow(files, path)
                counts = [batch.num_rows for batch in self._table.to_batches()]
                self.schema = self._table.schema
        except (OSError, ValueError) as error:
            raise InputError(f"{shown(path)} is not a table that can be read: {error}") from error
        self.path = path
        self.starts = [0, *accumulate(counts)][: len(counts)]
        self._counts = counts

    def rows(self, index: int) -> int:
        return int(self._counts[index])

    def read(self, index: int, columns: list[str]) -> Any:
        try:
            if self._parquet is not None:
                return self._parquet.read_row_group(index, columns=columns)
            return self._table.slice(self.starts[index], self._counts[index]).select(columns)
        except (OSError, ValueError) as error:
            raise InputError(f"{shown(self.path)} cannot be read: {error}") from error


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
    for field in schema:
        inner = field.type
        if types.is_struct(inner) and inner.get_field_index("bytes") >= 0:
            inner = inner.field(inner.get_field_index("bytes")).type
        if types.is_binary(inner) or types.is_large_binary(inner):
            images.append(field.name)
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
