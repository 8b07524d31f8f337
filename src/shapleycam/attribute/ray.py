"""The data-set job on a Ray cluster: the same worker class in actors; where actors run, and that they are gone, Ray knows.

The source and the result's folder must be reachable from every node under the same names.
"""

from __future__ import annotations

import io
import os
import threading
from collections import Counter, deque
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError, JobError, ShapleyCamError
from ..optional import need
from .feed import Stopped
from .part import Part
from .processes import die_with

if TYPE_CHECKING:
    from .job import ShardRunner
    from .local import Work

_RETRIES = 4  # of a shard whose actor or node was lost
_TICK = 0.5


def on_ray(
    work: Work, shards: Sequence[int], devices: Sequence[str], address: str | None, stop: threading.Event
) -> Generator[Part, None, None]:
    """The shards by actors, as they get done: one per GPU of the cluster, or per CPU where the model is on one, or per device.

    Args:
        work: see there.
        shards: what to do.
        devices: how many actors, and whether on GPUs; empty for all that the cluster has.
        address: of a cluster; None for the one this process is connected to, or a new one on this machine.
        stop: ends it.

    Raises:
        Stopped: ``stop`` was set.
        InputError: Ray is not installed, or the cluster cannot be reached or has no such device.
        JobError: Ray gave up on a shard.
        ShapleyCamError: what a worker raised.
    """
    ray = need("ray", "ray")
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"Ray at {address or 'this machine'} cannot be reached: {error}") from error
    actors: list[Any] = []
    try:
        on_gpu = (devices[0] if devices else next(work.classifier.model.parameters()).device.type).startswith("cuda")
        kind = "GPU" if on_gpu else "CPU"
        there = int(ray.cluster_resources().get(kind, 0))
        if on_gpu and not there:
            raise InputError("The Ray cluster has no GPU: use --device cpu, or another --address.")
        threads = torch.get_num_threads()
        count = len(devices) or (there if on_gpu else max(there // threads, 1))
        # By value what the script that is run defines itself, such as a model's class, which no other process can import.
        packed = work.packed(need("ray.cloudpickle", "ray"))
        options: dict[str, Any] = {"num_gpus": 1} if on_gpu else {"num_cpus": min(threads, max(there // count, 1))}
        remote = ray.remote(**options)(_Actor)
        content = ray.put(packed)
        # A shard goes to an actor that has answered: one that replaces a lost one may wait long for a place.
        waiting = deque(shards)
        idle: list[Any] = []
        running: dict[Any, tuple[Any, int | None]] = {}

        def hire() -> None:
            actors.append(remote.remote(content, "cuda" if on_gpu else "cpu", threads))
            running[actors[-1].ready.remote()] = actors[-1], None

        for _ in range(min(count, len(shards))):
            hire()
        tries: Counter[int | None] = Counter()
        while waiting or any(shard is not None for _, shard in running.values()):
            if stop.is_set():
                raise Stopped
            for done in ray.wait(list(running), timeout=_TICK)[0]:
                actor, shard = running.pop(done)
                try:
                    part: Part | None = ray.get(done)
                except ray.exceptions.RayActorError as error:
                    tries[shard] += 1
                    if tries[shard] > (_RETRIES if shard is not None else _RETRIES * count):
                        raise JobError(f"Ray gave up: {error}") from error
                    actors.remove(actor)
                    ray.kill(actor)
                    hire()
                    if shard is not None:
                        waiting.append(shard)
                    continue
                idle.append(actor)
                if part is not None:
                    yield part
            while waiting and idle:
                actor, shard = idle.pop(), waiting.popleft()
                running[actor.run.remote(shard)] = actor, shard
    except ShapleyCamError as error:
        raise getattr(error, "cause", error) from None  # Ray's own class around it has its traceback as a text
    except ray.exceptions.RayError as error:
        raise JobError(f"Ray gave up: {error}") from error
    finally:
        for actor in actors:
            ray.kill(actor)
        if ours:
            ray.shutdown()


class _Actor:
    """A worker in one of Ray's processes."""

    def __init__(self, packed: bytes, device: str, threads: int) -> None:
        die_with(os.getppid())  # Ray's own process on this node, of whose sudden end actors take long to hear
        torch.set_num_threads(threads)
        self._work: Work = torch.load(io.BytesIO(packed), map_location=device, weights_only=False)
        self._runner: ShardRunner | None = None

    def ready(self) -> None:
        """Answers once the actor has its place."""

    def run(self, shard: int) -> Part:
        if self._runner is None:  # not in the constructor, whose errors lose their class on the way
            self._runner = self._work.runner()
        return self._runner.run(shard)
