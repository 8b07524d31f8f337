"""The table of an evaluation: printed, and as CSV, JSON and a plot."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .._version import __version__
from ..data.files import write_whole
from ..errors import InputError
from ..evaluate.paper import COLUMNS, Preset, paper_accuracy, paper_row
from ..evaluate.run import Outcome, Protocol
from ..methods.table import METHODS
from ..model.zoo import Classifier
from ..optional import need

_ARROWS = {"AD": "↓", "Coh": "↑", "Com": "↓", "ADCC": "↑", "IC": "↑", "ADD": "↑"}


@dataclass(frozen=True, slots=True)
class Section:
    """One network's evaluation."""

    name: str
    classifier: Classifier
    protocol: Protocol
    outcome: Outcome
    pictures: int
    device: str
    preset: Preset | None = None

    def paper(self, method: str) -> dict[str, float] | None:
        """The paper's row in percent."""
        return None if self.preset is None else paper_row(self.preset.network, method)

    @property
    def accuracy(self) -> float | None:
        """Top-1 in percent; None without labels that the model knows."""
        return 100 * self.outcome.correct / self.outcome.labelled if self.outcome.labelled else None


def print_report(sections: Sequence[Section], results: Console) -> None:
    """The tables, in percent."""
    for section in sections:
        compared = section.preset is not None
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("method", no_wrap=True)
        for column in COLUMNS:
            table.add_column(f"{column} {_ARROWS[column]}", justify="right", no_wrap=True)
            if compared:
                table.add_column("paper", justify="right", no_wrap=True)
                table.add_column("diff.", justify="right", no_wrap=True)
        for method, row in section.outcome.rows.items():
            cells = []
            theirs = section.paper(method)
            for column in COLUMNS:
                value = 100 * row[column]
                cells.append(f"{value:.2f}")
                if compared:
                    cells += ["", ""] if theirs is None else [f"{theirs[column]:.2f}", f"{value - theirs[column]:+.2f}"]
            table.add_row(METHODS[method].title, *cells)
        results.print(f"[bold]{escape(section.name)}[/]")
        results.print(table)
        results.print(escape(_summary(section)), soft_wrap=True)
        results.print()


def _summary(section: Section) -> str:
    outcome, protocol = section.outcome, section.protocol
    parts = [f"{outcome.images} of {section.pictures} pictures, in percent"]
    if outcome.unreadable:
        parts.append(f"{len(outcome.unreadable)} unreadable")
    if outcome.skipped:
        parts.append(f"{outcome.skipped} left out for NaN or Inf")
    if section.accuracy is not None:
        paper = "" if section.preset is None else f" (paper {paper_accuracy(section.preset.network):.2f})"
        parts.append(f"top-1 {section.accuracy:.2f}{paper} of {outcome.labelled} labelled")
    if outcome.unknown_labels:
        names = ", ".join(sorted(outcome.unknown_labels)[:5]) + (", …" if len(outcome.unknown_labels) > 5 else "")
        parts.append(f"{sum(outcome.unknown_labels.values())} with labels that are no class of the model ({names})")
    used = section.classifier
    parts.append(f"{used.name} ({used.weights}), {used.preprocess}")
    parts.append(f"layer {', '.join(outcome.layers)}, utility {protocol.utility}, engine {outcome.engine}, {section.device}")
    return "; ".join(parts) + "."


def write_report(sections: Sequence[Section], folder: Path, missing: Sequence[str], progress: Console) -> list[Path]:
    """table.csv, table.json and table.png; returns those that were written (no picture without matplotlib)."""
    files = [folder / "table.csv", folder / "table.json"]
    write_whole(files[0], _csv(sections))
    write_whole(files[1], json.dumps(content(sections, missing), indent=1, ensure_ascii=False) + "\n")
    try:
        files.append(_plot(sections, folder / "table.png"))
    except InputError as error:
        progress.print(f"[yellow]no plot:[/] {escape(str(error))}")
    return files


def _csv(sections: Sequence[Section]) -> str:
    text = io.StringIO()
    paper = any(section.preset for section in sections)
    extra = [f"{kind}_{column}" for kind in ("paper", "difference") for column in COLUMNS] if paper else []
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["network", "method", "images", *COLUMNS, *extra])
    for section in sections:
        for method, row in section.outcome.rows.items():
            ours, theirs = [100 * row[column] for column in COLUMNS], section.paper(method)
            cells: list[Any] = [section.name, METHODS[method].title, section.outcome.images, *ours]
            if paper:
                cells += [""] * 12 if theirs is None else [theirs[column] for column in COLUMNS]
                cells += [] if theirs is None else [a - theirs[c] for a, c in zip(ours, COLUMNS, strict=True)]
            writer.writerow(cells)
    return text.getvalue()


def content(sections: Sequence[Section], missing: Sequence[str]) -> dict[str, Any]:
    """All that the tables show, and the conditions, for a JSON document; a number that is not finite is null."""
    return {
        "conditions": {
            "shapleycam": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "unit": "percent",
        "missing": list(missing),
        "networks": [
            {
                "network": section.name,
                "model": section.classifier.name,
                "weights": section.classifier.weights,
                "preprocess": str(section.classifier.preprocess),
                "layers": section.outcome.layers,
                "utility": section.protocol.utility,
                "engine": section.outcome.engine,
                "nodes": section.protocol.nodes,
                "baseline": section.protocol.baseline,
                "batch_size": section.protocol.batch_size,
                "seed": section.protocol.seed,
                "device": section.device,
                "pictures": section.pictures,
                "images": section.outcome.images,
                "skipped": section.outcome.skipped,
                "unreadable": [{"name": name, "reason": reason} for name, reason in section.outcome.unreadable],
                "top1": section.accuracy,
                "labelled": section.outcome.labelled,
                "unknown_labels": section.outcome.unknown_labels,
                "rows": {
                    method: {
                        **{column: _number(100 * row[column]) for column in COLUMNS},
                        **({} if (theirs := section.paper(method)) is None else {"paper": theirs}),
                    }
                    for method, row in section.outcome.rows.items()
                },
            }
            for section in sections
        ],
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plot(sections: Sequence[Section], file: Path) -> Path:
    figures = need("matplotlib.figure", "evaluate")
    methods = list(dict.fromkeys(method for section in sections for method in section.outcome.rows))
    figure = figures.Figure(figsize=(13, 1.2 + 0.28 * len(methods) * max(1, 0.6 * len(sections))), layout="constrained")
    axes = figure.subplots(1, len(COLUMNS), sharey=True)
    height = 0.8 / len(sections)
    for axis, column in zip(axes, COLUMNS, strict=True):
        for number, section in enumerate(sections):
            values = [100 * section.outcome.rows[method][column] for method in methods]
            places = [i + (number - (len(sections) - 1) / 2) * height for i in range(len(methods))]
            axis.barh(places, values, height, label=section.name)
            paper = [(place, row[column]) for place, m in zip(places, methods, strict=True) if (row := section.paper(m))]
            if paper:
                axis.plot([v for _, v in paper], [p for p, _ in paper], "k|", label="paper" if number == 0 else None)
        axis.set_title(f"{column} {_ARROWS[column]}")
        axis.set_xlabel("%")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(methods)), [METHODS[method].title for method in methods])
    axes[0].invert_yaxis()
    if len(sections) > 1 or sections[0].preset is not None:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(file, dpi=120)
    return file
