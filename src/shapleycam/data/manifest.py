"""A source, listed once: a Parquet file of its entries, cut into shards that depend on nothing else.

Shard k is row group k, so that a worker reads its own entries and no others, however long the data set is.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..optional import need
from .files import ARROW_ERRORS, sync_folder
from .samples import add_entry
from .sources import Entry, Source

_FORMAT = b"1"
_EXTRA = "attribute"


class Manifest:
    """A manifest on disk; one object for one thread.

    Attributes:
        file: where it is.
        count: entries. shards: their number. shard_size: entries in each, but for the last.
        fingerprint: changes with every name, size, time or label, and their order.

    Raises:
        InputError: the file is missing or no manifest.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        parquet = need("pyarrow.parquet", _EXTRA)
        try:
            self._file = parquet.ParquetFile(file)
            said = self._file.schema_arrow.metadata or {}
            said = {**said, **(self._file.metadata.metadata or {})}
            if said.get(b"format") != _FORMAT:
                raise InputError(f"{file} is not a manifest that this version reads (format {said.get(b'format')!r}).")
            self.fingerprint = said[b"fingerprint"].decode()
            self.shard_size = int(said[b"shard_size"])
        except (*ARROW_ERRORS, KeyError) as error:
            raise error if isinstance(error, InputError) else InputError(f"{file} is not a manifest: {error}") from error
        self.count = self._file.metadata.num_rows
        self.shards = self._file.metadata.num_row_groups

    def shard(self, k: int) -> list[Entry]:
        """The entries of shard ``k``."""
        if not 0 <= k < self.shards:
            raise InputError(f"Shard {k} is out of range: {self.file} has {self.shards} shards.")
        columns = self._file.read_row_group(k).to_pydict()
        rows = zip(*(columns[name] for name in (*Entry._fields[:-1], "label", "number")), strict=True)
        return [
            Entry(key, os.fsdecode(path), offset, length, size, changed, number if label is None else label)
            for key, path, offset, length, size, changed, label, number in rows
        ]

    def rows(self, k: int) -> int:
        """The number of entries in shard ``k``."""
        return min(self.shard_size, int(self.count) - k * self.shard_size)

    def __iter__(self) -> Iterator[Entry]:
        for k in range(self.shards):
            yield from self.shard(k)


def write_manifest(source: Source, file: Path, shard_size: int) -> Manifest:
    """List a source into a file, which is there as a whole or not at all; memory grows by 8 bytes an entry.

    Raises:
        InputError: the source is empty or cannot be read, two pictures have the same key, or ``shard_size`` is below 1.
        OSError: the file cannot be written.
    """
    if shard_size < 1:
        raise InputError(f"shard_size must be at least 1, got {shard_size}.")
    arrow, parquet = need("pyarrow", _EXTRA), need("pyarrow.parquet", _EXTRA)
    kinds = [("key", arrow.string()), ("path", arrow.binary())]
    kinds += [(name, arrow.int64()) for name in ("offset", "length", "size", "changed")]
    schema = arrow.schema([*kinds, ("label", arrow.string()), ("number", arrow.int64())])
    digest, hashes = hashlib.sha256(), array("q")
    beside = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as stream:
            with parquet.ParquetWriter(stream, schema, compression="zstd") as writer:
                for piece in _pieces(source.entries(), shard_size):
                    for entry in piece:
                        add_entry(digest, entry)
                        hashes.append(key_hash(entry.key))
                    writer.write_table(_table(piece, schema), row_group_size=shard_size)
                if not hashes:
                    raise InputError(f"{source.address} holds no {source.holds}.")
                said = {"format": _FORMAT.decode(), "fingerprint": digest.hexdigest(), "shard_size": str(shard_size)}
                writer.add_key_value_metadata(said)
            stream.flush()
            os.fsync(stream.fileno())
        _refuse_twins(source, hashes)
        os.replace(beside, file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)
    return Manifest(file)


def fingerprint_of(source: Source) -> tuple[str, int]:
    """What the manifest's fingerprint would be if the source were listed now, and the number of entries."""
    digest, count = hashlib.sha256(), 0
    for entry in source.entries():
        add_entry(digest, entry)
        count += 1
    return digest.hexdigest(), count


def key_hash(key: str) -> int:
    """64 bits of a key, as a signed number."""
    return int.from_bytes(
        hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little", signed=True
    )


def _pieces(entries: Iterable[Entry], size: int) -> Iterator[list[Entry]]:
    piece: list[Entry] = []
    for entry in entries:
        piece.append(entry)
        if len(piece) == size:
            yield piece
            piece = []
    if piece:
        yield piece


def _table(entries: list[Entry], schema: Any) -> Any:
    arrow = need("pyarrow", _EXTRA)
    columns: list[list[Any]] = [list(column) for column in zip(*entries, strict=True)]
    labels = columns.pop()
    columns[1] = [os.fsencode(path) for path in columns[1]]
    columns.append([label if isinstance(label, str) else None for label in labels])
    columns.append([label if isinstance(label, int) else None for label in labels])
    return arrow.table(columns, schema=schema)


def _refuse_twins(source: Source, hashes: array[int]) -> None:
    ordered = torch.frombuffer(hashes, dtype=torch.int64).sort().values
    twins = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not twins:
        return
    seen: set[str] = set()
    twice: list[str] = []
    for entry in source.entries():  # again, as hashes may agree where keys do not
        if key_hash(entry.key) in twins:
            if entry.key in seen:
                twice.append(entry.key)
            seen.add(entry.key)
    if twice:
        named = ", ".join(map(repr, twice[:3])) + (", …" if len(twice) > 3 else "")
        raise InputError(
            f"{source.address}: {len(twice)} pictures have the key of another ({named}). Keys name the results, so each must "
            "be there once: name a column of unique keys, or make the names in the shards unique."
        )
