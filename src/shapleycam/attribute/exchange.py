"""The maps for other libraries: Hugging Face datasets, FiftyOne, Quantus."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import ops
from ..data.images import to_picture
from ..errors import InputError
from ..optional import need
from .part import part_name

if TYPE_CHECKING:
    from .maps import Maps

_LONGEST = 2048  # pixels of the longer side of a heatmap that stands for a whole picture


def to_hf(maps: Maps, folder: str | PathLike[str] | None = None) -> Any:
    """A ``datasets.Dataset`` of all rows, with the map as ``Array2D`` (``Array3D`` for several classes), float16.

    Args:
        maps: the result.
        folder: where Parquet files of plain lists are written, one per part, which ``datasets.load_dataset("parquet",
            data_dir=folder)`` reads too (it does not know Arrow's tensor type; the map is lists of lists then); None to keep
            all rows in memory.

    Raises:
        InputError: ``datasets`` is not installed.
    """
    datasets, arrow = need("datasets", "datasets"), need("pyarrow", "attribute")
    array = {2: datasets.Array2D, 3: datasets.Array3D}[len(maps.grid)]
    tables = (_plain(table) for table in maps.tables())
    first = next(tables)
    features = datasets.Features.from_arrow_schema(first.schema.remove_metadata())
    features["map"] = array(shape=maps.grid, dtype="float16")
    schema = features.arrow_schema  # says in its metadata which lists are arrays

    def typed(table: Any) -> Any:
        columns = [table.column(name).combine_chunks() for name in table.column_names]
        kinds = [field.type for field in schema]
        cast = [
            arrow.ExtensionArray.from_storage(kind, _chunk(column)) if isinstance(kind, arrow.ExtensionType) else column
            for column, kind in zip(columns, kinds, strict=True)
        ]
        return arrow.table(cast, schema=schema)

    if folder is None:
        whole = arrow.concat_tables([typed(first), *(typed(table) for table in tables)])
        return datasets.Dataset(whole)
    parquet, path = need("pyarrow.parquet", "attribute"), Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    storage = arrow.schema(
        [arrow.field(f.name, f.type.storage_type if isinstance(f.type, arrow.ExtensionType) else f.type) for f in schema]
    )
    files = [_write(parquet, first, storage, path, 0)]
    files += [_write(parquet, table, storage, path, number) for number, table in enumerate(tables, 1)]
    return datasets.Dataset.from_parquet(files, features=features, cache_dir=str(path / ".cache"))


def _write(parquet: Any, table: Any, schema: Any, folder: Path, number: int) -> str:
    file = folder / part_name(number)
    parquet.write_table(table.cast(schema), file, compression="zstd")
    return str(file)


def _plain(table: Any) -> Any:
    """The same rows with the map as lists of lists, which every reader knows."""
    arrow = need("pyarrow", "attribute")
    at = table.schema.get_field_index("map")
    column = table.column("map")
    shape = column.type.shape
    chunks = []
    for chunk in column.chunks:
        lists = chunk.storage.flatten()
        for length in reversed(shape):
            offsets = arrow.array(range(0, len(lists) + 1, length), arrow.int32())
            lists = arrow.ListArray.from_arrays(offsets, lists)
        chunks.append(lists)
    return table.set_column(at, "map", arrow.chunked_array(chunks))


def _chunk(column: Any) -> Any:
    return column.combine_chunks() if hasattr(column, "combine_chunks") else column


def to_quantus(maps: Maps, keys: Sequence[str | int] | None = None, size: Sequence[int] | int | None = None) -> Any:
    """Heatmaps as Quantus takes them for ``a_batch``: a NumPy array, float32 [N, 1, H, W], in the size of the network's input.

    Args:
        maps: the result.
        keys: whose, in this order; None for all rows that have a map.
        size: (H, W) if the inputs have another.

    Raises:
        InputError: a picture has no map, or maps of several classes.
    """
    if len(maps.grid) != 2:
        raise InputError(f"Quantus takes one map per input; there are {maps.grid[0]}.")
    wanted = (size, size) if isinstance(size, int) else tuple(size or maps.preprocess.crop)
    if keys is None:
        found = [raws[~raws.flatten(1).isnan().any(1)] for _, raws in maps.batches()]
        raw = torch.cat(found)
    else:
        rows = [maps[key] for key in keys]
        for row in rows:
            if row.status != "ok":
                raise InputError(f"{row.key} has no map: {row.status}, {row.error}")
        raw = torch.stack([row.raw for row in rows])
    return ops.display_map(raw, (wanted[0], wanted[1]), renormalize=True)[:, None].numpy()


def to_fiftyone(
    maps: Maps, folder: str | PathLike[str], *, name: str | None = None, field: str = "shapleycam", dataset: Any = None
) -> Any:
    """A FiftyOne data set with a heatmap, a prediction and the numbers of every picture that is a file.

    FiftyOne stretches a heatmap over the whole picture. So each is written as a PNG (8 bits) of the picture's shape, at most
    2048 pixels long, with 0 where the network, which saw a crop, did not look.

    Args:
        maps: the result.
        folder: where the PNGs go.
        name: of the data set; None for one that FiftyOne names.
        field: of the heatmap.
        dataset: one with samples of these files, to which the fields are added; None makes one.

    Raises:
        InputError: FiftyOne is not installed, or the source's pictures are no files of their own.
    """
    fiftyone = need("fiftyone", "fiftyone")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    if len(maps.grid) != 2:
        raise InputError(f"FiftyOne shows one map per picture; there are {maps.grid[0]}.")
    if dataset is None:
        dataset = fiftyone.Dataset(name)
    known = {sample.filepath: sample for sample in dataset} if len(dataset) else {}
    fresh = []
    for row in maps:
        if not Path(row.path).is_file():
            raise InputError(f"{row.path} is no file, and FiftyOne shows files: unpack the pictures first.")
        sample = known.get(row.path) or fiftyone.Sample(filepath=row.path)
        sample[f"{field}_status"] = row.status
        if row.label is not None:
            sample["ground_truth"] = fiftyone.Classification(label=row.label)
        if row.status == "ok":
            file = path / f"{hashlib.blake2b(row.key.encode(), digest_size=12).hexdigest()}.png"
            _write_heatmap(maps, row, file)
            sample[field] = fiftyone.Heatmap(map_path=str(file.resolve()), range=[0, 255])
            sample[f"{field}_prediction"] = fiftyone.Classification(
                label=maps.class_name(row.target), confidence=row.probability, logits=None
            )
            if row.completeness_gap is not None:
                sample[f"{field}_completeness_gap"] = row.completeness_gap
        if row.path in known:
            sample.save()
        else:
            fresh.append(sample)
    dataset.add_samples(fresh)
    dataset.info[field] = json.loads(json.dumps(maps.job["key"]))
    dataset.save()
    return dataset


def _write_heatmap(maps: Maps, row: Any, file: Path) -> None:
    shrink = min(1.0, _LONGEST / max(row.width, row.height))
    size = (max(round(row.height * shrink), 1), max(round(row.width * shrink), 1))
    grey = maps.heatmap(row.key, size, frame="image").mul(255).round().byte()
    to_picture(grey[:, :, None].expand(-1, -1, 3).contiguous()).convert("L").save(file)
