"""A profile as one picture: where the time goes, and how near each step is to the pace of a copy."""

from __future__ import annotations

import statistics
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..optional import need
from .result import Profile
from .stages import STAGES

_COLOURS = ("#b8c4d0", "#8a9bb0", "#d95f02", "#1b6ca8", "#4a9c3b", "#c9a227", "#7b5ea7")
_FORMATS = (".png", ".svg", ".pdf")


def check(path: str | PathLike[str]) -> Path:
    """The path, where a picture can be drawn there; asked before anything is measured.

    Raises:
        InputError: as :func:`draw`.
    """
    target = Path(path)
    if target.suffix.lower() not in _FORMATS:
        raise InputError(f"{path}: a picture is a {', '.join(_FORMATS)} file.")
    need("matplotlib", "evaluate")
    return target


def draw(profile: Profile, path: str | PathLike[str]) -> Path:
    """Stacked bars of the stages' medians in plain forward passes, and a roofline of the steps that move memory.

    Args:
        profile: with at least one row.
        path: a .png, .svg or .pdf file.

    Raises:
        InputError: another ending, a file that cannot be written, or matplotlib is not installed.
    """
    target = check(path)
    matplotlib = need("matplotlib", "evaluate")
    figure = need("matplotlib.figure", "evaluate").Figure(
        figsize=(12, 2.2 + 0.45 * max(4, len(profile.rows))), layout="constrained"
    )
    bars, roof = figure.subplots(1, 2, width_ratios=(3, 2))
    _bars(bars, profile)
    _roofline(roof, profile)
    known = profile.conditions
    figure.suptitle(
        f"{known.get('device')}, torch {known.get('torch')}, {known.get('threads')} threads, "
        f"{len(profile.rows[0].forward)} rounds, commit {known.get('commit')}",
        fontsize=10,
    )
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        try:
            figure.savefig(target, dpi=120)
        except OSError as error:
            raise InputError(f"The picture cannot be written to {path}: {error.strerror or error}.") from error
    return target


def _bars(axes: Any, profile: Profile) -> None:
    places = range(len(profile.rows))
    left = [0.0] * len(profile.rows)
    for name, colour in zip((*STAGES, "call"), (*_COLOURS, "#555555"), strict=True):
        widths = []
        for row in profile.rows:
            forward = statistics.median(row.forward)
            widths.append(sum(stage.p50 for stage in row.stages if stage.name == name) / forward)
        if any(widths):
            axes.barh(places, widths, left=left, color=colour, label=name, height=0.7)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, row in zip(places, profile.rows, strict=True):
        limit, label = row.limit / statistics.median(row.forward), None if place else "physical limit"
        axes.plot([limit, limit], [place - 0.42, place + 0.42], color="black", lw=1.5, label=label)
        axes.text(max(left[place], limit) + 0.01, place, f" {row.over_forward:.3f}", va="center", fontsize=8)
    axes.set_yticks(places, [row.label for row in profile.rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="plain forward passes", xlim=(0, 1.12 * max(left)), title="Where the time goes")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, frameon=False)


def _roofline(axes: Any, profile: Profile) -> None:
    axes.set_title("Steps that move memory")
    for name, colour in zip(STAGES, _COLOURS, strict=True):
        found = [s for row in profile.rows for s in row.stages if s.name == name and s.bytes]
        if found:
            axes.scatter([s.bytes for s in found], [(s.bandwidth or 0) / 1e9 for s in found], color=colour, label=name)
    axes.axhline(max(row.copy for row in profile.rows) / 1e9, color="black", lw=1.5, label="copy_, read and written")
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter("")
    axes.set(xlabel="bytes read and written, each tensor once", ylabel="GB/s")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)
