"""``shapleycam export``: a classifier and its explanation in one file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .._version import __version__
from ..explainer import Explainer
from ..export import Artefact, export
from ..export.check import TOLERANCE
from ..model.zoo import DEFAULT_MODEL, load_classifier
from .explain import print_json


@dataclass(frozen=True, slots=True)
class Options:
    """What the command was asked for; see ``shapleycam export --help``."""

    path: Path
    format: str = "auto"
    model: str = DEFAULT_MODEL
    weights: str | None = None
    classes: Path | None = None
    layer: str = "auto"
    method: str = "shapleycam"
    utility: str = "rest"
    engine: str = "auto"
    nodes: int | str | None = None
    baseline: str = "zero"
    targets: str = "predicted"
    maps: str = "image"
    outputs: tuple[str, ...] = ("prediction", "saliency_map")
    pixels: bool = False
    resize: bool = False
    dynamic_size: bool = False
    opset: int | None = None
    runtimes: tuple[str, ...] = ()
    tolerance: float = TOLERANCE
    overwrite: bool = False
    json: bool = False


def run_export(options: Options, results: Console, notes: Console) -> int:
    """Write the artefact and say what it is.

    Raises:
        ShapleyCamError: it cannot be made; nothing was written.
    """
    with notes.status(f"loading {escape(options.model)}"):
        classifier = load_classifier(options.model, weights=options.weights, classes=options.classes)
    explainer = Explainer(
        classifier.model,
        layer=options.layer,
        method=options.method,
        utility=options.utility,
        engine=options.engine,
        nodes=options.nodes,
        baseline=options.baseline,
    )
    recipe = classifier.preprocess
    # What the artefact is compared on: pictures of soft spots, for networks that find nothing in plain noise.
    coarse = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    spots = torch.nn.functional.interpolate(coarse, recipe.crop, mode="bicubic").clamp(0, 1)
    images = recipe.normalise((spots * 255).round().to(torch.uint8))
    with notes.status(f"exporting {escape(str(options.path))}"):
        artefact = export(
            explainer,
            images,
            options.path,
            format=options.format,
            targets=options.targets,
            maps=options.maps,
            outputs=options.outputs,
            preprocess=recipe,
            pixels=options.pixels,
            resize=options.resize,
            dynamic_size=options.dynamic_size,
            classes=[names[0] for names in classifier.classes],
            name=classifier.name,
            opset=options.opset,
            runtimes=options.runtimes,
            tolerance=options.tolerance,
            overwrite=options.overwrite,
        )
    if options.json:
        print_json(_content(artefact), results)
    else:
        _show(artefact, results)
    return 0


def _content(artefact: Artefact) -> dict[str, Any]:
    about = asdict(artefact.metadata)
    return {"shapleycam": __version__, "path": str(artefact.path), "bytes": artefact.path.stat().st_size, **about}


def _show(artefact: Artefact, results: Console) -> None:
    about = artefact.metadata
    table = Table("", "name", "dtype", "shape", "content", box=None, pad_edge=False, header_style="bold")
    for kind, ports in (("input", about.inputs), ("output", about.outputs)):
        for port in ports:
            table.add_row(kind, port.name, port.dtype, escape(f"[{', '.join(map(str, port.shape))}]"), port.content)
    results.print(table)
    nodes = "" if about.nodes is None else f", {about.nodes} nodes"
    explained = f"{about.method} of {about.utility} at {', '.join(about.layer)}, {about.engine}{nodes}"
    results.print(escape(f"{about.model}: {explained}, targets: {about.targets}"))
    for runtime, checks in about.checks.items():
        counts = " and ".join(map(str, dict.fromkeys(checks["batches"])))
        sizes = ", ".join(dict.fromkeys("x".join(map(str, size)) for size in checks["sizes"]))
        results.print(
            f"in {runtime} compared with float64 on {counts} images of {sizes}: "
            f"logits off by {checks['logits']:.1e}, maps by {checks['maps']:.1e}, relative"
        )
    size = artefact.path.stat().st_size / 1e6
    results.print(escape(f"{artefact.path.resolve()}: {about.format}, {size:.1f} MB"), soft_wrap=True)
