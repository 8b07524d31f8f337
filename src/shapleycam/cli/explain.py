"""``shapleycam explain``: files in, overlays and a table out."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from .._version import __version__
from ..data.images import to_picture
from ..errors import InputError, TargetError
from ..explainer import Explainer
from ..model.zoo import DEFAULT_MODEL, Classifier, load_classifier, pick_device
from ..optional import need
from .progress import Steps
from .sources import Source, sources

if TYPE_CHECKING:
    from ..explanation import Explanation

_LONGEST = 200  # bytes of a file name, of the 255 that file systems take


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
    nodes: int | str | None = None
    baseline: str = "zero"
    backend: str = "auto"
    target: str | None = None
    topk: int = 1
    device: str = "auto"
    batch_size: int | None = None
    colormap: str = "jet"
    alpha: float = 0.5
    out: Path = Path("shapleycam-out")
    recursive: bool = False
    json: bool = False

    def differences(self) -> list[str]:
        """What makes an overlay differ from one of the default settings and the same method, for its file name."""
        usual = Options()
        parts = [] if self.model == usual.model else [self.model]
        if self.weights is not None:
            parts.append(Path(self.weights).stem)
        if self.layer != usual.layer:
            parts.append(self.layer if isinstance(self.layer, str) else "+".join(self.layer))
        for name in ("utility", "engine", "nodes", "baseline", "colormap"):
            value = getattr(self, name)
            if value != getattr(usual, name):
                parts.append(f"{name}{value}" if name in ("nodes", "baseline") else value)
        return parts if self.alpha == usual.alpha else [*parts, f"alpha{self.alpha:g}"]


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

    def content(self) -> dict[str, Any]:
        """The row for a JSON document: every key in every row, null where there is nothing to tell."""
        told = not self.problem
        return {
            "image": str(self.path),
            "class": self.label if told else None,
            "index": self.index if told else None,
            "probability": self.probability if told and math.isfinite(self.probability) else None,
            "engine": self.engine if told else None,
            "backend": self.backend if told else None,
            "milliseconds": round(self.milliseconds, 3) if told else None,
            "overlay": None if self.overlay is None else str(self.overlay),
            "problem": self.problem or None,
        }


def explain_files(arguments: Sequence[str], options: Options, results: Console, progress: Console) -> int:
    """Explain every image that can be read; returns the exit status.

    It is 1 if an image could not be explained, and 130 after Ctrl-C, when the table has the images that were done.

    Args:
        arguments: files, folders, or "-" for an image on standard input.
        options: see there.
        results: gets the table, or the JSON document alone.
        progress: gets the rest.

    Raises:
        ShapleyCamError: nothing can be explained at all (model, layer, target, backend, …).
    """
    need("PIL", "cli")
    if options.target is not None and options.topk > 1:
        raise InputError("--target and --topk exclude each other: one class by name, or the k most probable.")
    device = pick_device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    images = sources(arguments, recursive=options.recursive, out=options.out)
    with progress.status(f"loading {escape(options.model)}"):
        classifier = load_classifier(options.model, weights=options.weights, classes=options.classes, device=device)
        target = None if options.target is None else classifier.find_class(options.target)
        explainer = Explainer(
            classifier.model,
            layer=options.layer if isinstance(options.layer, str) else list(options.layer),
            method=options.method,
            utility=options.utility,
            engine=options.engine,
            nodes=options.nodes,
            baseline=options.baseline,
            backend=options.backend,
        )
    size = options.batch_size or (1 if device.type == "cpu" else 8)
    names, rows, done, interrupted = Names(options.out), [], 0, False
    prepared = False
    try:
        with Steps(progress, "explaining", "images") as steps:
            steps.at(0, len(images))
            for batch, views in _batches(images, classifier, size):
                if isinstance(views, str):
                    rows.append(Row(batch[0].path, problem=views))
                else:
                    views = views.to(device)
                    if not prepared:  # the study of the model is no part of an image's time
                        explainer.prepare(classifier.preprocess.normalise(views))
                        prepared = True
                    rows += _explain(batch, views, classifier, explainer, target, options, names)
                done += len(batch)
                steps.at(done, len(images))
    except KeyboardInterrupt:
        interrupted = True
    failed = sum(bool(row.problem) for row in rows)
    used = {
        "model": classifier.name,
        "weights": classifier.weights,
        "preprocess": str(classifier.preprocess),
        "device": str(device),
        "explainer": repr(explainer),
    }
    said = f"{done - failed} explained, {failed} failed"
    if names.replaced:
        said += f", {names.replaced} picture{'s' if names.replaced > 1 else ''} of an earlier run replaced"
    if interrupted:
        said = f"Interrupted after {done} of {len(images)} images: {said}"
    said += f". Pictures: {options.out.resolve()}"
    if options.json:
        counts = {"images": len(images), "explained": done - failed, "failed": failed, "interrupted": interrupted}
        content = {"shapleycam": __version__, **used, **counts, "rows": [row.content() for row in rows]}
        print_json(content, results)
        progress.print(escape(said))
    else:
        results.print(table_of(rows, results.width))
        results.print(escape("{model} ({weights}), {preprocess}, {device}; {explainer}".format(**used)), soft_wrap=True)
        results.print(escape(said), soft_wrap=True)
    if interrupted:
        return 130
    return 1 if failed else 0


def print_json(content: dict[str, Any], results: Console) -> None:
    """One document on standard output, in ASCII, as file names may hold what no encoding has."""
    results.file.write(json.dumps(content, indent=1, allow_nan=False) + "\n")
    results.file.flush()


def _batches(images: Sequence[Source], classifier: Classifier, size: int) -> Iterator[tuple[list[Source], Tensor | str]]:
    """Batches of the views the network sees, uint8 [n, 3, H, W]; an unreadable file comes alone, with the reason."""
    held: list[Source] = []
    views: list[Tensor] = []
    for image in images:
        try:
            view = classifier.preprocess.view(image.read())
        except InputError as error:
            yield [image], str(error).removeprefix(f"{image.path} ")
            continue
        held.append(image)
        views.append(view)
        if len(held) == size:
            yield held, torch.stack(views)
            held, views = [], []
    if held:
        yield held, torch.stack(views)


def _explain(
    images: list[Source],
    views: Tensor,
    classifier: Classifier,
    explainer: Explainer,
    target: int | None,
    options: Options,
    names: Names,
) -> list[Row]:
    """One batch: explain, draw, write; a row per image and class, or one that says why there is no map."""
    inputs = classifier.preprocess.normalise(views)
    targets: Tensor | int | None = target
    if options.topk > 1:
        with torch.inference_mode():
            logits = classifier.model(inputs)
        if options.topk > logits.shape[1]:
            raise TargetError(f"--topk {options.topk}: {classifier.name} has {logits.shape[1]} classes.")
        targets = logits.topk(options.topk, 1).indices
    started = time.perf_counter()
    explanation = explainer(inputs, targets)
    finite = explanation.finite.tolist()  # waits for the device
    drawn = explanation.overlay(views, colormap=options.colormap, alpha=options.alpha).cpu()
    milliseconds = (time.perf_counter() - started) * 1e3 / len(images)
    rows = []
    for n, image in enumerate(images):
        if not finite[n]:
            rows.append(Row(image.path, problem="The map is not finite: the activations of the network hold NaN or Inf."))
            continue
        for m, (label, probability, index) in enumerate(labels(classifier, explanation, n)):
            rank = f"{m + 1}-" if options.topk > 1 else ""
            parts = [image.stem, explanation.diagnostics.method, *options.differences(), f"{rank}{label}"]
            file = names.take("-".join(parts))
            to_picture(drawn[n, m] if options.topk > 1 else drawn[n]).save(file)
            used = explanation.diagnostics
            engine = used.engine if used.nodes is None else f"{used.engine}, {used.nodes} node{'s' * (used.nodes > 1)}"
            rows.append(Row(image.path, label, index, probability, engine, used.backend, milliseconds, file))
    return rows


def labels(classifier: Classifier, explanation: Explanation, n: int) -> list[tuple[str, float, int]]:
    """(class name, probability, class index) of every class explained for image ``n``."""
    assert explanation.targets is not None
    indices = explanation.targets[n].reshape(-1).tolist()
    probabilities = explanation.probabilities[n].reshape(-1).tolist()
    return [(classifier.class_name(i), p, i) for i, p in zip(indices, probabilities, strict=True)]


class Names:
    """File names in one folder that are safe, readable, and never the same twice in one run.

    Attributes:
        replaced: how many of the names were those of files that had been there before.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._taken: set[str] = set()
        self.replaced = 0

    def take(self, text: str) -> Path:
        """A PNG in the folder, named after ``text``; with a number where that name was taken already."""
        base = re.sub(r"[^\w.+-]+", "_", text).strip("_")
        if len(base.encode()) > _LONGEST:
            digest = hashlib.sha256(base.encode()).hexdigest()[:8]  # long names that differ at their end stay apart
            base = f"{base.encode()[: _LONGEST - 9].decode(errors='ignore')}-{digest}"
        name, count = base, 2
        while name.lower() in self._taken:
            name, count = f"{base}-{count}", count + 1
        self._taken.add(name.lower())
        file = self._folder / f"{name}.png"
        self.replaced += file.exists()
        return file


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
