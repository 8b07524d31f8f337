"""``shapleycam maps``: what a result holds, as a table, a contact sheet and a page."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..attribute.gallery import gallery
from ..attribute.maps import Maps, open_maps
from ..attribute.summary import Summary, first, pick, summarise
from ..data.files import write_whole
from ..errors import InputError
from .attribute import printable
from .demo import Tile, contact_sheet
from .explain import print_json
from .progress import Steps

_SHOWN = 15  # classes and errors in the table
_ON_SHEET = 12  # pictures on the contact sheet, two tiles each


@dataclass(frozen=True, slots=True)
class Options:
    """What the command was asked for; see ``shapleycam maps --help``."""

    folder: Path
    out: Path | None
    source: str | None
    limit: int
    groups: int
    pictures: bool
    json: bool


def run_maps(options: Options, results: Console, progress: Console) -> int:
    """Show a result; returns the exit status.

    Raises:
        InputError: no result.
    """
    maps = open_maps(options.folder, options.source)
    if options.source is not None:
        _ = maps.source  # a wrong --source is an error, and not a page without pictures
    out = options.out or options.folder
    out.mkdir(parents=True, exist_ok=True)
    with progress.status("reading the maps"):
        summary = summarise(maps)
    pictures = options.pictures and _readable(maps, progress)
    files = []
    with Steps(progress, "the page", "pictures") as steps:
        page = gallery(
            maps,
            summary,
            limit=options.limit,
            count=options.groups,
            pictures=pictures,
            title=os.fspath(options.folder),
            progress=steps.at,
        )
    files.append(out / "gallery.html")
    write_whole(files[0], page)
    if pictures and summary.statuses.get("ok"):
        files.append(_sheet(maps, out / "contact-sheet.jpg"))
    if options.json:
        print_json({**content(maps, summary), "files": [str(file.resolve()) for file in files]}, results)
    else:
        _print(maps, summary, results)
    for file in files:
        (progress if options.json else results).print(f"written: {escape(str(file.resolve()))}", soft_wrap=True)
    return 0


def content(maps: Maps, summary: Summary) -> dict[str, Any]:
    """The summary for a JSON document."""
    return {
        "job": maps.job["key"],
        "pictures": summary.pictures,
        "rows": summary.rows,
        "statuses": summary.statuses,
        "errors": summary.errors,
        "concentration": round(summary.concentration, 4),
        "entropy": round(summary.entropy, 4),
        "classes": [
            {"class": each.target, "name": each.name, "pictures": each.count, "probability": round(each.probability, 4)}
            for each in summary.classes
        ],
    }


def _print(maps: Maps, summary: Summary, results: Console) -> None:
    key = maps.job["key"]
    statuses = ", ".join(f"{count} {escape(kind)}" for kind, count in summary.statuses.items())
    results.print(f"{summary.rows} of {summary.pictures} pictures are done: {statuses}.", soft_wrap=True)
    results.print(
        f"{escape(key['model'])}, {key['method']}, utility {key['utility']}; in the strongest tenth of the positions lies "
        f"{summary.concentration:.2f} of a map, and its entropy is {summary.entropy:.2f} of the largest, on average.",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("class", "pictures", "probability", "mean map, strongest at"):
        table.add_column(name, justify="right" if name in ("pictures", "probability") else "left")
    for each in summary.classes[:_SHOWN]:
        y, x = divmod(int(each.mean.argmax()), each.mean.shape[1])
        height, width = each.mean.shape
        where = f"row {y + 1} of {height}, column {x + 1} of {width}"
        table.add_row(escape(f"{each.name} ({each.target})"), str(each.count), f"{each.probability:.3f}", where)
    results.print(table)
    if len(summary.classes) > _SHOWN:
        results.print(f"… and {len(summary.classes) - _SHOWN} more classes.")
    for reason, count in list(summary.errors.items())[:_SHOWN]:
        results.print(f"[yellow]{count} ×[/] {escape(printable(reason))}", soft_wrap=True)


def _readable(maps: Maps, progress: Console) -> bool:
    """Whether the source is still there."""
    try:
        return bool(maps.source)
    except InputError as error:
        progress.print(f"[yellow]without pictures:[/] {escape(str(error))}", soft_wrap=True)
        return False


def _sheet(maps: Maps, file: Path) -> Path:
    """Some pictures beside their overlays."""
    good = [index for index in pick(len(maps), 4 * _ON_SHEET) if maps[index].status == "ok"]
    tiles: list[Tile] = []
    for index in [good[i] for i in pick(len(good), _ON_SHEET)]:
        row = maps[index]
        try:
            view, drawn = maps.view(index), maps.overlay(index)
        except InputError:  # gone since
            continue
        target, chance = first(row.target), first(row.probability)
        name = maps.class_name(int(target or 0))
        tiles.append(Tile(view.permute(1, 2, 0), row.key[-30:].encode("ascii", "replace").decode()))
        tiles.append(Tile(drawn if drawn.ndim == 3 else drawn[0], f"{name} ({chance:.2f})"))
    while len(tiles) % 4:
        tiles += [Tile(tiles[0].pixels * 0 + 255, "")] * 2
    contact_sheet([tiles[i : i + 4] for i in range(0, len(tiles), 4)]).save(file, quality=90)
    return file
