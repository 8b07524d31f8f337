"""One process per device on this machine, each with a worker of its own.

A process that dies is replaced, and its shards are given out again: a part is there as a whole or not at all, and a shard that
is done twice has the same bits. Processes die with the one that started them, however it ends.
"""

from __future__ import annotations

import ctypes
import io
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import TYPE_CHECKING, Any

import torch

from ..errors import JobError, ShapleyCamError
from .feed import AHEAD, Stopped
from .part import Part

if TYPE_CHECKING:
    from .local import Work

_TRIES = 3  # a shard that its process does not survive so often ends the job
_PR_SET_PDEATHSIG = 1


@dataclass(slots=True)
class _Worker:
    device: str
    process: Any
    pipe: Any
    given: deque[int] = field(default_factory=deque)  # shards that it has and has not finished
    told_end: bool = False


def on_devices(work: Work, shards: Sequence[int], devices: Sequence[str], stop: threading.Event) -> Generator[Part, None, None]:
    """The shards by a process per device, as they get done.

    Raises:
        Stopped: ``stop`` was set.
        JobError: a shard's processes keep dying.
        InputError: the model cannot be pickled.
        ShapleyCamError: what a worker raised.
    """
    packed = work.packed()
    context = multiprocessing.get_context("spawn")
    waiting, tries, left = deque(shards), Counter[int](), len(shards)
    # So many that no worker waits for a shard before it could tell of a finished one, however small the shards are.
    batches = -(-min(work.shard_size, len(shards) * work.shard_size) // work.settings.batch_size)
    enough = 2 + -(-(AHEAD + 2) // batches)

    def hire(device: str) -> _Worker:
        ours, theirs = context.Pipe()
        arguments = (theirs, packed, device, torch.get_num_threads(), os.getpid())
        process = context.Process(target=_serve, args=arguments, name=f"shapleycam-{device}", daemon=True)
        process.start()
        theirs.close()
        worker = _Worker(device, process, ours)
        give(worker)
        return worker

    def give(worker: _Worker) -> None:
        try:
            while waiting and len(worker.given) < enough:
                worker.given.append(waiting[0])
                worker.pipe.send(waiting.popleft())
            if not waiting and not worker.told_end:
                worker.told_end = True
                worker.pipe.send(None)
        except (BrokenPipeError, ConnectionError):  # it died; seen when its pipe is read
            pass

    workers: list[_Worker] = []
    try:
        workers += [hire(device) for device in devices[: len(shards)]]
        while left:
            ready = connection.wait([worker.pipe for worker in workers], timeout=0.2)
            if stop.is_set():
                raise Stopped
            for worker in [each for each in workers if each.pipe in ready]:
                try:
                    said = worker.pipe.recv()
                except (EOFError, ConnectionError):
                    said = None
                if isinstance(said, BaseException):
                    raise said
                if said is not None:
                    worker.given.remove(said.shard)
                    left -= 1
                    give(worker)
                    yield said
                elif worker.given or not worker.told_end:
                    _count_death(worker, tries)
                    waiting.extendleft(reversed(worker.given))
                    workers.remove(worker)
                    workers.append(hire(worker.device))
                else:  # it had nothing left to do
                    workers.remove(worker)
            if not workers and left:
                workers.append(hire(devices[0]))
    finally:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()
            worker.pipe.close()
        for half in work.out.glob(".part-*.part"):
            half.unlink(missing_ok=True)


def _count_death(worker: _Worker, tries: Counter[int]) -> None:
    worker.process.join()
    tries.update(worker.given or [-1])
    if max(tries.values()) >= _TRIES:
        raise JobError(
            f"The process on {worker.device} died {_TRIES} times at the same shards, at last with exit code "
            f"{worker.process.exitcode} (-9 is what a machine without memory left does)."
        )


def _serve(pipe: Any, packed: bytes, device: str, threads: int, parent: int) -> None:
    """The process of a worker."""
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them; the parent sees to the rest
    try:
        torch.set_num_threads(threads)
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        work: Work = torch.load(io.BytesIO(packed), map_location=device, weights_only=False)
        for part in work.runner().run_all(_asked(pipe)):
            pipe.send(part)
    except ShapleyCamError as error:
        pipe.send(error)
    except (EOFError, BrokenPipeError):  # the parent is gone
        pass
    except Exception as error:
        pipe.send(JobError(f"The process on {device} failed: {type(error).__name__}: {error}"))
        raise


def _asked(pipe: Any) -> Iterator[int]:
    while (shard := pipe.recv()) is not None:
        yield shard


def die_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends (Linux); elsewhere a closed pipe does it at the next shard."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was quicker
        os._exit(1)
