"""Pictures to evaluate on: a folder of image files, or parquet files with the encoded images in a column.

A sample that cannot be read is data, not an exception: its reason takes the place of its pixels, so that a run over 50,000
files does not end at the first broken one.
"""

from __future__ import annotations

import hashlib
import io
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from ..optional import need
from .images import Preprocess, image_files, read_image


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture.

    Attributes:
        name: what reports call it.
        view: the crop that the network sees, uint8 [3, H, W]; or why it cannot be had.
        label: the name of its folder, or the number in the parquet file's label column; None if there is neither.
    """

    name: str
    view: Tensor | str
    label: str | int | None = None


class Samples(Dataset[Sample]):
    """Pictures in a fixed order, by index."""

    preprocess: Preprocess

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes with the names, the sizes or the number of the pictures."""

    def _read(self, source: Any, name: str, label: str | int | None) -> Sample:
        try:
            return Sample(name, self.preprocess.view(read_image(source, name)), label)
        except InputError as error:
            return Sample(name, str(error).removeprefix(f"{name} "), label)


class FolderSamples(Samples):
    """The image files below a folder, by relative path; the first folder on the way to a file is its label."""

    def __init__(self, folder: Path, preprocess: Preprocess, limit: int | None = None) -> None:
        self.preprocess, self.folder = preprocess, folder
        files = image_files(folder, recursive=True)
        if not files:
            raise InputError(f"{folder} holds no image files.")
        #: names of all label folders, whatever the limit
        self.labels = tuple(sorted({path.parts[0] for path in files if len(path.parts) > 1}))
        self.files = [files[i] for i in spread(len(files), limit)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        path = self.files[index]
        return self._read(self.folder / path, path.as_posix(), path.parts[0] if len(path.parts) > 1 else None)

    def fingerprint(self) -> str:
        return _digest(f"{path.as_posix()} {(self.folder / path).stat().st_size}" for path in self.files)


class ParquetSamples(Samples):
    """Rows of parquet files, in Hugging Face's manner: a column of encoded images (bytes, or a struct with a field "bytes").

    A whole number in a column "label" is the label.
    """

    def __init__(self, files: Sequence[Path], preprocess: Preprocess, limit: int | None = None) -> None:
        self.preprocess, self.paths = preprocess, tuple(files)
        parquet = need("pyarrow.parquet", "evaluate")
        #: (file, row group, first row) of every row group
        self._groups: list[tuple[int, int, int]] = []
        self._cached: tuple[int, Any] | None = None
        rows, seen = 0, None
        for number, path in enumerate(self.paths):
            try:
                file = parquet.ParquetFile(path)
            except (OSError, ValueError) as error:
                raise InputError(f"{path} is not a parquet file that can be read: {error}") from error
            columns = _columns(path, file.schema_arrow)
            if seen not in (None, columns):
                raise InputError(f"{path} has other columns than {self.paths[0]}.")
            seen = columns
            for group in range(file.metadata.num_row_groups):
                self._groups.append((number, group, rows))
                rows += file.metadata.row_group(group).num_rows
        if not rows or seen is None:
            raise InputError(f"{', '.join(map(str, self.paths)) or 'The folder'} holds no rows.")
        self._image, self._label = seen
        self._rows = spread(rows, limit)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        row = self._rows[index]
        place = bisect_right(self._groups, row, key=lambda group: group[2]) - 1
        number, group, first = self._groups[place]
        if self._cached is None or self._cached[0] != place:
            file = need("pyarrow.parquet", "evaluate").ParquetFile(self.paths[number])
            columns = [self._image] if self._label is None else [self._image, self._label]
            self._cached = place, file.read_row_group(group, columns=columns)
        table = self._cached[1]
        cell = table.column(self._image)[row - first].as_py()
        label = None if self._label is None else table.column(self._label)[row - first].as_py()
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        path = cell.get("path") if isinstance(cell, dict) else None
        name = f"{self.paths[number].name}:{row - first}" + (f" ({path})" if path else "")
        if not content:
            return Sample(name, "has no bytes in the parquet file.", label)
        return self._read(io.BytesIO(content), name, label)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}  # for the loader's processes

    def fingerprint(self) -> str:
        names = [f"{path.name} {path.stat().st_size}" for path in self.paths]
        return _digest([*names, f"{len(self._rows)} of {self._groups}"])


def open_samples(source: Path, preprocess: Preprocess, limit: int | None = None) -> FolderSamples | ParquetSamples:
    """The pictures in a folder of image files, a parquet file, or a folder of parquet files.

    Args:
        source: the folder or file.
        preprocess: how the network wants its pictures.
        limit: at most so many, spread evenly over all.

    Raises:
        InputError: nothing there, no pictures, or pyarrow is not installed.
    """
    if source.is_dir():
        shards = sorted(source.glob("*.parquet"))
        return ParquetSamples(shards, preprocess, limit) if shards else FolderSamples(source, preprocess, limit)
    if not source.exists():
        raise InputError(f"{source}: there is no such folder or file.")
    if source.suffix.lower() != ".parquet":
        raise InputError(f"{source} is neither a folder nor a .parquet file.")
    return ParquetSamples([source], preprocess, limit)


def spread(count: int, limit: int | None) -> Sequence[int]:
    """At most ``limit`` of the indices below ``count``, evenly spread."""
    if limit is None or limit >= count:
        return range(count)
    return [i * count // limit for i in range(limit)]


def _columns(path: Path, schema: Any) -> tuple[str, str | None]:
    types = need("pyarrow", "evaluate").types
    images = []
    for field in schema:
        inner = field.type
        if types.is_struct(inner) and inner.get_field_index("bytes") >= 0:
            inner = inner.field(inner.get_field_index("bytes")).type
        if types.is_binary(inner) or types.is_large_binary(inner):
            images.append(field.name)
    name = "image" if "image" in images else images[0] if len(images) == 1 else None
    if name is None:
        raise InputError(f"{path} needs one column of encoded images (binary), or one named 'image'; it has {schema.names}.")
    label = schema.get_field_index("label")
    return name, "label" if label >= 0 and types.is_integer(schema.field(label).type) else None


def _digest(lines: Any) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()
