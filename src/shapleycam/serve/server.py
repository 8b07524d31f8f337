"""The served models and what is true of all of them; the protocols ask it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
        # One thread each, so that no answer waits behind JSON that takes long to read.
        self._aside = {stage: ThreadPoolExecutor(1, thread_name_prefix=f"shapleycam-{stage}") for stage in ("parse", "draw")}
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
        for pool in self._aside.values():
            pool.shutdown(wait=False, cancel_futures=True)
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
        allowed = self.config.limits.request_time
        allowed = allowed if timeout is None else min(timeout, allowed)
        futures = service.submit(images, questions, allowed)
        until = time.monotonic() + allowed  # after their own deadline, so that what is dropped is too late, and not cancelled
        answers: asyncio.Future[list[Answer]] = asyncio.gather(*(asyncio.wrap_future(future) for future in futures))
        gone = asyncio.ensure_future(_gone(request))
        try:
            both: set[asyncio.Future[Any]] = {answers, gone}
            done: set[asyncio.Future[Any]] = set()
            while not done and (left := until - time.monotonic()) > 0:  # uvloop's clock is late, and a wait may end early
                done, _ = await asyncio.wait(both, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if answers in done:
                for n, answer in enumerate(answers.result()):
                    _check_finite(n, answer)
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

    def hold(self, request: Request, size: int) -> None:
        """Keep room for an answer of about ``size`` bytes until it is sent; before it is computed.

        Raises:
            Refusal: 413, it is larger than an answer may be; 503, there is no room now.
        """
        most = self.config.limits.answer
        if size > most:
            raise Refusal(
                413,
                "answer",
                f"The answer would have some {size} bytes; at most {most} are given: ask for fewer or smaller maps.",
            )
        request.scope["shapleycam.hold"](size)

    async def parse(self, service: Service, work: Callable[[], A]) -> A:
        """Read a JSON request: :meth:`aside`.

        Raises:
            Refusal: 400, it is nested too deeply to be read, or told of.
        """
        try:
            return await self.aside(service, "parse", work)
        except RecursionError:
            raise Refusal(400, "json", "The request is nested too deeply.") from None

    async def aside(self, service: Service, stage: str, work: Callable[[], A]) -> A:
        """Do the work before ("parse") or after ("draw": resize, colours, PNG) the model's, on a thread of its own."""
        seconds = self.metrics.stages.labels(service.name, stage)

        def timed() -> A:
            with seconds.time():
                return work()

        return await asyncio.wrap_future(self._aside[stage].submit(timed))


def _check_finite(n: int, answer: Answer) -> None:
    found = {"prediction": answer.logits}
    if answer.explanation is not None:
        found["map"] = answer.raw
        if answer.explanation.gap is not None:
            found["completeness gap"] = answer.explanation.gap
    for name, tensor in found.items():
        if not bool(tensor.isfinite().all()):
            raise Refusal(422, "not_finite", f"The {name} of image {n} is not finite: its pixels or activations are not.")


async def _gone(request: Request) -> None:
    """Ends when the client does."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return
