"""A part of the result: one Parquet file per shard, there as a whole or not at all.

Maps are float16 at the target layer's own resolution, divided by the map's largest absolute value, which stands beside them
(``scale``): whatever the size of the activations, they keep three digits. A picture without a map has NaN in its place.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.decoding import Decoded
from ..data.files import sync_folder
from ..data.sources import Entry, Source
from ..errors import JobError
from ..optional import need
from .feed import Failure

LAYOUT = "1"  #: version of the result's layout
GROUP_BYTES = 2 << 20  # of a row group: below, a scan pays for the many; above, one row for its neighbours
_EXTRA = "attribute"
_NUMBERS = ("probability", "logit", "completeness_gap", "hvp_ratio", "scale")


@dataclass(frozen=True, slots=True)
class Part:
    """What is known of a finished part.

    Attributes:
        shard: which. rows: pictures. kinds: how many rows have each status. examples: the first (key, status, error) of those
            without a map.
    """

    shard: int
    rows: int
    kinds: dict[str, int]
    examples: tuple[tuple[str, str, str], ...] = ()


@dataclass(slots=True)
class Found:
    """What the network and the explainer said of one batch, on the host; row n belongs to the batch's entry n.

    Attributes:
        maps: float16 [B, M, *grid] in [-1, 1].
        numbers: float32 [5, B, M]: probability, logit, completeness gap, |HA|/|g|, scale; NaN for what was not asked for.
        targets: int64 [B, M].
        finite: bool [B].
        ready: what to wait for before reading, on an accelerator.
    """

    maps: Tensor
    numbers: Tensor
    targets: Tensor
    finite: Tensor
    ready: Any = None


def part_name(shard: int) -> str:
    return f"part-{shard:06}.parquet"


def schema(grid: Sequence[int], classes: int, metadata: dict[str, str]) -> Any:
    """The columns of a part.

    Args:
        grid: of the maps. classes: M; with more than one, targets, their numbers and maps are lists per row.
        metadata: of the file.
    """
    arrow = need("pyarrow", _EXTRA)
    several = classes > 1

    def each(kind: Any) -> Any:
        return arrow.list_(kind, classes) if several else kind

    shape = (classes, *grid) if several else tuple(grid)
    fields = [(name, arrow.string()) for name in ("key", "path", "status", "error")]
    fields += [("width", arrow.int32()), ("height", arrow.int32()), ("label", arrow.string()), ("target", each(arrow.int32()))]
    fields += [(name, each(arrow.float32())) for name in _NUMBERS]
    fields += [("map", arrow.fixed_shape_tensor(arrow.float16(), shape))]
    return arrow.schema(fields, metadata=metadata)


@dataclass(slots=True)
class PartWriter:
    """Writes one part, row group by row group, under another name until :meth:`close`.

    Raises (all methods):
        JobError: the disk is full, or the folder cannot be written.
    """

    folder: Path
    shard: int
    schema: Any
    source: Source
    _beside: Path = field(init=False)
    _stream: Any = field(init=False, default=None)
    _writer: Any = field(init=False, default=None)
    _held: list[Any] = field(init=False, default_factory=list)
    _bytes: int = field(init=False, default=0)
    _kinds: Counter[str] = field(init=False, default_factory=Counter)
    _examples: list[tuple[str, str, str]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._beside = self.folder / f".{part_name(self.shard)}.{os.getpid()}.part"
        parquet = need("pyarrow.parquet", _EXTRA)
        try:
            self._stream = open(self._beside, "wb")  # noqa: SIM115 - closed in close and in drop
            self._writer = parquet.ParquetWriter(
                self._stream,
                self.schema,
                compression="zstd",
                compression_level=1,
                use_dictionary=False,
                write_statistics=[name for name in self.schema.names if name != "map"],
            )
        except OSError as error:
            raise self._failed(error) from error

    def add(self, entries: Sequence[Entry], found: Sequence[Decoded | Failure], numbers: Found | None) -> None:
        """The rows of a batch; ``numbers`` is None if none of its pictures could be read."""
        table = self._table(entries, found, numbers)
        self._held.append(table)
        self._bytes += table.nbytes
        if self._bytes >= GROUP_BYTES:
            self._flush()

    def close(self) -> Part:
        """Put the part in its place, on the disk."""
        kinds = dict(sorted(self._kinds.items()))
        try:
            self._flush()
            said = {"shapleycam:shard": str(self.shard), **{f"rows:{kind}": str(count) for kind, count in kinds.items()}}
            self._writer.add_key_value_metadata(said)
            self._writer.close()
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            os.replace(self._beside, self.folder / part_name(self.shard))
            sync_folder(self.folder)
        except OSError as error:
            raise self._failed(error) from error
        return Part(self.shard, sum(kinds.values()), kinds, tuple(self._examples))

    def drop(self) -> None:
        """Forget the part."""
        for each in (self._writer, self._stream):
            with suppress(OSError, AttributeError, ValueError):  # a full disk again, where nothing of it is wanted anyway
                each.close()
        self._beside.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._held:
            return
        table = need("pyarrow", _EXTRA).concat_tables(self._held)
        self._held, self._bytes = [], 0
        try:
            self._writer.write_table(table, row_group_size=max(len(table), 1))
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> JobError:
        self.drop()
        return JobError(
            f"{self.folder / part_name(self.shard)} cannot be written: {error.strerror or error}. What is done is kept: the "
            "same command goes on when there is room."
        )

    def _table(self, entries: Sequence[Entry], found: Sequence[Decoded | Failure], numbers: Found | None) -> Any:
        arrow = need("pyarrow", _EXTRA)
        count = len(entries)
        kind, target = self.schema.field("map").type, self.schema.field("target").type
        classes = target.list_size if arrow.types.is_fixed_size_list(target) else 1
        finite = [True] * count if numbers is None else numbers.finite[:count].tolist()
        status: list[str] = []
        errors: list[str | None] = []
        for entry, each, whole in zip(entries, found, finite, strict=True):
            if isinstance(each, Failure):
                status.append(each.kind)
                errors.append(each.text)
            else:
                status.append("ok" if whole else "not finite")
                errors.append(None if whole else "the activations, and so the map, hold NaN or Inf.")
            if status[-1] != "ok" and len(self._examples) < 5:
                self._examples.append((entry.key, status[-1], str(errors[-1])))
        self._kinds.update(status)
        good = torch.tensor([each == "ok" for each in status])
        if numbers is None:
            shape = (count, classes, *(kind.shape[-2:] if classes > 1 else kind.shape))
            numbers = Found(
                torch.full(shape, float("nan"), dtype=torch.float16),
                torch.full((len(_NUMBERS), count, classes), float("nan")),
                torch.zeros((count, classes), dtype=torch.int64),
                good,
            )
        maps = numbers.maps[:count].clone()
        maps[~good] = float("nan")
        nothing = ~good[:, None].expand(count, classes).reshape(-1)
        columns: dict[str, Any] = {
            "key": [entry.key for entry in entries],
            "path": [self.source.locate(entry) for entry in entries],
            "status": status,
            "error": errors,
            "width": [each.width if isinstance(each, Decoded) else None for each in found],
            "height": [each.height if isinstance(each, Decoded) else None for each in found],
            "label": [None if entry.label is None else str(entry.label) for entry in entries],
            "target": _column(numbers.targets[:count].reshape(-1).int(), nothing, classes),
        }
        for name, values in zip(_NUMBERS, numbers.numbers, strict=True):
            flat = values[:count].reshape(-1)
            columns[name] = _column(flat, nothing | flat.isnan(), classes)
        storage = arrow.FixedSizeListArray.from_arrays(_buffer(maps.reshape(-1)), maps[0].numel())
        columns["map"] = arrow.ExtensionArray.from_storage(kind, storage)
        return arrow.table([columns[name] for name in self.schema.names], schema=self.schema)


def _column(values: Tensor, nothing: Tensor, classes: int) -> Any:
    arrow = need("pyarrow", _EXTRA)
    column = arrow.array(values.tolist(), mask=None, type=_KINDS[values.dtype]())
    null = arrow.array(nothing.tolist())
    column = arrow.compute.if_else(null, arrow.scalar(None, column.type), column)
    return column if classes == 1 else arrow.FixedSizeListArray.from_arrays(column, classes)


_KINDS: dict[torch.dtype, Any] = {
    torch.int32: lambda: need("pyarrow", _EXTRA).int32(),
    torch.float32: lambda: need("pyarrow", _EXTRA).float32(),
    torch.float16: lambda: need("pyarrow", _EXTRA).float16(),
}


def _buffer(values: Tensor) -> Any:
    """A tensor's memory as an Arrow array, without a copy."""
    arrow = need("pyarrow", _EXTRA)
    values = values.contiguous()
    buffer = arrow.foreign_buffer(values.data_ptr(), values.numel() * values.element_size(), base=values)
    return arrow.Array.from_buffers(_KINDS[values.dtype](), values.numel(), [None, buffer])
