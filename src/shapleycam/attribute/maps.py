"""The maps of a data set, read back: by key, by number, in batches, and for other libraries."""

from __future__ import annotations

import operator
import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .. import ops
from ..data.decoding import Decoder
from ..data.files import ARROW_ERRORS
from ..data.images import Preprocess
from ..data.manifest import Manifest, key_hash
from ..data.sources import Entry, Source, open_source
from ..errors import InputError
from ..optional import need
from . import exchange
from .folder import MANIFEST, part_files, read_job
from .part import LAYOUT

_EXTRA = "attribute"
_FILES, _GROUPS = 8, 8  # open files and row groups in memory


@dataclass(frozen=True, slots=True, eq=False)
class Map:
    """One picture's row.

    Attributes:
        key, path: its name, and where it was.
        status: "ok", or why there is no map ("unreadable", "undecodable", "timeout", "not finite", "no target", "unexpected").
        error: the reason in words; None if there is a map.
        width, height: of the whole picture, upright; None if it could not be decoded.
        label: as the source had it.
        target, probability, logit, completeness_gap, hvp_ratio: of the explained class, or lists of M of them; None for what
            was not computed.
        raw: the signed map, float32 [h, w] or [M, h, w] on the host; NaN if there is none. Rounded to 1/2048 of its
            largest value, at most.
    """

    key: str
    path: str
    status: str
    error: str | None
    width: int | None
    height: int | None
    label: str | None
    target: Any
    probability: Any
    logit: Any
    completeness_gap: Any
    hvp_ratio: Any
    raw: Tensor


class Maps(Dataset[Map]):
    """A result on disk; also a map-style ``torch.utils.data.Dataset`` of its rows, for ``DataLoader(maps, collate_fn=...)``.

    Rows are in the source's order; those of parts that are not done are left out. From any thread; pickled for processes.

    Args:
        path: the folder.
        source: the pictures, for overlays, where the folder's own address of them does not do.

    Attributes:
        path: the folder.
        job: its description: "key" (all that the maps depend on), "source", "classes", …
        preprocess: how the pictures were cut.

    Raises:
        InputError: no result, of another layout, or without any part.
    """

    def __init__(self, path: str | PathLike[str], source: Source | Any = None) -> None:
        self.path = Path(path)
        self.job = read_job(self.path)
        said: Any = {name: tuple(v) if isinstance(v, list) else v for name, v in self.job["preprocess"].items()}
        self.preprocess = Preprocess(**said)
        self._given = source
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
        kept = ("path", "job", "preprocess", "_given", "_parts", "_starts")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    # ------------------------------------------------------------------------------------------------------- what there is

    def __len__(self) -> int:
        return self._starts[-1]

    def __repr__(self) -> str:
        return f"Maps({str(self.path)!r}: {len(self)} of {self.manifest.count} pictures, {self.job['key']['method']})"

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
    def classes(self) -> tuple[str, ...]:
        """Class names; empty where they are not known."""
        return tuple(self.job["classes"])

    def class_name(self, index: int) -> str:
        """The name of a class, or "class 7"."""
        return self.classes[index] if 0 <= index < len(self.classes) else f"class {index}"

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of a stored map: (h, w), or (M, h, w)."""
        return tuple(self._file(self._parts[0]).schema_arrow.field("map").type.shape)

    def keys(self) -> Iterator[str]:
        """The keys, in order."""
        for batch in self.tables(["key"]):
            yield from batch.column("key").to_pylist()

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._find(key) is not None

    # -------------------------------------------------------------------------------------------------------------- rows

    def __getitem__(self, key: str | int) -> Map:
        """The row of a key, or the i-th row.

        Raises:
            InputError: there is no such row.
        """
        return self._row(self.index(key))

    def __iter__(self) -> Iterator[Map]:
        return (self._row(index) for index in range(len(self)))

    def index(self, key: str | int) -> int:
        """The number of a row.

        Raises:
            InputError: there is no such row. (IndexError for a number, which ends an iteration.)
        """
        if not isinstance(key, str):
            try:
                number = operator.index(key)
            except TypeError as error:
                raise InputError(f"{self.path} has rows by key (a text) and by number, got {key!r}.") from error
            if not -len(self) <= number < len(self):
                raise IndexError(f"Row {number} is out of range: {self.path} has {len(self)} rows.")
            return number % len(self)
        found = self._find(key)
        if found is None:
            raise InputError(f"{self.path} has no picture {key!r}.")
        return found

    def entry(self, key: str | int) -> Entry:
        """The picture of a row, as its source lists it."""
        part, row = self._place(self.index(key))
        with self._lock:
            if self._shard is None or self._shard[0] != part:
                self._shard = part, self.manifest.shard(self._parts[part])
            return self._shard[1][row]

    def _row(self, index: int) -> Map:
        part, row = self._place(index)
        group, first = self._group(part, row)
        one = group.slice(row - first, 1)
        values = {name: one.column(name)[0].as_py() for name in one.column_names if name not in ("map", "scale")}
        return Map(**values, raw=raw_of(one)[0])

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

    # --------------------------------------------------------------------------------------------------------- the index

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

    def _find(self, key: str) -> int | None:
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

    # ------------------------------------------------------------------------------------------------------ whole columns

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """The rows as ``pyarrow.Table``, one row group at a time."""
        for k in self._parts:
            file = self._opened(k)
            for g in range(file.metadata.num_row_groups):
                yield file.read_row_group(g, columns=columns)

    def batches(self) -> Iterator[tuple[list[str], Tensor]]:
        """(keys, raw maps float32 [n, *grid]) of one row group at a time; NaN where there is no map."""
        for table in self.tables(["key", "scale", "map"]):
            yield table.column("key").to_pylist(), raw_of(table)

    def numpy(self, column: str) -> Any:
        """A whole column in memory, as NumPy has it; "map" is float16 [N, *grid], divided by the column "scale"."""
        numpy = need("numpy", "cli")
        if column == "map":
            found = [tensor_of(table, torch.float16).numpy() for table in self.tables(["map"])]
        else:
            found = [table.column(column).to_numpy() for table in self.tables([column])]
        return numpy.concatenate(found)

    # ------------------------------------------------------------------------------------------------------- for the eye

    def heatmap(self, key: str | int, size: Sequence[int] | int | None = None, *, frame: str = "view") -> Tensor:
        """The display form: ReLU, min-max, resize, min-max.

        Args:
            key: of the picture, or the number of its row.
            size: (H, W) or the length of both; None for the frame's own size.
            frame: "view" for the crop that the network saw; "image" for the whole picture, with 0 where the network did not
                look.

        Returns:
            float32 [H, W] or [M, H, W] in [0, 1]; NaN if the picture has no map.

        Raises:
            InputError: no such picture, size or frame; or the picture's size is unknown, as it could not be decoded.
        """
        row = self[key]
        if frame not in ("view", "image"):
            raise InputError(f"frame must be 'view' or 'image', got {frame!r}.")
        whole: tuple[int, int] | None = None
        if frame == "image":
            if row.width is None or row.height is None:
                raise InputError(f"{row.key} has no size: {row.status}, {row.error}")
            whole = (row.height, row.width)
        wanted = (size, size) if isinstance(size, int) else tuple(size or whole or self.preprocess.crop)
        if len(wanted) != 2 or any(not isinstance(s, int) or s < 1 for s in wanted):
            raise InputError(f"size must be a positive integer, or two (height, width), got {size!r}.")
        maps = row.raw if row.raw.ndim == 3 else row.raw[None]
        found = self._in_whole(maps, wanted, whole) if whole else ops.display_map(maps, wanted, renormalize=True)
        return found if row.raw.ndim == 3 else found[0]

    def _in_whole(self, maps: Tensor, size: tuple[int, int], whole: tuple[int, int]) -> Tensor:
        left, top, right, bottom = self.preprocess.box(whole[1], whole[0])
        x, y = size[1] / whole[1], size[0] / whole[0]
        columns = _pixels(left * x, right * x, size[1])
        rows = _pixels(top * y, bottom * y, size[0])
        found = maps.new_zeros((maps.shape[0], *size))
        found[:, rows, columns] = ops.display_map(
            maps, (rows.stop - rows.start, columns.stop - columns.start), renormalize=True
        )
        return found

    @cached_property
    def source(self) -> Source:
        """The pictures.

        Raises:
            InputError: they are not where they were; give ``open_maps(path, source=...)``.
        """
        image, key, label = self.job["columns"]
        if self._given is not None:
            return open_source(self._given, image=image, key=key, label=label)
        try:
            return open_source(self.job["source"], image=image, key=key, label=label)
        except InputError as error:
            raise InputError(f"{error} Say where the pictures are: open_maps({str(self.path)!r}, source=...).") from error

    def view(self, key: str | int) -> Tensor:
        """The crop that the network saw, uint8 [3, H, W], read from the source again.

        Raises:
            InputError: the picture cannot be read, or is not the one that was explained (by size and time of change; by size
                where the source was given anew).
        """
        entry, made = self.entry(key), self.job["key"]
        name = "auto" if made["decoder"] == "cuda" else made["decoder"]  # where it is looked at, no GPU need be
        decode = Decoder(self.preprocess, name, made["max_pixels"])
        if self._given is not None:  # a copy has times of its own
            entry = entry._replace(changed=0)
        try:
            content = self.source.load(entry)
        except InputError as error:
            if self._given is not None:
                raise
            raise InputError(
                f"{error} Of a copy only sizes are compared: open_maps({str(self.path)!r}, source=...)."
            ) from error
        return decode(content, entry.key).view

    def overlay(self, key: str | int, *, colormap: str = "jet", alpha: float = 0.5) -> Tensor:
        """The heatmap over the crop, uint8 [H, W, 3] or [M, H, W, 3].

        Raises:
            InputError: the picture cannot be read, or has no map; or as :meth:`shapleycam.Explanation.overlay`.
        """
        row, view = self[key], self.view(key)
        if row.status != "ok":
            raise InputError(f"{row.key} has no map: {row.status}, {row.error}")
        maps = row.raw if row.raw.ndim == 3 else row.raw[None]
        heat = ops.display_map(maps, tuple(view.shape[1:]), renormalize=True)
        drawn = ops.overlay(view[None].repeat(len(maps), 1, 1, 1), heat, colormap=colormap, alpha=alpha)
        return drawn if row.raw.ndim == 3 else drawn[0]

    # ----------------------------------------------------------------------------------------------- for other libraries

    def to_hf(self, folder: str | PathLike[str] | None = None) -> Any:
        """See :func:`shapleycam.attribute.exchange.to_hf`."""
        return exchange.to_hf(self, folder)

    def to_fiftyone(self, folder: str | PathLike[str], **options: Any) -> Any:
        """See :func:`shapleycam.attribute.exchange.to_fiftyone`."""
        return exchange.to_fiftyone(self, folder, **options)

    def to_quantus(self, keys: Sequence[str | int] | None = None, size: Sequence[int] | int | None = None) -> Any:
        """See :func:`shapleycam.attribute.exchange.to_quantus`."""
        return exchange.to_quantus(self, keys, size)


def open_maps(path: str | PathLike[str], source: Source | Any = None) -> Maps:
    """Open the result of :func:`shapleycam.attribute.attribute`; arguments and errors as :class:`Maps`."""
    return Maps(path, source)


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


def _pixels(start: float, stop: float, count: int) -> slice:
    """The nearest whole pixels, at least one, of ``count``."""
    first = min(max(round(start), 0), count - 1)
    return slice(first, min(max(round(stop), first + 1), count))
