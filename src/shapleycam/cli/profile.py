"""``shapleycam profile``: a table of stages and ratios for every combination that was asked for."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from ..errors import InputError, ShapleyCamError
from ..explainer import Explainer
from ..export import export
from ..export import load as load_artefact
from ..model.zoo import DEFAULT_MODEL, load_classifier, pick_device
from ..profiling import Case, Profile, compare, load, profile_cases
from ..profiling.picture import check, draw
from .progress import Steps

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
MODES = ("eager", "compiled", "captured", "exported")


@dataclass(frozen=True, slots=True)
class Options:
    """What the command was asked for; see ``shapleycam profile --help``. Tuples are combined with one another."""

    models: tuple[str, ...] = (DEFAULT_MODEL,)
    weights: str | None = None
    layer: str = "auto"
    method: str = "shapleycam"
    utility: str = "rest"
    batches: tuple[int, ...] = (1, 8)
    dtypes: tuple[str, ...] = ("float32",)
    layouts: tuple[str, ...] = ("NCHW",)
    engines: tuple[str, ...] = ("auto",)
    backends: tuple[str, ...] = ("auto",)
    modes: tuple[str, ...] = ("eager",)
    size: int | None = None
    rounds: int = 20
    device: str = "auto"
    display: bool = True
    overlay: bool = True
    trace: Path | None = None
    picture: Path | None = None
    out: Path | None = None
    json: bool = False


def run_profile(options: Options, results: Console, notes: Console) -> int:
    """Measure and print; returns 1 where no combination could be measured, else 0."""
    for name, wanted, known in (
        ("--dtype", options.dtypes, DTYPES),
        ("--layout", options.layouts, LAYOUTS),
        ("--mode", options.modes, MODES),
    ):
        unknown = [value for value in wanted if value not in known]
        if unknown:
            raise InputError(f"{name} {','.join(unknown)}: expected {', '.join(known)}, with commas between several.")
    if options.picture is not None:
        check(options.picture)
    for file in (options.picture, options.trace, options.out):
        if file is not None and not file.parent.is_dir():
            raise InputError(f"{file}: there is no folder {file.parent}.")
        if file is not None and file.is_dir():
            raise InputError(f"{file} is a folder: name a file.")
    device = pick_device(options.device)
    cases, left_out = _cases(options, device, notes)
    for told in left_out:
        notes.print(f"[yellow]left out:[/] {escape(told)}")
    if not cases:
        return 1
    with Steps(notes, "profiling", "calls") as steps:
        total, done = len(cases) * (options.rounds + 2), itertools.count(1)
        found = profile_cases(cases, rounds=options.rounds, trace=options.trace, step=lambda: steps.at(next(done), total))
    if options.json:
        print(json.dumps(found.content(), indent=1))
    else:
        show(found, results)
    if options.out is not None:
        notes.print(f"samples: {escape(str(found.save(options.out)))}")
    if options.picture is not None:
        notes.print(f"picture: {escape(str(draw(found, options.picture)))}")
    if options.trace is not None:
        notes.print(f"trace: {escape(str(options.trace))} (open it in ui.perfetto.dev or chrome://tracing)")
    return 0


def _cases(options: Options, device: torch.device, notes: Console) -> tuple[list[Case], list[str]]:
    """Every combination, and in words those that cannot be."""
    cases, left_out = [], []
    for name, dtype, layout in itertools.product(options.models, options.dtypes, options.layouts):
        with notes.status(f"loading {escape(name)}"):
            classifier = load_classifier(name, weights=options.weights, device=device)
        model = classifier.model.to(DTYPES[dtype]).to(memory_format=LAYOUTS[layout])
        side = (options.size, options.size) if options.size else classifier.preprocess.crop
        for batch, engine, backend, mode in itertools.product(
            options.batches, options.engines, options.backends, options.modes
        ):
            told = (classifier.name, batch, dtype, layout, engine, backend, mode)
            names = dict(zip(("model", "batch", "dtype", "layout", "engine", "backend", "mode"), told, strict=True))
            try:
                generator = torch.Generator().manual_seed(0)
                images = torch.randn(batch, 3, *side, generator=generator).to(device, DTYPES[dtype])
                images = images.contiguous(memory_format=LAYOUTS[layout])
                explainer = Explainer(model, options.layer, options.method, options.utility, engine=engine, backend=backend)
                explainer.prepare(images)
                call = _call(explainer, images, mode)
            except (ShapleyCamError, RuntimeError, AssertionError, ValueError) as error:
                # A model may refuse a size or a dtype in words of its own, and a size may not fit the memory.
                left_out.append(f"{' '.join(map(str, names.values()))}: {error}")
                continue
            cases.append(Case(explainer, images, None, names, call, options.display, options.overlay))
    return cases, left_out


def _call(explainer: Explainer, images: Tensor, mode: str) -> Callable[[], Any] | None:
    """The other ways to the same maps, in display form at the size of the images."""
    if mode == "eager":
        return None
    if mode == "exported":
        with tempfile.TemporaryDirectory() as folder:
            export(explainer, images, Path(folder) / "explained.onnx")
            artefact = load_artefact(Path(folder) / "explained.onnx")
        return lambda: artefact.explain(images)
    program: nn.Module | Callable[..., Any]
    program = explainer.compile(images) if mode == "compiled" else explainer.capture(images)
    program(images)  # whatever is done once
    return lambda: program(images)


def show(found: Profile, results: Console) -> None:
    """The stages of every case, and below them the two lines that matter."""
    known = found.conditions
    results.print(
        f"{escape(str(known['device']))}, torch {known['torch']}, {known['threads']} threads, load {known['load']}, "
        f"commit {known['commit']}, {len(found.rows[0].forward)} rounds"
    )
    if known.get("clocks"):
        results.print(f"clocks before {known['clocks']}, after {known.get('clocks_after')}")
    for row in found.rows:
        served = "" if row.engine is None else f" (engine {row.engine}, backend {row.backend})"
        table = Table("stage", box=None, pad_edge=False, header_style="bold")
        for column in ("p50", "p90", "p99", "moved", "GB/s", "of copy_"):
            table.add_column(column, justify="right")
        for stage in row.stages:
            pace = stage.bandwidth
            table.add_row(
                stage.name,
                *(_time(value) for value in (stage.p50, stage.p90, stage.p99)),
                "" if stage.bytes is None else f"{stage.bytes / 2**20:.2f} MiB",
                "" if pace is None else f"{pace / 1e9:.1f}",
                "" if pace is None else f"{pace / row.copy:.0%}",
            )
        results.print(f"\n[bold]{escape(row.label)}[/]{escape(served)}")
        results.print(table)
        results.print(f"explanation ÷ plain forward   {row.over_forward:.3f}")
        results.print(f"explanation ÷ physical limit  {row.over_limit:.3f}   (forward pass + bytes moved at copy_'s pace)")
        what = "launches" if known["device_type"] == "cuda" else "operators"
        results.print(
            f"{what} {row.operators[0]} (forward {row.operators[1]}), peak memory {row.peak[0] / 2**20:.1f} MiB "
            f"(forward {row.peak[1] / 2**20:.1f} MiB)"
        )


def run_compare(old: Path, new: Path, threshold: float, results: Console) -> int:
    """Print a verdict per case and stage; returns 1 where an explanation became slower, else 0."""
    verdicts = compare(load(old), load(new), threshold=threshold)
    table = Table("case and stage", box=None, pad_edge=False, header_style="bold")
    for column in ("new ÷ old", "95 %", "verdict"):
        table.add_column(column, justify="right")
    colours = {"FAST": "green", "SLOW": "red", "SAME": "default", "UNCLEAR": "yellow"}
    for one in verdicts:
        table.add_row(
            escape(one.label),
            f"{one.ratio:.3f}",
            f"{one.low:.3f} to {one.high:.3f}",
            f"[{colours[one.word]}]{one.word}[/]",
        )
    results.print(table)
    return 1 if any(one.word == "SLOW" and one.label.endswith(" explanation") for one in verdicts) else 0


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"
