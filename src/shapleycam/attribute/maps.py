"""The maps of a data set, read back: by key, by number, in batches, and for other libraries."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .. import ops
from ..data.decoding import Decoder
from ..data.images import Preprocess
from ..data.manifest import Manifest
from ..data.sources import Entry, Source, open_source
from ..errors import InputError
from ..optional import need
from . import exchange
from .folder import read_job
from .rows import Rows, raw_of, tensor_of


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
        self._rows = Rows(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("path", "job", "preprocess", "_given", "_rows")}  # and no open source

    # ------------------------------------------------------------------------------------------------------- what there is

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"Maps({str(self.path)!r}: {len(self)} of {self.manifest.count} pictures, {self.job['key']['method']})"

    @property
    def manifest(self) -> Manifest:
        """The list of the pictures."""
        return self._rows.manifest

    @property
    def statuses(self) -> dict[str, int]:
        """How many rows have each status."""
        return self._rows.statuses

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
        return self._rows.grid

    def keys(self) -> Iterator[str]:
        """The keys, in order."""
        for batch in self.tables(["key"]):
            yield from batch.column("key").to_pylist()

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._rows.find(key) is not None

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
        found = self._rows.find(key)
        if found is None:
            raise InputError(f"{self.path} has no picture {key!r}.")
        return found

    def entry(self, key: str | int) -> Entry:
        """The picture of a row, as its source lists it."""
        return self._rows.entry(self.index(key))

    def _row(self, index: int) -> Map:
        one = self._rows.read(index)
        values = {name: one.column(name)[0].as_py() for name in one.column_names if name not in ("map", "scale")}
        return Map(**values, raw=raw_of(one)[0])

    # ------------------------------------------------------------------------------------------------------ whole columns

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """The rows as ``pyarrow.Table``, one row group at a time."""
        return self._rows.tables(columns)

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


def _pixels(start: float, stop: float, count: int) -> slice:
    """The nearest whole pixels, at least one, of ``count``."""
    first = min(max(round(start), 0), count - 1)
    return slice(first, min(max(round(stop), first + 1), count))
