"""A result on disk, row by row: which parts are there, the row groups of them that are in memory, and where a key stands."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.files import ARROW_ERRORS
from ..data.manifest import Manifest, key_hash
from ..data.sources import Entry
from ..errors import InputError
from ..optional import need
from .folder import MANIFEST, part_files
from .part import LAYOUT

_EXTRA = "attribute"
_FILES, _GROUPS = 8, 8  # open files and row groups in memory


class Rows:
    """The rows of the parts that are there, numbered through. From any thread; pickled for processes.

    Args:
        path: the folder of the result.

    Raises:
        InputError: there is no part, or (by whatever reads) one that is of another layout or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start()
        self._parts = sorted(part_files(self.path))
        if not self._parts:
            raise InputError(f"{self.path} has no finished part yet: run shapleycam attribute again.")
        counts = [self.manifest.rows(k) for k in self._parts]
        self._starts = [0, *accumulate(counts)]  # of the parts that are there, and the end

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._files: OrderedDict[int, Any] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._shard: tuple[int, list[Entry]] | None = None  # the entries of the part that was asked for last

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("path", "_parts", "_starts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __len__(self) -> int:
        return self._starts[-1]

    @cached_property
    def manifest(self) -> Manifest:
        """The list of the pictures."""
        return Manifest(self.path / MANIFEST)

    @cached_property
    def statuses(self) -> dict[str, int]:
        """How many rows have each status."""
        found: Counter[str] = Counter()
        for k in self._parts:
            said = self._file(k).metadata.metadata or {}
            found.update({name[5:].decode(): int(count) for name, count in said.items() if name.startswith(b"rows:")})
        return dict(found)

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of a stored map: (h, w), or (M, h, w)."""
        return tuple(self._file(self._parts[0]).schema_arrow.field("map").type.shape)

    def entry(self, index: int) -> Entry:
        """The picture of a row, as its source lists it."""
        part, row = self._place(index)
        with self._lock:
            if self._shard is None or self._shard[0] != part:
                self._shard = part, self.manifest.shard(self._parts[part])
            return self._shard[1][row]

    def read(self, index: int) -> Any:
        """A row, as a table of one."""
        part, row = self._place(index)
        group, first = self._group(part, row)
        return group.slice(row - first, 1)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """The rows as ``pyarrow.Table``, one row group at a time."""
        for k in self._parts:
            file = self._opened(k)
            for g in range(file.metadata.num_row_groups):
                yield file.read_row_group(g, columns=columns)

    def _place(self, index: int) -> tuple[int, int]:
        part = bisect_right(self._starts, index) - 1
        return part, index - self._starts[part]

    def _group(self, part: int, row: int) -> tuple[Any, int]:
        """The row group that holds a row of a part, and its first row."""
        with self._lock:
            file = self._file(self._parts[part])
            meta, first, g = file.metadata, 0, 0
            while row >= first + meta.row_group(g).num_rows:
                first += meta.row_group(g).num_rows
                g += 1
            table = self._groups.get((part, g))
            if table is None:
                table = self._groups[part, g] = file.read_row_group(g)
                while len(self._groups) > _GROUPS:
                    self._groups.popitem(last=False)
            return table, first

    def _file(self, k: int) -> Any:
        with self._lock:
            file = self._files.get(k)
            if file is None:
                file = self._files[k] = self._opened(k)
                while len(self._files) > _FILES:
                    self._files.popitem(last=False)
            return file

    def _opened(self, k: int) -> Any:
        path = part_files(self.path, k)[k]
        try:
            file = need("pyarrow.parquet", _EXTRA).ParquetFile(path)
        except ARROW_ERRORS as error:
            raise InputError(f"{path} cannot be read: {error}. Remove it, and run shapleycam attribute again.") from error
        said = file.metadata.metadata or {}
        layout = said.get(b"shapleycam:layout", b"").decode()
        whole = said.get(b"shapleycam:shard") == b"%d" % k and file.metadata.num_rows == self.manifest.rows(k)
        if layout != LAYOUT or not whole:
            raise InputError(f"{path} has layout {layout!r}, or not its rows: remove it, and run shapleycam attribute again.")
        return file

    @cached_property
    def _index(self) -> tuple[Tensor, Tensor]:
        """(hashes of all keys, sorted; their places in the manifest): 16 bytes a key."""
        parquet = need("pyarrow.parquet", _EXTRA)
        hashes = [
            key_hash(key)
            for batch in parquet.ParquetFile(self.path / MANIFEST).iter_batches(columns=["key"])
            for key in batch.column(0).to_pylist()
        ]
        ordered = torch.tensor(hashes, dtype=torch.int64).sort()
        return ordered.values, ordered.indices

    def find(self, key: str) -> int | None:
        """The number of a key's row; None if there is none."""
        hashes, places = self._index
        wanted = torch.tensor(key_hash(key), dtype=torch.int64)
        at = int(torch.searchsorted(hashes, wanted))
        while at < len(hashes) and hashes[at] == wanted:  # hashes may agree where keys do not
            k, row = divmod(int(places[at]), self.manifest.shard_size)
            part = bisect_right(self._parts, k) - 1
            if part >= 0 and self._parts[part] == k:
                group, first = self._group(part, row)
                if group.column("key")[row - first].as_py() == key:
                    return self._starts[part] + row
            at += 1
        return None


def tensor_of(table: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """The column "map" as a tensor [n, *grid], as it is stored: divided by the scale."""
    column = table.column("map").combine_chunks()
    if hasattr(column, "num_chunks"):
        column = column.chunk(0)
    storage = column.storage.flatten()  # respects the slice
    start = storage.offset * 2
    raw = bytearray(memoryview(storage.buffers()[1])[start : start + 2 * len(storage)])
    shape = tuple(column.type.shape)
    if not raw:
        return torch.empty((0, *shape), dtype=dtype)
    return torch.frombuffer(raw, dtype=torch.float16).view(-1, *shape).to(dtype)


def raw_of(table: Any) -> Tensor:
    """The signed maps of a table with the columns "map" and "scale", float32 [n, *grid]."""
    maps, column = tensor_of(table), table.column("scale").combine_chunks()
    if hasattr(column, "num_chunks"):
        column = column.chunk(0)
    flat = column.flatten() if maps.ndim == 4 else column
    scales = torch.tensor(flat.to_numpy(zero_copy_only=False))  # NaN where there is none
    return maps * scales.reshape(*maps.shape[:-2], 1, 1)
