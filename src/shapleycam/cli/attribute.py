"""``shapleycam attribute``: a data set in, a folder of maps out."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from .._version import __version__
from ..attribute.job import Settings
from ..attribute.local import Outcome, attribute
from ..data.sources import open_source
from ..errors import InputError
from ..model.zoo import load_classifier, pick_device
from .explain import print_json
from .progress import Steps

_GRACE = 4.0  # seconds between the signal and the end, whatever the network is doing


@dataclass(frozen=True, slots=True)
class Options:
    """What the command was asked for; see ``shapleycam attribute --help``."""

    source: str
    out: Path
    model: str
    weights: str | None
    classes: Path | None
    layer: str
    method: str
    utility: str
    engine: str
    nodes: int | str | None
    baseline: str
    backend: str
    target: str
    topk: int
    gap: bool | None
    norms: bool
    device: str
    devices: str | None
    batch_size: int | None
    threads: int | None
    decoder: str
    max_pixels: int
    time_limit: float
    shard_size: int
    columns: tuple[str | None, str | None, str | None]
    scheduler: str
    address: str | None
    restart: bool
    json: bool


def run_attribute(options: Options, results: Console, progress: Console) -> int:
    """Run the job; returns the exit status, 0, 3 if some pictures have no map, or 128 and the signal that ended it.

    Raises:
        ShapleyCamError: the job cannot run or go on.
    """
    devices = _devices(options)
    device = pick_device(devices[0] if devices else options.device)
    image, key, label = options.columns
    with stopping(progress) as stop:
        source = open_source(options.source, image=image, key=key, label=label)
        with progress.status(f"loading {escape(options.model)}"):
            classifier = load_classifier(options.model, weights=options.weights, classes=options.classes, device=device)
        settings = Settings(
            method=options.method,
            utility=options.utility,
            layer=options.layer,
            engine=options.engine,
            nodes=options.nodes,
            baseline=options.baseline,
            backend=options.backend,
            target=_target(options.target),
            topk=options.topk,
            gap=options.gap,
            norms=options.norms,
            batch_size=options.batch_size or (8 if device.type == "cpu" else 64),
            decoder=options.decoder,
            max_pixels=options.max_pixels,
            threads=options.threads or _cores(),
            time_limit=options.time_limit or None,
        )
        with Steps(progress, "attribute", "pictures") as steps:

            def at(outcome: Outcome) -> None:
                steps.at(outcome.rows + outcome.ahead, outcome.images, _note(outcome, device))

            outcome = attribute(
                classifier,
                source,
                options.out,
                settings,
                shard_size=options.shard_size,
                devices=devices,
                scheduler=options.scheduler,
                address=options.address,
                restart=options.restart,
                stop=stop.event,
                progress=at,
            )
    for name, kind, why in outcome.examples:
        progress.print(f"[yellow]{escape(kind)}:[/] {escape(printable(name))}: {escape(printable(why))}", soft_wrap=True)
    if outcome.failed > len(outcome.examples) and outcome.examples:
        progress.print(f"… {outcome.failed} without a map in all: shapleycam maps {escape(str(outcome.out))} lists them.")
    said = _said(outcome)
    if options.json:
        print_json({"shapleycam": __version__, "model": classifier.name, **content(outcome)}, results)
        progress.print(escape(said), soft_wrap=True)
    else:
        results.print(escape(said), soft_wrap=True)
    if outcome.interrupted:
        return 128 + (stop.signal or signal.SIGINT)
    return 3 if outcome.failed else 0


def printable(text: str) -> str:
    """Text in one line that no terminal takes for a command: what cannot be printed as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def content(outcome: Outcome) -> dict[str, Any]:
    """The outcome for a JSON document."""
    return {
        "out": str(outcome.out.resolve()),
        "pictures": outcome.images,
        "explained": outcome.explained,
        "failed": outcome.failed,
        "statuses": outcome.kinds,
        "resumed": outcome.resumed,
        "parts": outcome.parts,
        "parts_done": outcome.done,
        "interrupted": outcome.interrupted,
        "seconds": round(outcome.seconds, 3),
        "pictures_per_second": round(outcome.rate, 2),
    }


def _said(outcome: Outcome) -> str:
    said = f"{outcome.explained} of {outcome.images} pictures explained, {outcome.failed} without a map"
    if outcome.resumed:
        said += f", {outcome.resumed} of them done before"
    if outcome.seconds:
        said += f"; {outcome.rate:.1f} pictures/s"
    said += f". Maps: {outcome.out.resolve()}"
    return f"Interrupted: {said}; the same command goes on from there." if outcome.interrupted else said


def _note(outcome: Outcome, device: torch.device) -> str:
    note = f"{outcome.rate:.1f}/s" if outcome.seconds else ""
    if device.type == "cuda":
        note += f", {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    return note + (f", {outcome.failed} without a map" if outcome.failed else "")


def _cores() -> int:
    """The cores that this process may use; all, where the system (macOS, Windows) does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _devices(options: Options) -> list[str]:
    if options.devices is None:
        return []
    if options.device != "auto":
        raise InputError("--device and --devices exclude each other: one, or several with commas.")
    if options.devices == "all":
        return [f"cuda:{n}" for n in range(torch.cuda.device_count())] or ["cpu"]
    names = [name.strip() for name in options.devices.split(",") if name.strip()]
    for name in names:
        pick_device(name)
    if not names:
        raise InputError(f"--devices {options.devices!r}: expected names with commas between them, or all.")
    return names


def _target(text: str) -> str | int:
    return int(text) if text.strip().lstrip("-").isdecimal() else text


class Stop:
    """Whether, and by which signal, the command was asked to stop."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.signal: int = 0


@contextmanager
def stopping(progress: Console) -> Iterator[Stop]:
    """SIGINT and SIGTERM set the event; a second one, or four seconds, end the process.

    A thread hears of them from the C level, as Python's own handlers wait until the network's current operator returns.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    listening, telling = os.pipe()
    os.set_blocking(telling, False)

    def listen() -> None:
        while said := os.read(listening, 1):
            number = said[0]
            if number not in (signal.SIGINT, signal.SIGTERM):
                continue
            if stop.event.is_set():
                os._exit(128 + number)
            stop.signal = number
            stop.event.set()
            progress.print("[bold red]stopping[/] after this batch; what is done is kept, and the same command goes on.")
            threading.Thread(target=end, args=(number,), daemon=True).start()

    def end(number: int) -> None:
        time.sleep(_GRACE)
        if over.is_set():
            return
        os._exit(128 + number)

    over = threading.Event()
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    woken = signal.set_wakeup_fd(telling, warn_on_full_buffer=False)
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield stop
    finally:
        if not stop.event.is_set():  # else the process is to end in time also where its own end takes long
            over.set()
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(telling)  # ends the listener
        listener.join()
        os.close(listening)
