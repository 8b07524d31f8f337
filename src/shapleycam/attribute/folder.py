"""The folder of a result: whose it is, what of it is done, and that one run at a time writes it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..data.files import ARROW_ERRORS, write_whole
from ..data.manifest import Manifest, fingerprint_of, write_manifest
from ..data.sources import Source
from ..errors import InputError, JobError, ShapleyCamWarning
from ..model.zoo import Classifier
from ..optional import need
from .job import Settings
from .part import LAYOUT, Part, part_name

JOB, MANIFEST, LOCK = "job.json", "manifest.parquet", ".lock"
_PART = re.compile(r"part-(\d{6,})\.parquet")
#: what a run that died leaves half-written; named for its process
_HALF = re.compile(rf"(\.part-\d{{6,}}\.parquet|\.{re.escape(MANIFEST)}|{re.escape(JOB)})\.\d+\.part")


class Folder:
    """A result's folder, made if it is missing.

    Args:
        path: where.
        classifier, source, settings, shard_size: the job.
        device: the type of the devices that it runs on.

    Attributes:
        key: all that the result depends on.
        manifest: of the source; there after :meth:`open`.
    """

    manifest: Manifest

    def __init__(
        self, path: Path, classifier: Classifier, source: Source, settings: Settings, shard_size: int, device: str
    ) -> None:
        self.path, self._source, self._classifier, self._shard_size = path, source, classifier, shard_size
        self.key: dict[str, Any] = {
            **settings.key(),
            # torchcodec and Pillow give the same pixels
            "decoder": settings.decoder if settings.decoder in ("exact", "scaled", "cuda") else "auto",
            "model": classifier.name,
            "weights": classifier.fingerprint(),
            "classes": hashlib.sha256(json.dumps(classifier.classes).encode()).hexdigest(),  # a target's name means an index
            "preprocess": repr(classifier.preprocess),
            "columns": source.columns,
            "shard_size": shard_size,
            "device": device,
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
            except OSError as error:  # a file system without locks, such as Lustre as it is mounted by default
                warnings.warn(
                    f"{self.path} cannot be locked ({error.strerror or error}): see to it that no other run writes there.",
                    ShapleyCamWarning,
                    stacklevel=2,
                )
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
        """Remove what a run that died left half-written; with ``restart`` everything that is ours, and nothing else."""
        names = set(os.listdir(self.path))
        parts = sorted(name for name in names if _PART.fullmatch(name))
        begun = JOB in names
        if restart and begun:
            read_job(self.path, layout=None)  # or it is somebody's own
        if not begun or restart:
            for name in (*parts, *({MANIFEST} & names)):
                self._refuse_foreign(self.path / name, begun)
        for name in names:
            if _HALF.fullmatch(name):
                (self.path / name).unlink(missing_ok=True)
        if restart:
            # The description first: what a run that dies in here leaves is never taken for a result.
            for name in (JOB, MANIFEST, *parts):
                (self.path / name).unlink(missing_ok=True)
        elif parts and not begun:
            raise InputError(
                f"{self.path} has parts of a result ({parts[0]}, …) but no {JOB}: choose another --out, or --restart."
            )

    def _refuse_foreign(self, file: Path, begun: bool) -> None:
        """Raise InputError for a table with a name of ours that is not ours; a damaged one is where there is a job."""
        said = metadata_of(file)
        ours = begun if said is None else (b"fingerprint" if file.name == MANIFEST else b"shapleycam:layout") in said[1]
        if not ours:
            what = "is damaged, and may be somebody's own" if said is None else "was not written by shapleycam attribute"
            raise InputError(f"{file} {what}, and would be overwritten: remove it, or choose another --out.")

    def _begin(self) -> None:
        self.manifest = write_manifest(self._source, self.path / MANIFEST, self._shard_size)
        self.key["manifest"] = self.manifest.fingerprint
        here = self._source.local is not None and "://" not in self._source.address
        content = {
            "layout": LAYOUT,
            "key": self.key,
            "source": os.path.abspath(self._source.address) if here else self._source.address,
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
        try:
            self.manifest = Manifest(self.path / MANIFEST)
        except InputError as error:
            if (self.path / MANIFEST).exists():
                self._refuse_foreign(self.path / MANIFEST, begun=True)
            raise InputError(f"{error} Use --restart to begin anew, or another --out.") from error
        now, count = fingerprint_of(self._source)
        self.key["manifest"] = content["key"]["manifest"]
        if now != self.manifest.fingerprint or now != self.key["manifest"]:
            raise InputError(
                f"{self._source.address} has changed since {self.path} was begun: {self.manifest.count} pictures then, {count} "
                "now, or others by name, size, time or label. Use --restart to begin anew, or another --out."
            )

    def done(self) -> dict[int, Part]:
        """The parts that are there; one that is not whole, or another job's or shard's, is removed.

        A file under its final name was complete when it got it; this is about copies and damage since.

        Raises:
            InputError: a table is in the place of a part that is none.
            JobError: a part cannot be read for a reason that may pass; nothing is removed then.
        """
        found, odd = {}, []
        for k, file in sorted(part_files(self.path).items()):
            said = metadata_of(file)
            if said is not None:
                self._refuse_foreign(file, begun=True)
                rows, meta = said
                known = (
                    k < self.manifest.shards and rows == self.manifest.rows(k) and meta.get(b"shapleycam:shard") == b"%d" % k
                )
                if known and meta.get(b"shapleycam:job") == json.dumps(self.identity(), sort_keys=True).encode():
                    kinds = {n[5:].decode(): int(v) for n, v in meta.items() if n.startswith(b"rows:")}
                    found[k] = Part(k, rows, kinds)
                    continue
            odd.append(file)
        for file in odd:  # when all could be looked at
            try:
                file.unlink()
            except OSError as error:
                raise JobError(f"{file} is not whole, and cannot be removed: {error.strerror or error}.") from error
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


def metadata_of(file: Path) -> tuple[int, dict[bytes, bytes]] | None:
    """Rows and metadata of a Parquet file; None if it is damaged.

    Raises:
        JobError: it cannot be read, which says nothing about what is in it.
    """
    parquet = need("pyarrow.parquet", "attribute")
    try:
        meta = parquet.read_metadata(file)
    except ARROW_ERRORS as error:
        if getattr(error, "errno", None) is None:  # pyarrow's own word, also of a file that ends too early
            return None
        raise JobError(
            f"{file} cannot be read: {getattr(error, 'strerror', error)}. Nothing was removed; try again."
        ) from error
    return int(meta.num_rows), dict(meta.metadata or {})


def read_job(path: Path, layout: str | None = LAYOUT) -> dict[str, Any]:
    """The description of a result.

    Args:
        path: the folder.
        layout: which it must have; None for any.

    Raises:
        InputError: there is none, or of a layout that this version does not read.
    """
    file = path / JOB
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        there = content["layout"]
        content["key"]["manifest"]
    except FileNotFoundError as error:
        raise InputError(f"{path} holds no result of shapleycam attribute: there is no {JOB}.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} is not the description of a result ({error!r}): remove it, or choose another --out."
        ) from error
    if layout not in (None, there):
        raise InputError(f"{path} has layout {there!r}; this version of shapleycam ({__version__}) reads layout {LAYOUT!r}.")
    assert isinstance(content, dict)
    return content


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"
