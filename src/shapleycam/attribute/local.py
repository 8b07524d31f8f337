"""The data-set job on this machine: one process, or one per device; and the engine of others, behind one function."""

from __future__ import annotations

import io
import pickle
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..data.decoding import Decoder
from ..data.sources import Source, open_source
from ..errors import InputError
from ..model.zoo import Classifier
from .feed import Stopped
from .folder import MANIFEST, Folder
from .job import Settings, ShardRunner
from .part import Part

SHARD = 1024  # pictures in a part if nothing else is said
SCHEDULERS = ("local", "ray")


@dataclass(slots=True)
class Outcome:
    """What a job found, also before its end.

    Attributes:
        out: the folder of the result.
        images: pictures in the source. kinds: how many rows have each status, of all parts that are there.
        resumed: pictures that an earlier run had done.
        parts, done: parts in all, and those that are there.
        examples: the first (key, status, error) of pictures without a map, of this run.
        seconds: of this run, the study of the model included.
        interrupted: whether it was asked to stop.
        ahead: pictures behind us whose part is not done, where one process knows them.
    """

    out: Path
    images: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    resumed: int = 0
    parts: int = 0
    done: int = 0
    examples: list[tuple[str, str, str]] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False
    ahead: int = 0

    @property
    def explained(self) -> int:
        """Pictures with a map."""
        return self.kinds.get("ok", 0)

    @property
    def failed(self) -> int:
        """Pictures without."""
        return sum(self.kinds.values()) - self.explained

    @property
    def rows(self) -> int:
        """Pictures that have a row."""
        return sum(self.kinds.values())

    @property
    def rate(self) -> float:
        """Pictures per second of this run."""
        return (self.rows + self.ahead - self.resumed) / self.seconds if self.seconds else 0.0

    def add(self, part: Part) -> None:
        self.kinds = dict(Counter(self.kinds) + Counter(part.kinds))
        self.done += 1
        self.ahead = 0
        self.examples += part.examples[: 10 - len(self.examples)]


def attribute(
    classifier: Classifier,
    source: str | PathLike[str] | Source | Any,
    out: str | PathLike[str],
    settings: Settings | None = None,
    *,
    shard_size: int = SHARD,
    devices: Sequence[str] = (),
    scheduler: str = "local",
    address: str | None = None,
    restart: bool = False,
    stop: threading.Event | None = None,
    progress: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Explain every picture of a data set, or finish doing it.

    What is done is kept whatever happens; calling it again with the same arguments does the parts that are missing, and the
    result has the bits of a run that was not interrupted.

    Args:
        classifier: model (its device is where one process runs), preprocessing and class names.
        source: pictures; see :func:`shapleycam.data.sources.open_source`.
        out: the folder of the result; read it by :func:`shapleycam.attribute.open_maps`.
        settings: what is explained, and how.
        shard_size: pictures in a part, which is done as a whole or not at all.
        devices: a process for each ("cuda:0", "cuda:1"; a name may stand twice), all of one type; none where it is the one that
            the model is on. Empty for that one.
        scheduler: "local", or "ray" (``pip install 'shapleycam[ray]'``).
        address: of Ray's cluster; None starts one here.
        restart: forget what is in ``out``.
        stop: set it from anywhere to end the run at the next batch.
        progress: called at the beginning and after every part, in one process also after every batch.

    Raises:
        InputError: nothing to explain; ``out`` belongs to another job or run, holds somebody's own tables under names of parts,
            or lies in the source; or the source has changed since it was begun; or the model cannot go to other processes.
        JobError: the disk is full, or workers keep dying.
        LayerError, ModelStateError, DerivativeError, BackendError: the model cannot be explained so.
    """
    if scheduler not in SCHEDULERS:
        raise InputError(f"Unknown scheduler {scheduler!r}: expected {', '.join(map(repr, SCHEDULERS))}.")
    settings, pictures, stop = settings or Settings(), open_source(source), stop or threading.Event()
    _refuse_the_source(Path(out), pictures)
    home = next(classifier.model.parameters()).device
    kind = _type_of(devices, home)
    if settings.decoder != "cuda":
        Decoder(classifier.preprocess, settings.decoder, settings.max_pixels)  # before anything is written
    elif kind != "cuda":  # whether it can decode there, each worker sees
        raise InputError(f"The decoder 'cuda' needs the model on a CUDA device, and it is on {kind}: choose another decoder.")
    folder = Folder(Path(out), classifier, pictures, settings, shard_size, kind)
    with folder.locked():
        folder.open(restart=restart)
        outcome = Outcome(folder.path, folder.manifest.count, parts=folder.manifest.shards)
        done = folder.done()
        for part in done.values():
            outcome.add(part)
        outcome.resumed = outcome.rows
        missing = [k for k in range(folder.manifest.shards) if k not in done]
        progress(outcome)
        if not missing:
            return outcome
        began = time.monotonic()
        work = Work(classifier, pictures, folder.path, settings, folder.identity(), shard_size)
        if scheduler == "ray":
            from .ray import on_ray

            parts = on_ray(work, missing, devices, address, stop)
        elif len(devices) > 1 or any(not _is_home(torch.device(name), home) for name in devices):
            from .processes import on_devices

            parts = on_devices(work, missing, devices, stop)
        else:

            def batch_done(pictures: int) -> None:
                outcome.ahead += pictures
                outcome.seconds = time.monotonic() - began
                progress(outcome)

            parts = here(work, missing, stop, batch_done)
        try:
            for part in parts:
                outcome.add(part)
                outcome.seconds = time.monotonic() - began
                progress(outcome)
        except Stopped:
            outcome.interrupted = True
        finally:
            parts.close()
    return outcome


def _refuse_the_source(out: Path, source: Source) -> None:
    """Raise InputError if the source would list the result the next time."""
    if source.local is None or Path(source.address.removeprefix("file://")).is_file():  # a table or tar has no others beside it
        return
    where, pictures = out.resolve(), source.local.resolve()
    below = where == pictures or (source.recursive and pictures in where.parents)
    if below and not any(part.startswith(".") for part in where.relative_to(pictures).parts):  # where no source looks
        raise InputError(
            f"{out} is among the pictures of {source.address}, and would be listed with them: choose another --out."
        )


def _type_of(devices: Sequence[str], home: torch.device) -> str:
    """ "cuda", "cpu", …: of these devices, or of the model's own."""
    try:
        types = {torch.device(name).type for name in devices} or {home.type}
    except RuntimeError as error:
        raise InputError(f"devices: {error}") from error
    if len(types) > 1:
        raise InputError(f"devices must be of one type, as maps differ in their last bits between types; got {list(devices)}.")
    return types.pop()


def _is_home(device: torch.device, home: torch.device) -> bool:
    """Whether a device is the model's own, by whatever name; there is one CPU."""
    return device.type == home.type and (device.type == "cpu" or device.index in (None, home.index))


@dataclass(frozen=True, slots=True)
class Work:
    """What a worker in any process needs; it can be pickled."""

    classifier: Classifier
    source: Source
    out: Path
    settings: Settings
    identity: dict[str, Any]
    shard_size: int = SHARD

    def packed(self, pickle_module: Any = pickle) -> bytes:
        """For other processes; by torch.save, as the queues' own way shares device memory.

        Raises:
            InputError: a part of it cannot be pickled.
        """
        content = io.BytesIO()
        try:
            torch.save(self, content, pickle_module=pickle_module)
        except (pickle.PickleError, AttributeError, TypeError, RuntimeError) as error:
            raise InputError(
                f"The model cannot go to other processes, as it cannot be pickled ({error}): define what it is made of at the "
                "top of an importable module, or run in one process, without devices."
            ) from error
        return content.getvalue()

    def runner(self, stop: threading.Event | None = None) -> ShardRunner:
        return ShardRunner(self.classifier, self.source, self.out / MANIFEST, self.out, self.settings, self.identity, stop)


def here(
    work: Work, shards: Sequence[int], stop: threading.Event, batch_done: Callable[[int], None]
) -> Generator[Part, None, None]:
    """The shards one after the other in this process."""
    runner = work.runner(stop)
    runner.batch_done = batch_done
    try:
        yield from runner.run_all(shards)
    finally:
        runner.close()
