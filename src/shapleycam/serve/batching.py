"""Dynamic batching: a bounded queue in front of one function that takes a batch, which runs on a thread of its own.

No HTTP and no model in here. A batch is what has gathered while the one before it ran: a lone request waits for nothing, and
under load batches fill by themselves.

    admit (bounded) ── the caller prepares its item ── Slot.submit ── queue ── the thread: run(key, items) ── Future

Items are batched with others of the same key alone. A request that was cancelled, or whose deadline has passed, is dropped
before its work is done. When a batch fails, its items are run one by one, and only those that fail again fail; a batch that
does not fit the memory is split, and later ones are as small. What the thread cannot survive (it dies, or the device is lost)
fails everything that waits and is told by ``on_death``: a lost CUDA context comes back in a new process only, so the thread is
not restarted.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Generic, TypeVar, cast

from ..errors import InputError, ShapleyCamError
from .faults import free_memory, is_fatal, is_out_of_memory

T = TypeVar("T")
R = TypeVar("R")


class BatcherError(ShapleyCamError, RuntimeError):
    """A request was not served, for a reason that is not in the request."""


class Overloaded(BatcherError):
    """The queue is full.

    Attributes:
        retry_after: seconds after which there may be room.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlinePassed(BatcherError):
    """The request waited longer than it was worth; its work was dropped."""


class Stopped(BatcherError):
    """The batcher is not started, is stopping, or has died."""


class OutOfMemory(BatcherError):
    """One item alone does not fit the device's memory."""


class Watch:
    """What a batcher, and the service around it, tell while they work; every method may be overridden. Called from threads."""

    def prepared(self, seconds: float) -> None:
        """A picture was decoded, resized and normalised."""

    def waited(self, seconds: float) -> None:
        """An item waited so long between :meth:`Slot.submit` and its batch."""

    def ran(self, size: int, seconds: float) -> None:
        """A batch of ``size`` items was served."""

    def happened(self, event: str, error: BaseException | None = None) -> None:
        """``event`` is one of "failed_batch", "failed_item", "out_of_memory", "deadline", "cancelled", "overloaded", "died"."""


@dataclass(eq=False, slots=True)
class _Job(Generic[T, R]):
    key: Hashable
    item: T | None
    deadline: float
    future: Future[R]
    since: float = field(default_factory=time.monotonic)


class Slot(Generic[T, R]):
    """A place in the queue, taken before the item is prepared; it is free again when the item's future is done.

    Either :meth:`submit` or :meth:`release` must be called, once.
    """

    def __init__(self, batcher: Batcher[T, R]) -> None:
        self._batcher: Batcher[T, R] | None = batcher

    def submit(self, item: T, key: Hashable = None, deadline: float = math.inf) -> Future[R]:
        """Queue the item.

        Args:
            item: given to ``run`` among others of its key.
            key: batches hold one key.
            deadline: by :func:`time.monotonic`; the item is dropped if its batch has not begun by then.

        Returns:
            a future of the result. Cancelling it drops an item that has not begun. It raises :class:`DeadlinePassed`,
            :class:`Stopped`, :class:`OutOfMemory`, or what ``run`` raised for this item alone.
        """
        batcher, self._batcher = self._batcher, None
        assert batcher is not None, "a slot serves once"
        return batcher._queue_up(_Job(key, item, deadline, Future()))

    def release(self) -> None:
        """Give the place back; harmless after it was given back, or submitted."""
        batcher, self._batcher = self._batcher, None
        if batcher is not None:
            batcher._release()


class Batcher(Generic[T, R]):
    """Batches items for ``run``. Thread-safe; :meth:`start` it, and :meth:`stop` it in the end.

    Args:
        run: ``(key, items) -> results``, one per item, in their order; called on the batcher's thread only.
        max_batch: most items of a batch.
        capacity: most items admitted and not done, those of the running batch included.
        wait: seconds that a batch with room waits for more; 0 is best wherever one request alone is worth starting.
        prepare: called on the thread before the first batch (loading, warming up, measuring); returns the max_batch to use, or
            None. Nothing is admitted before it returns.
        watch: is told what happens.
        on_death: called on the thread, with the error, when the thread dies.
        name: of the thread.

    Raises:
        InputError: a number that is not positive.
    """

    def __init__(
        self,
        run: Callable[[Hashable, list[T]], Sequence[R]],
        *,
        max_batch: int = 8,
        capacity: int = 64,
        wait: float = 0.0,
        prepare: Callable[[], int | None] | None = None,
        watch: Watch | None = None,
        on_death: Callable[[BaseException], None] | None = None,
        name: str = "batcher",
    ) -> None:
        if max_batch < 1 or capacity < 1 or wait < 0:
            raise InputError(f"max_batch and capacity are positive, and wait is not negative: {max_batch}, {capacity}, {wait}.")
        self._run, self._prepare, self._on_death = run, prepare, on_death
        self._watch = watch or Watch()
        self._wait = wait
        self.max_batch, self.capacity = max_batch, capacity
        self._queue: deque[_Job[T, R]] = deque()
        self._running: list[_Job[T, R]] = []
        self._since: float | None = None  # when the running batch began
        self._held = 0
        self._pace = 0.0  # seconds per item, a moving average
        self._state = "new"  # → "starting" → "ready" → "draining" → "stopped", or "dead"
        self._error: BaseException | None = None
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)

    # ------------------------------------------------------------------------------------------------ what callers do

    def start(self, timeout: float | None = None) -> Batcher[T, R]:
        """Start the thread and, with a timeout in seconds (``math.inf`` for none), wait until it is prepared.

        Raises:
            Stopped: preparing failed (the cause is chained), or took longer than the timeout.
        """
        with self._condition:
            if self._state != "new":
                raise Stopped(f"The batcher is {self._state}; one that has been started cannot be started again.")
            self._state = "starting"
        self._thread.start()
        if timeout is not None:
            with self._condition:
                self._condition.wait_for(lambda: self._state != "starting", None if timeout == math.inf else timeout)
                if self._state != "ready":
                    raise Stopped(f"The batcher is {self._state}: {self._error or 'not prepared in time'}.") from self._error
        return self

    def admit(self, count: int = 1) -> list[Slot[T, R]]:
        """Take ``count`` places, all or none.

        Raises:
            Overloaded: there are not so many left.
            Stopped: not ready, draining, or dead.
        """
        with self._condition:
            if self._state != "ready":
                raise Stopped(f"The model is {self._state}." if self._error is None else f"The model has died: {self._error}")
            if self._held + count > self.capacity:
                self._watch.happened("overloaded")
                after = max(1, math.ceil(self._held * self._pace))
                raise Overloaded(f"The queue is full ({self._held} of {self.capacity} requests).", after)
            self._held += count
        return [Slot(self) for _ in range(count)]

    def stop(self, timeout: float = math.inf) -> bool:
        """Admit nothing more, finish what was admitted, and end the thread.

        Args:
            timeout: seconds after which what is left fails with :class:`Stopped`.

        Returns:
            whether everything was finished, and the thread ended.
        """
        until = time.monotonic() + timeout

        def left() -> float | None:
            return None if timeout == math.inf else max(until - time.monotonic(), 0.1)

        with self._condition:
            if self._state in ("starting", "ready"):
                self._state = "draining"
            finished = self._condition.wait_for(lambda: self._held == 0 or self._state == "dead", left())
            if self._state != "dead":
                self._state = "stopped"
            self._condition.notify_all()
        self._fail(Stopped("The server stopped before this request was served."))
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(left())
        return finished and not self._thread.is_alive() and self._error is None

    @property
    def state(self) -> str:
        """ "new", "starting", "ready", "draining", "stopped" or "dead"."""
        return self._state

    @property
    def held(self) -> int:
        """How many places are taken."""
        return self._held

    def busy_for(self) -> float:
        """Seconds that the running batch has taken so far; 0 without one. A model that hangs shows here."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    # -------------------------------------------------------------------------------------------------- what slots do

    def _release(self) -> None:
        with self._condition:
            self._held -= 1
            self._condition.notify_all()

    def _done(self, job: _Job[T, R]) -> None:
        if job.future.cancelled():
            with self._condition:
                if job in self._queue:  # its item must not be held until a slow batch ends
                    self._queue.remove(job)
            self._watch.happened("deadline" if time.monotonic() >= job.deadline else "cancelled")
        job.item = None  # the caller may keep the future, which holds the job
        self._release()

    def _queue_up(self, job: _Job[T, R]) -> Future[R]:
        job.future.add_done_callback(lambda _: self._done(job))
        with self._condition:
            open_ = self._state in ("ready", "draining")
            if open_:
                self._queue.append(job)
                self._condition.notify_all()
        if not open_:
            job.future.set_exception(Stopped(f"The model is {self._state}."))
        return job.future

    # ------------------------------------------------------------------------------------------- what the thread does

    def _live(self) -> None:
        try:
            if self._prepare is not None:
                self.max_batch = self._prepare() or self.max_batch
            with self._condition:
                if self._state == "starting":
                    self._state = "ready"
                self._condition.notify_all()
            while batch := self._gather():
                self._running = batch
                self._since = time.monotonic()
                self._serve(batch)
                self._since = None
                self._running = batch = []
        except BaseException as error:  # also SystemExit and KeyboardInterrupt: the thread ends, and somebody must know
            with self._condition:
                self._state, self._error = "dead", error
                self._condition.notify_all()
            self._since = None
            self._watch.happened("died", error)
            self._fail(Stopped(f"The model's thread has died ({type(error).__name__}: {error})."))
            if self._on_death is not None:
                self._on_death(error)

    def _gather(self) -> list[_Job[T, R]]:
        """The next batch: the oldest item and those of its key; [] when it is time to end."""
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._queue or self._state not in ("ready", "draining"))
                if self._state not in ("ready", "draining"):
                    return []
                late, batch = self._pick()
                until = batch[0].since + self._wait if batch else 0.0
                while len(batch) < self.max_batch and (left := until - time.monotonic()) > 0 and self._state == "ready":
                    self._queue.extendleft(reversed(batch))
                    self._condition.wait(left)
                    more, batch = self._pick()
                    late += more
                    until = until if batch else 0.0
            for job in late:
                if _begin(job.future):
                    self._watch.happened("deadline")
                    _settle(job.future, error=DeadlinePassed("The request's time was over before its turn came."))
            if batch:
                now = time.monotonic()
                for job in batch:
                    self._watch.waited(now - job.since)
                return batch

    def _pick(self) -> tuple[list[_Job[T, R]], list[_Job[T, R]]]:
        """Take from the queue what is too late, and the batch."""
        late: list[_Job[T, R]] = []
        batch: list[_Job[T, R]] = []
        others: deque[_Job[T, R]] = deque()
        now = time.monotonic()
        for job in self._queue:
            if job.deadline < now:
                late.append(job)
            elif not batch or (job.key == batch[0].key and len(batch) < self.max_batch):
                batch.append(job)
            else:
                others.append(job)
        self._queue = others
        return late, batch

    def _serve(self, batch: list[_Job[T, R]]) -> None:
        left = [[job for job in batch if _begin(job.future)]]
        while left:
            jobs = left.pop(0)
            if not jobs:
                continue
            error = self._attempt(jobs)
            # The error is looked at outside of its handler, or its traceback would hold the batch's memory.
            if error is None:
                continue
            if is_fatal(error):
                raise error
            if is_out_of_memory(error):
                self._watch.happened("out_of_memory", error)
                free_memory()
                if len(jobs) > 1:
                    half = len(jobs) // 2
                    self.max_batch = min(self.max_batch, half)
                    left[:0] = [jobs[:half], jobs[half:]]
                    continue
                _settle(jobs[0].future, error=OutOfMemory(f"One image alone does not fit the memory: {error}"))
            elif len(jobs) > 1:
                self._watch.happened("failed_batch", error)
                left[:0] = [[job] for job in jobs]
            else:
                self._watch.happened("failed_item", error)
                _settle(jobs[0].future, error=error.with_traceback(None))

    def _attempt(self, jobs: list[_Job[T, R]]) -> Exception | None:
        began = time.monotonic()
        try:
            results = self._run(jobs[0].key, cast(list[T], [job.item for job in jobs]))
            if len(results) != len(jobs):
                raise RuntimeError(f"run returned {len(results)} results for {len(jobs)} items.")
        except Exception as error:
            return error
        taken = time.monotonic() - began
        each = taken / len(jobs)
        self._pace = each if not self._pace else 0.9 * self._pace + 0.1 * each
        self._watch.ran(len(jobs), taken)
        for job, result in zip(jobs, results, strict=True):
            _settle(job.future, result)
        return None

    def _fail(self, error: BatcherError) -> None:
        """Everything that waits or runs fails."""
        with self._condition:
            jobs = [*self._running, *self._queue]
            self._queue.clear()
        for job in jobs:
            _settle(job.future, error=error)


def _begin(future: Future[R]) -> bool:
    """Whether the future still wants its result; from here on it cannot be cancelled."""
    try:
        return not future.done() and future.set_running_or_notify_cancel()
    except RuntimeError:  # stop() was faster
        return False


def _settle(future: Future[R], result: R | None = None, error: BaseException | None = None) -> None:
    """Give a future its end, unless :meth:`Batcher.stop`, which does not wait for ever, has given it one."""
    try:
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)
    except InvalidStateError:
        pass
