"""The folder of a result: whose it is, what of it is done, and that one run at a time writes it."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..data.files import write_whole
from ..data.manifest import Manifest, fingerprint_of, write_manifest
from ..data.sources import Source
from ..errors import InputError, JobError
from ..model.zoo import Classifier
from ..optional import need
from .job import Settings
from .part import LAYOUT, Part, part_name

JOB, MANIFEST, LOCK = "job.json", "manifest.parquet", ".lock"
_PART = re.compile(r"part-(\d{6,})\.parquet")


class Folder:
    """A result's folder, made if it is missing.

    Args:
        path: where.
        classifier, source, settings, shard_size: the job.

    Attributes:
        key: all that the result depends on.
        manifest: of the source; there after :meth:`open`.
    """

    manifest: Manifest

    def __init__(self, path: Path, classifier: Classifier, source: Source, settings: Settings, shard_size: int) -> None:
        self.path, self._source, self._classifier, self._shard_size = path, source, classifier, shard_size
        device = next(classifier.model.parameters()).device
        self.key: dict[str, Any] = {
            **settings.key(),
            "decoder": "exact" if settings.decoder == "exact" else "auto",  # torchcodec and Pillow give the same pixels
            "model": classifier.name,
            "weights": classifier.fingerprint(),
            "preprocess": repr(classifier.preprocess),
            "shard_size": shard_size,
            "device": device.type,
            "torch": torch.__version__,
            "shapleycam": __version__,
        }

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out; a run that dies in any way lets go by itself.

        Raises:
            InputError: another run has the folder, or it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            stream = open(self.path / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - closed below
        except OSError as error:
            raise InputError(f"{self.path} cannot be used: {error.strerror or error}.") from error
        with stream:
            try:
                import fcntl

                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:  # Windows: no lock, but parts are still written in one piece
                pass
            except BlockingIOError as error:
                stream.seek(0)
                holder = stream.read().strip() or "another process"
                raise InputError(f"{self.path} is being written by {holder}: wait for it, or choose another --out.") from error
            stream.seek(0)
            stream.truncate()
            stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            stream.flush()
            yield

    def open(self, *, restart: bool = False) -> None:
        """Take up what an earlier run of the same job left, or begin; only under the lock.

        Raises:
            InputError: the folder is another job's, or the source is not what it was; or it holds what is no result.
            JobError: the disk is full.
        """
        try:
            self._sweep(restart)
            if (self.path / JOB).exists():
                self._take_up()
            else:
                self._begin()
        except OSError as error:
            raise JobError(f"{self.path} cannot be written: {error.strerror or error}.") from error

    def _sweep(self, restart: bool) -> None:
        """Remove what a run that died left half-written; with ``restart`` everything that is ours."""
        for file in self.path.iterdir():
            ours = file.name in (JOB, MANIFEST) or _PART.fullmatch(file.name)
            half = file.name.endswith(".part") and file.name.lstrip(".").startswith(("part-", JOB, MANIFEST))
            if half or (restart and ours):
                file.unlink(missing_ok=True)
        if not (self.path / JOB).exists():
            parts = [file.name for file in self.path.iterdir() if _PART.fullmatch(file.name)]
            if parts:
                raise InputError(
                    f"{self.path} has parts of a result ({parts[0]}, …) but no {JOB}: choose another --out, or --restart."
                )

    def _begin(self) -> None:
        self.manifest = write_manifest(self._source, self.path / MANIFEST, self._shard_size)
        self.key["manifest"] = self.manifest.fingerprint
        address = self._source.address
        content = {
            "layout": LAYOUT,
            "key": self.key,
            "source": address if "://" in address or not os.path.exists(address) else os.path.abspath(address),
            "columns": self._source.columns,
            "weights": self._classifier.weights,
            "preprocess": asdict(self._classifier.preprocess),
            "classes": [names[0] for names in self._classifier.classes],
        }
        write_whole(self.path / JOB, json.dumps(content, indent=1))

    def _take_up(self) -> None:
        content = read_job(self.path)
        theirs = {name: value for name, value in content["key"].items() if name != "manifest"}
        odd = [name for name in {**self.key, **theirs} if theirs.get(name) != json.loads(json.dumps(self.key.get(name)))]
        if odd:
            values = ", ".join(
                f"{name} ({_short(theirs.get(name))} there, {_short(self.key.get(name))} now)" for name in odd[:4]
            )
            raise InputError(
                f"{self.path} belongs to a job with another {values}: use --restart to overwrite it, or another --out."
            )
        self.manifest = Manifest(self.path / MANIFEST)
        now, count = fingerprint_of(self._source)
        self.key["manifest"] = content["key"]["manifest"]
        if now != self.manifest.fingerprint or now != self.key["manifest"]:
            raise InputError(
                f"{self._source.address} has changed since {self.path} was begun: {self.manifest.count} pictures then, {count} "
                "now, or others by name, size, time or label. Use --restart to begin anew, or another --out."
            )

    def done(self) -> dict[int, Part]:
        """The parts that are there; one that is not whole, or another job's, is removed.

        A file under its final name was complete when it got it; this is about copies and damage since.
        """
        parquet, found = need("pyarrow.parquet", "attribute"), {}
        for k, file in sorted(part_files(self.path).items()):
            try:
                meta = parquet.read_metadata(file)
                said = meta.metadata or {}
                whole = k < self.manifest.shards and meta.num_rows == self.manifest.rows(k)
                ours = json.loads(said.get(b"shapleycam:job", b"null")) == self.identity()
            except (OSError, ValueError):
                whole = ours = False
            if whole and ours:
                kinds = {n[5:].decode(): int(v) for n, v in said.items() if n.startswith(b"rows:")}
                found[k] = Part(k, meta.num_rows, kinds)
            else:
                file.unlink()
        return found

    def identity(self) -> dict[str, Any]:
        """What every part says it belongs to."""
        identity: dict[str, Any] = json.loads(json.dumps(self.key))
        return identity


def part_files(path: Path, only: int | None = None) -> dict[int, Path]:
    """The parts that are there, by number; or the one asked for, there or not."""
    if only is not None:
        return {only: path / part_name(only)}
    return {int(match[1]): path / name for name in os.listdir(path) if (match := _PART.fullmatch(name))}


def read_job(path: Path) -> dict[str, Any]:
    """The description of a result.

    Raises:
        InputError: there is none, or of a layout that this version does not read.
    """
    file = path / JOB
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        layout = content["layout"]
        content["key"]["manifest"]
    except FileNotFoundError as error:
        raise InputError(f"{path} holds no result of shapleycam attribute: there is no {JOB}.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is not the description of a result ({error!r}).") from error
    if layout != LAYOUT:
        raise InputError(f"{path} has layout {layout!r}; this version of shapleycam ({__version__}) reads layout {LAYOUT!r}.")
    assert isinstance(content, dict)
    return content


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"
