"""The served models and what is true of all of them; the protocols ask it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from .batching import DeadlinePassed
from .config import ServerConfig
from .logs import log
from .metrics import CountingWatch, Metrics
from .refusals import Disconnected, Refusal
from .runtime import Question, Runtime
from .service import Answer, Service

if TYPE_CHECKING:
    from starlette.requests import Request

A = TypeVar("A")


class Server:
    """The served models and what is true of all of them; the protocols ask it.

    Args:
        config: see there.
        runtimes: what runs each of ``config.models``, by name; the first is the default. They are started by :meth:`start`.
        on_death: called from a model's thread when it dies, after which the server is not ready.
    """

    def __init__(
        self,
        config: ServerConfig,
        runtimes: Mapping[str, Runtime],
        on_death: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.config, self.metrics = config, Metrics()
        self.draining = False
        self.services = {name: self._service(name, runtime, on_death) for name, runtime in runtimes.items()}
        self._drawers = ThreadPoolExecutor(2, thread_name_prefix="shapleycam-draw")
        self.metrics.follow(
            self.ready,
            lambda: [
                (name, one.held, one.capacity, one.max_batch, one.runtime.mismatches) for name, one in self.services.items()
            ],
        )

    def _service(self, name: str, runtime: Runtime, on_death: Callable[[BaseException], None] | None) -> Service:
        told, limits = self.config.models[name], self.config.limits
        return Service(
            runtime,
            max_batch=told.max_batch,
            capacity=told.queue,
            wait=told.wait,
            timeout=limits.request_time,
            pixels=limits.pixels,
            formats=limits.formats,
            most_classes=limits.classes,
            decoders=told.decoders,
            watch=CountingWatch(self.metrics, name, log),
            on_death=on_death,
            name=name,
        )

    # ------------------------------------------------------------------------------------------------------------ life

    def start(self, timeout: float | None = None) -> None:
        """Start warming the models up; with a timeout, wait for them."""
        for service in self.services.values():
            service.start(timeout)

    def stop(self, timeout: float) -> bool:
        """Finish what was admitted, within ``timeout`` seconds for all models together."""
        self.draining = True
        until = time.monotonic() + timeout
        finished = [one.stop(max(until - time.monotonic(), 0.0)) for one in self.services.values()]
        self._drawers.shutdown(wait=all(finished), cancel_futures=True)
        return all(finished)

    def ready(self) -> bool:
        """Whether requests are wanted: every model is warm, and nothing is stopping."""
        return not self.draining and all(one.state == "ready" for one in self.services.values())

    def healthy(self) -> bool:
        """Whether there is any hope: no model has died, and none hangs."""
        return all(one.state != "dead" and one.busy_for() < self.config.stall for one in self.services.values())

    # ---------------------------------------------------------------------------------------------------------- asking

    def service(self, name: str | None) -> Service:
        """A model by name, the first without one.

        Raises:
            Refusal: 404, there is none of that name.
        """
        if name is None:
            return next(iter(self.services.values()))
        if name not in self.services:
            raise Refusal(
                404, "unknown_model", f"There is no model {name[:100]!r}: expected one of {', '.join(self.services)}."
            )
        return self.services[name]

    async def ask(
        self,
        request: Request,
        service: Service,
        images: Sequence[bytes | Tensor],
        questions: Question | Sequence[Question],
        timeout: float | None = None,
    ) -> list[Answer]:
        """The answers to the images of one request, in their order.

        When the time is over, the client goes away, or an image cannot be answered, the others are dropped.

        Raises:
            Refusal, ShapleyCamError: see :func:`shapleycam.serve.refusals.verdict`.
            Disconnected: nobody waits any more.
        """
        if len(images) > self.config.limits.instances:
            raise Refusal(413, "instances", f"At most {self.config.limits.instances} images are taken in one request.")
        allowed = self.config.limits.request_time
        allowed = allowed if timeout is None else min(timeout, allowed)
        futures = service.submit(images, questions, allowed)
        answers: asyncio.Future[list[Answer]] = asyncio.gather(*(asyncio.wrap_future(future) for future in futures))
        gone = asyncio.ensure_future(_gone(request))
        try:
            both: set[asyncio.Future[Any]] = {answers, gone}
            done, _ = await asyncio.wait(both, timeout=allowed, return_when=asyncio.FIRST_COMPLETED)
            if answers in done:
                for n, answer in enumerate(answers.result()):
                    if answer.explanation is not None and not math.isfinite(float(answer.raw.sum())):
                        raise Refusal(
                            422, "not_finite", f"The map of image {n} is not finite: its pixels or activations are not."
                        )
                return answers.result()
            if gone in done:
                raise Disconnected("The client went away.")
            raise DeadlinePassed(f"The answer was not there within {allowed:g} s.")
        finally:
            gone.cancel()
            for future in futures:
                future.cancel()
            answers.cancel()
            answers.add_done_callback(lambda done: done.cancelled() or done.exception())  # or asyncio complains

    async def draw(self, service: Service, work: Callable[[], A]) -> A:
        """Do the work that follows an answer (resize, colours, PNG) on a thread of its own."""
        began = time.perf_counter()
        done: Future[A] = self._drawers.submit(work)
        found = await asyncio.wrap_future(done)
        self.metrics.stages.labels(service.name, "draw").observe(time.perf_counter() - began)
        return found


async def _gone(request: Request) -> None:
    """Ends when the client does."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return
