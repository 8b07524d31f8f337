"""A result as one HTML file that needs no server and nothing from elsewhere.

The page is a fixed text (gallery.html); what varies is one JSON document in it, in which no character can end the element that
holds it, and which the page shows as text only.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from ..data.images import to_picture
from ..errors import InputError
from .maps import Maps
from .rows import raw_of
from .summary import Summary, concentration, entropy, first, first_class, groups, pick

_MARK = "__DATA__"


def gallery(
    maps: Maps,
    summary: Summary,
    *,
    limit: int = 10_000,
    count: int = 12,
    pictures: bool = True,
    side: int = 112,
    title: str | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> str:
    """The page.

    Args:
        maps, summary: of one result.
        limit: pictures in it, spread evenly over all.
        count: groups of maps that are alike.
        pictures: whether the pictures are read from the source again and put in, ``side`` pixels large.
        title: the result's path if None.
        progress: called with the pictures behind us and in all.
    """
    chosen = pick(len(maps), limit)
    rows, raw = _rows(maps, chosen)
    good = torch.tensor([row["status"] == "ok" for row in rows], dtype=torch.bool)
    belongs, means = groups(raw[good], count)
    numbers: list[int | None] = [None] * len(rows)
    for n, group in zip(good.nonzero().flatten().tolist(), belongs.tolist(), strict=True):
        numbers[n] = group
    data: dict[str, Any] = {
        "title": title or str(maps.path),
        "about": {k: v for k, v in maps.job["key"].items() if k in ("model", "method", "utility", "layer", "engine", "target")},
        "pictures": summary.pictures,
        "done": summary.rows,
        "shown": len(rows),
        "statuses": summary.statuses,
        "grid": list(raw.shape[1:]),
        "crop": list(maps.preprocess.crop),
        "rows": {name: [row[name] for row in rows] for name in _COLUMNS},
        "concentration": _rounded(concentration(raw), good),
        "entropy": _rounded(entropy(raw), good),
        "group": numbers,
        "maps": _bytes(raw),
        "names": {str(each.target): each.name for each in summary.classes},
        "classes": [
            {
                "target": each.target,
                "count": each.count,
                "probability": round(each.probability, 4),
                "map": _bytes(each.mean[None]),
            }
            for each in summary.classes
        ],
        "groups": [{"count": int((belongs == g).sum()), "map": _bytes(mean[None])} for g, mean in enumerate(means)],
        "thumbnails": list(_thumbnails(maps, chosen, side, progress)) if pictures else [],
    }
    # "<" as an escape: no name can end the element, or begin another. (JSON has no other character that HTML knows.)
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = resources.files(__package__).joinpath("gallery.html").read_text(encoding="utf-8")
    assert page.count(_MARK) == 1
    return page.replace(_MARK, text)


_COLUMNS = ("key", "path", "status", "error", "label", "target", "probability", "completeness_gap")


def _rows(maps: Maps, chosen: list[int]) -> tuple[list[dict[str, Any]], Tensor]:
    """The chosen rows, and their raw maps [n, h, w]; every row group is read once."""
    rows: list[dict[str, Any]] = []
    raws: list[Tensor] = []
    start, wanted = 0, iter(chosen)
    index = next(wanted, None)
    for table in maps.tables([*_COLUMNS, "scale", "map"]):
        here = []
        while index is not None and index < start + len(table):
            here.append(index - start)
            index = next(wanted, None)
        start += len(table)
        if here:
            part = table.take(here)
            raws.append(first_class(raw_of(part)))
            for row in part.select(list(_COLUMNS)).to_pylist():
                for name in ("target", "probability", "completeness_gap"):
                    row[name] = first(row[name])
                for name in ("probability", "completeness_gap"):
                    row[name] = None if row[name] is None else float(f"{row[name]:.4g}")
                rows.append(row)
    return rows, torch.cat(raws)


def _thumbnails(maps: Maps, chosen: list[int], side: int, progress: Callable[[int, int], None]) -> Iterator[str]:
    """JPEGs of the crops in base64; empty where there is none."""
    height, width = maps.preprocess.crop
    shrink = side / max(height, width)
    size = (max(round(width * shrink), 1), max(round(height * shrink), 1))
    for n, index in enumerate(chosen):
        progress(n, len(chosen))
        try:
            view = maps.view(index)
        except InputError:  # its row says so
            yield ""
            continue
        buffer = io.BytesIO()
        to_picture(view.permute(1, 2, 0)).resize(size).save(buffer, "JPEG", quality=75)
        yield base64.b64encode(buffer.getvalue()).decode()


def _bytes(maps: Tensor) -> str:
    """Display maps at their own resolution, a byte a position, in base64: max(·, 0) from its least to its largest value."""
    positive = maps.nan_to_num(0.0, 0.0, 0.0).clamp_min(0).flatten(1)
    least, most = positive.amin(1, keepdim=True), positive.amax(1, keepdim=True)
    levels = ((positive - least) / (most - least).clamp_min(1e-30) * 255).round().to(torch.uint8)
    return base64.b64encode(bytes(levels.reshape(-1).tolist())).decode()


def _rounded(values: Tensor, good: Tensor) -> list[float | None]:
    return [round(v, 4) if ok else None for v, ok in zip(values.tolist(), good.tolist(), strict=True)]
