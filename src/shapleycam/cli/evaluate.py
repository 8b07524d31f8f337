"""``shapleycam evaluate``: the paper's table for a folder of pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ..data.samples import open_samples
from ..data.sources import open_source
from ..errors import InputError, ShapleyCamError
from ..evaluate.paper import PRESETS, Preset, get_preset, load_preset
from ..evaluate.run import Protocol, evaluate
from ..methods.table import get_method
from ..model.zoo import DEFAULT_MODEL, Classifier, load_classifier, pick_device
from .explain import print_json
from .progress import Steps
from .report import Section, content, print_report, write_report


@dataclass(frozen=True, slots=True)
class Options:
    """What the command was asked for; see ``shapleycam evaluate --help``."""

    source: str
    model: str = DEFAULT_MODEL
    weights: str | None = None
    classes: Path | None = None
    protocol: Protocol = field(default_factory=Protocol)
    batch_size: int | None = None
    limit: int | None = None
    device: str = "auto"
    output: Path = Path("shapleycam-out/evaluate")
    restart: bool = False
    paper_table: bool = False
    networks: tuple[str, ...] = ()
    download: bool = False
    json: bool = False


def run_evaluate(options: Options, results: Console, progress: Console) -> int:
    """Evaluate one network, or the paper's; returns the exit status, 1 if a picture or a network had to be left out.

    After Ctrl-C it is 130; what is done is in the state files, and the same command goes on from there.

    Raises:
        ShapleyCamError: nothing can be evaluated at all.
    """
    for name in options.protocol.methods:
        get_method(name)
    if options.networks and not options.paper_table:
        raise InputError("--network picks from the paper's networks: use it with --paper-table, or --model without it.")
    if options.paper_table and options.model != DEFAULT_MODEL:
        raise InputError("--paper-table and --model exclude each other; --network picks from the paper's networks.")
    if options.paper_table and options.weights is not None and not Path(options.weights).is_dir():
        raise InputError(f"--weights {options.weights}: with --paper-table this is a folder with one file per network.")
    chosen: list[Preset | None] = [None]
    if options.paper_table:
        chosen = [get_preset(name) for name in options.networks] if options.networks else list(PRESETS.values())
    open_source(options.source)  # or it would be missed only behind the first network
    options.output.mkdir(parents=True, exist_ok=True)
    sections: list[Section] = []
    missing: list[str] = []
    for preset in chosen:
        try:
            sections.append(_one(options, preset, progress))
        except ShapleyCamError as error:
            if preset is None or len(chosen) == 1:
                raise
            # The other networks can still be done.
            missing.append(f"{preset.network}: {str(error).removeprefix(f'{preset.network}: ')}")
            progress.print(f"[bold red]left out:[/] {escape(missing[-1])}")
        except KeyboardInterrupt:
            progress.print("[bold red]interrupted:[/] what is done is kept, and the same command goes on from there.")
            return 130
    if not sections:
        raise InputError("None of the networks could be evaluated.")
    if options.json:
        print_json(content(sections, missing), results)
    else:
        print_report(sections, results)
    for file in write_report(sections, options.output, missing, progress):
        (progress if options.json else results).print(f"written: {escape(str(file))}", soft_wrap=True)
    bad = any(section.outcome.unreadable or section.outcome.skipped for section in sections)
    return 1 if bad or missing else 0


def _one(options: Options, preset: Preset | None, progress: Console) -> Section:
    device = pick_device(options.device)
    with progress.status(f"loading {escape(options.model if preset is None else preset.network)}"):
        classifier = _load(options, preset, device)
    samples = open_samples(options.source, classifier.preprocess, options.limit)
    protocol = options.protocol
    if preset is not None and protocol.layer == "auto":
        protocol = replace(protocol, layer=preset.layer)
    # On a CPU large batches fall out of the caches and cost more per picture.
    accelerator = preset.batch if preset is not None else 32
    protocol = replace(protocol, batch_size=options.batch_size or (2 if device.type == "cpu" else accelerator))
    name = re.sub(r"[^\w.+-]+", "_", classifier.name if preset is None else preset.network)
    state = options.output / f"state-{name}.json"
    if options.restart:
        state.unlink(missing_ok=True)
    with Steps(progress, name, "batches") as steps:
        try:
            outcome = evaluate(classifier, samples, protocol, state, progress=steps.at)
        except KeyboardInterrupt:
            done = (
                f"{steps.done} of {steps.total} batches are done; they are in {state}" if steps.done else "nothing is done yet"
            )
            progress.print(escape(f"{name}: {done}."))
            raise
    if outcome.resumed:
        progress.print(f"{escape(name)}: {outcome.resumed} of {outcome.batches} batches were done before.")
    for picture, reason in outcome.unreadable:
        progress.print(f"[yellow]unreadable:[/] {escape(picture)}: {escape(reason)}")
    return Section(name, classifier, protocol, outcome, len(samples), str(device), preset)


def _load(options: Options, preset: Preset | None, device: object) -> Classifier:
    if preset is None:
        return load_classifier(options.model, weights=options.weights, classes=options.classes, device=str(device))
    folder = None if options.weights is None else Path(options.weights)
    return load_preset(preset, folder, device=str(device), download=options.download)


def method_names(text: str) -> tuple[str, ...]:
    """ "a,b,c" as names.

    Raises:
        InputError: no name, an unknown one, or one twice.
    """
    names: Sequence[str] = [get_method(part.strip()).name for part in text.split(",") if part.strip()]
    if not names or len(set(names)) < len(names):
        raise InputError(f"--methods {text!r}: expected names with commas between them, each once.")
    return tuple(names)
