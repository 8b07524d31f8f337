"""``shapleycam explain``: files in, overlays and a table out."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from ..data.images import read_image, to_picture
from ..errors import InputError, TargetError
from ..explainer import Explainer
from ..model.zoo import DEFAULT_MODEL, Classifier, load_classifier
from ..optional import need

if TYPE_CHECKING:
    from ..explanation import Explanation


@dataclass(frozen=True, slots=True)
class Options:
    """What the command was asked for; see ``shapleycam explain --help``."""

    model: str = DEFAULT_MODEL
    weights: str | None = None
    classes: Path | None = None
    layer: str | tuple[str, ...] = "auto"
    method: str = "shapleycam"
    utility: str = "rest"
    engine: str = "auto"
    backend: str = "auto"
    target: str | None = None
    topk: int = 1
    device: str = "auto"
    batch_size: int | None = None
    colormap: str = "jet"
    alpha: float = 0.5
    out: Path = Path("shapleycam-out")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: an explained class of an image, or an image that could not be explained (``problem``)."""

    path: Path
    label: str = ""
    index: int = -1
    probability: float = 0.0
    engine: str = ""
    backend: str = ""
    milliseconds: float = 0.0
    overlay: Path | None = None
    problem: str = ""


def pick_device(name: str) -> torch.device:
    """ "auto" is the first CUDA device, else the CPU.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def explain_files(paths: Sequence[Path], options: Options, results: Console, progress: Console) -> int:
    """Explain every file that can be read; returns the exit status, 1 if there was one that could not.

    Raises:
        ShapleyCamError: nothing can be explained at all (model, layer, target, backend, …).
    """
    need("PIL", "cli")
    if options.target is not None and options.topk > 1:
        raise InputError("--target and --topk exclude each other: one class by name, or the k most probable.")
    device = pick_device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    with progress.status(f"loading {escape(options.model)}"):
        classifier = load_classifier(options.model, weights=options.weights, classes=options.classes, device=device)
        target = None if options.target is None else classifier.find_class(options.target)
        explainer = Explainer(
            classifier.model,
            layer=options.layer if isinstance(options.layer, str) else list(options.layer),
            method=options.method,
            utility=options.utility,
            engine=options.engine,
            backend=options.backend,
        )
    size = options.batch_size or (1 if device.type == "cpu" else 8)
    names, rows = Names(options.out), []
    prepared = False
    with Progress(console=progress, transient=True) as bar:
        task = bar.add_task("explaining", total=len(paths))
        for batch, views in _batches(paths, classifier, size):
            if isinstance(views, str):
                rows.append(Row(batch[0], problem=views))
            else:
                views = views.to(device)
                if not prepared:  # the study of the model is no part of an image's time
                    explainer.prepare(classifier.preprocess.normalise(views))
                    prepared = True
                rows += _explain(batch, views, classifier, explainer, target, options, names)
            bar.update(task, advance=len(batch))
    failed = sum(bool(row.problem) for row in rows)
    results.print(table_of(rows, results.width))
    results.print(
        escape(f"{classifier.name} ({classifier.weights}), {classifier.preprocess}, {device}; {explainer!r}"),
        soft_wrap=True,
    )
    results.print(
        escape(f"{len(paths) - failed} explained, {failed} failed. Pictures: {options.out.resolve()}"), soft_wrap=True
    )
    return 1 if failed else 0


def _batches(paths: Sequence[Path], classifier: Classifier, size: int) -> Iterator[tuple[list[Path], Tensor | str]]:
    """Batches of the views the network sees, uint8 [n, 3, H, W]; an unreadable file comes alone, with the reason."""
    held: list[Path] = []
    views: list[Tensor] = []
    for path in paths:
        try:
            view = classifier.preprocess.view(read_image(path))
        except InputError as error:
            yield [path], str(error).removeprefix(f"{path} ")
            continue
        held.append(path)
        views.append(view)
        if len(held) == size:
            yield held, torch.stack(views)
            held, views = [], []
    if held:
        yield held, torch.stack(views)


def _explain(
    paths: list[Path],
    views: Tensor,
    classifier: Classifier,
    explainer: Explainer,
    target: int | None,
    options: Options,
    names: Names,
) -> list[Row]:
    """One batch: explain, draw, write; a row per image and class, or one that says why there is no map."""
    images = classifier.preprocess.normalise(views)
    targets: Tensor | int | None = target
    if options.topk > 1:
        with torch.inference_mode():
            logits = classifier.model(images)
        if options.topk > logits.shape[1]:
            raise TargetError(f"--topk {options.topk}: {classifier.name} has {logits.shape[1]} classes.")
        targets = logits.topk(options.topk, 1).indices
    started = time.perf_counter()
    explanation = explainer(images, targets)
    finite = explanation.finite.tolist()  # waits for the device
    drawn = explanation.overlay(views, colormap=options.colormap, alpha=options.alpha).cpu()
    milliseconds = (time.perf_counter() - started) * 1e3 / len(paths)
    rows = []
    for n, path in enumerate(paths):
        if not finite[n]:
            rows.append(Row(path, problem="The map is not finite: the activations of the network hold NaN or Inf."))
            continue
        for m, (label, probability, index) in enumerate(labels(classifier, explanation, n)):
            rank = f"{m + 1}-" if options.topk > 1 else ""
            file = names.take(f"{path.stem}-{explanation.diagnostics.method}-{rank}{label}")
            to_picture(drawn[n, m] if options.topk > 1 else drawn[n]).save(file)
            used = explanation.diagnostics
            rows.append(Row(path, label, index, probability, used.engine, used.backend, milliseconds, file))
    return rows


def labels(classifier: Classifier, explanation: Explanation, n: int) -> list[tuple[str, float, int]]:
    """(class name, probability, class index) of every class explained for image ``n``."""
    assert explanation.targets is not None
    indices = explanation.targets[n].reshape(-1).tolist()
    probabilities = explanation.probabilities[n].reshape(-1).tolist()
    return [(classifier.class_name(i), p, i) for i, p in zip(indices, probabilities, strict=True)]


class Names:
    """File names in one folder that are safe, readable, and never the same twice in one run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._taken: set[str] = set()

    def take(self, text: str) -> Path:
        """A PNG in the folder, named after ``text``; with a number where that name was taken already."""
        base = re.sub(r"[^\w.+-]+", "_", text).strip("_")[:120]
        name, count = base, 2
        while name.lower() in self._taken:
            name, count = f"{base}-{count}", count + 1
        self._taken.add(name.lower())
        return self._folder / f"{name}.png"


def table_of(rows: Sequence[Row], width: int) -> Table:
    """The rows; on a narrow terminal without the columns that can be had elsewhere."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    wide = width >= 120
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    table.add_column("engine", overflow="fold")
    table.add_column("backend", no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    if wide:
        table.add_column("overlay", overflow="fold")
    for row in rows:
        image = escape(str(row.path) if wide else row.path.name)
        if row.problem:
            table.add_row(image, f"[red]{escape(row.problem)}[/]")
            continue
        label = f"{row.label} ({row.index})" if wide else row.label
        cells = [image, escape(label), f"{row.probability:.3f}", row.engine, row.backend, f"{row.milliseconds:.1f}"]
        table.add_row(*cells, *([escape(row.overlay.name)] if wide and row.overlay else []))
    return table
