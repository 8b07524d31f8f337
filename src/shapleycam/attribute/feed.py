"""Batches for the network, decoded ahead of it by threads.

Batches have fixed places: entries [b·B, (b + 1)·B) of a shard, whatever of them can be read. A place without a picture repeats
one that there is, so that every batch has the same shape, and a map does not depend on whether its neighbours are broken.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data.decoding import Decoded, Decoder
from ..data.sources import Entry, Source
from ..errors import InputError, JobError

AHEAD = 3  # batches that are decoded before they are asked for
_HANGING = 64  # threads that may be stuck in files at once
_TICK = 0.2  # seconds between two looks at the clock and at the wish to stop


class Stopped(Exception):
    """The job was asked to stop."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a picture has no map: a kind for tables ("unreadable", "undecodable", "timeout", …), and words for people."""

    kind: str
    text: str


@dataclass(slots=True)
class Batch:
    """One batch.

    Attributes:
        shard: which. first: the place of the first entry in it. last: whether it is the shard's last batch.
        found: what each entry gave.
        views: uint8 [B, 3, H, W] in host memory (pinned for an accelerator), or where the decoder puts them; None if no picture
            could be read.
    """

    shard: int
    first: int
    last: bool
    entries: Sequence[Entry]
    found: Sequence[Decoded | Failure]
    views: Tensor | None


@dataclass(slots=True)
class _Task:
    entry: Entry
    started: float | None = None
    result: Decoded | Failure | BaseException | None = None
    abandoned: bool = False
    done: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Feeder:
    """Decodes the pictures of shards in threads of its own.

    A file that takes longer than the limit loses its thread: it gets a failure, and another thread takes over. (No thread can
    be stopped from outside; they are daemons, so they hold up nobody's exit.)

    Args:
        source, decoder: where bytes come from, and what makes views of them; called from several threads.
        batch_size: B.
        threads: how many decode.
        limit: seconds that one picture may take; None for no limit.
        stop: set by whoever wants the job to stop.
        pinned: whether batches are in pinned memory.
        ahead: batches that are decoded before they are asked for.
    """

    def __init__(
        self,
        source: Source,
        decoder: Decoder,
        batch_size: int,
        *,
        threads: int = 2,
        limit: float | None = None,
        stop: threading.Event | None = None,
        pinned: bool = False,
        ahead: int = AHEAD,
    ) -> None:
        self._source, self._decoder = source, decoder
        self._size, self._ahead, self._limit, self._pinned = batch_size, ahead, limit, pinned
        self._stop = stop or threading.Event()
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._hanging: list[_Task] = []
        self._threads = threads
        for _ in range(threads):
            self._hire()

    def close(self) -> None:
        """Let the threads go; batches must not be asked for again."""
        for _ in range(self._threads):
            self._tasks.put(None)

    def batches(self, shards: Iterable[tuple[int, Sequence[Entry]]]) -> Iterator[Batch]:
        """The batches of these shards one after the other; the next shards are asked for while the last ones are decoded.

        Raises:
            Stopped: the job was asked to stop.
            JobError: too many files hang.
        """
        window: deque[tuple[int, int, bool, list[_Task]]] = deque()
        cuts = self._cut(shards)
        for cut in cuts:
            tasks = [_Task(entry) for entry in cut[3]]
            for task in tasks:
                self._tasks.put(task)
            window.append((*cut[:3], tasks))
            if len(window) > self._ahead:
                yield self._collect(*window.popleft())
        while window:
            yield self._collect(*window.popleft())

    def _cut(self, shards: Iterable[tuple[int, Sequence[Entry]]]) -> Iterator[tuple[int, int, bool, Sequence[Entry]]]:
        for shard, entries in shards:
            for first in range(0, len(entries), self._size):
                yield shard, first, first + self._size >= len(entries), entries[first : first + self._size]

    def _collect(self, shard: int, first: int, last: bool, tasks: list[_Task]) -> Batch:
        found = [self._wait(task) for task in tasks]
        good = [each.view for each in found if isinstance(each, Decoded)]
        views = None
        if good:
            spare = good[0]
            rows = [each.view if isinstance(each, Decoded) else spare for each in found]
            rows += [spare] * (self._size - len(rows))
            shape = (self._size, *spare.shape)
            if self._pinned and spare.device.type == "cpu":
                views = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            else:  # as the views are, and as a CPU's convolutions are quickest (bench.attribute)
                views = torch.empty(shape, dtype=torch.uint8, device=spare.device, memory_format=torch.channels_last)
            torch.stack(rows, out=views)
        return Batch(shard, first, last, [task.entry for task in tasks], found, views)

    def _wait(self, task: _Task) -> Decoded | Failure:
        while not task.done.wait(_TICK):
            if self._stop.is_set():
                raise Stopped
            if self._limit is None or task.started is None or time.monotonic() - task.started < self._limit:
                continue
            with task.lock:
                if task.done.is_set():
                    break
                task.abandoned = True
            self._hanging = [each for each in self._hanging if not each.done.is_set()] + [task]
            if len(self._hanging) > _HANGING:
                raise JobError(
                    f"{_HANGING} files took longer than {self._limit:g} s, and still hang: is the storage of "
                    f"{self._source.address} there? Try again, or allow more time."
                )
            self._hire()
            return Failure("timeout", f"took longer than the limit of {self._limit:g} s.")
        if self._stop.is_set():
            raise Stopped
        if isinstance(task.result, BaseException):
            raise task.result
        assert task.result is not None
        return task.result

    def _hire(self) -> None:
        threading.Thread(target=self._work, name="shapleycam-decode", daemon=True).start()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task.started = time.monotonic()
            result: Decoded | Failure | BaseException
            try:
                result = self._decode(task.entry)
            except BaseException as error:  # for whoever waits
                result = error
            with task.lock:
                task.result = result
                task.done.set()
                if task.abandoned:  # another thread has this one's place
                    return

    def _decode(self, entry: Entry) -> Decoded | Failure:
        if self._stop.is_set():
            raise Stopped
        kind = "unreadable"
        try:
            content = self._source.load(entry)
            kind = "undecodable"
            return self._decoder(content, entry.key)
        except InputError as error:
            return Failure(kind, str(error).removeprefix(f"{entry.key} "))
        except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):  # the machine's, and no picture's
            raise
        except Exception as error:
            # One picture out of millions must not end the job, whatever a library makes of it; the row says what it was.
            return Failure("unexpected", f"{type(error).__name__}: {error}")
