"""The batcher alone: plain functions in the place of a model."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, RuntimeException

from shapleycam import ShapleyCamError
from shapleycam.serve import Batcher, DeadlinePassed, OutOfMemory, Overloaded, Stopped, Watch, tune


class Seen(Watch):
    def __init__(self) -> None:
        self.events: list[str] = []
        self.sizes: list[int] = []

    def ran(self, size: int, seconds: float) -> None:
        self.sizes.append(size)

    def happened(self, event: str, error: BaseException | None = None) -> None:
        self.events.append(event)


class Gate:
    """A ``run`` that doubles its items, keeps what it saw, and waits at a gate."""

    def __init__(self, fault: Callable[[list[Any]], None] = lambda items: None) -> None:
        self.open, self.entered, self.fault = threading.Event(), threading.Semaphore(0), fault
        self.batches: list[tuple[Hashable, list[Any]]] = []

    def __call__(self, key: Hashable, items: list[Any]) -> list[Any]:
        self.batches.append((key, list(items)))
        self.entered.release()
        assert self.open.wait(20)
        self.fault(items)
        return [2 * item for item in items]


def held_at(gate: Gate, batcher: Batcher[Any, Any], item: Any = 1000) -> Any:
    """Send an item and return when it stands at the gate: what is submitted from here on gathers behind it."""
    [slot] = batcher.admit()
    future = slot.submit(item)
    assert gate.entered.acquire(timeout=10)
    return future


def test_what_gathers_while_a_batch_runs_is_the_next_batch_in_order() -> None:
    gate, seen = Gate(), Seen()
    batcher = Batcher(gate, max_batch=3, watch=seen).start(10)
    first = held_at(gate, batcher)
    futures = [slot.submit(i) for i, slot in enumerate(batcher.admit(5))]
    gate.open.set()
    assert [future.result(10) for future in [first, *futures]] == [2000, 0, 2, 4, 6, 8]
    assert [items for _, items in gate.batches] == [[1000], [0, 1, 2], [3, 4]]
    assert batcher.stop() and batcher.state == "stopped" and batcher.held == 0
    assert seen.sizes == [1, 3, 2] and seen.events == []


def test_a_batch_has_one_key_and_the_oldest_goes_first() -> None:
    gate = Gate()
    with_keys = Batcher(gate, max_batch=8).start(10)
    held_at(gate, with_keys)
    for item, key in enumerate("abcabca"):
        with_keys.admit()[0].submit(item, key)
    gate.open.set()
    assert with_keys.stop()
    assert gate.batches[1:] == [("a", [0, 3, 6]), ("b", [1, 4]), ("c", [2, 5])]


def test_a_lone_item_does_not_wait_and_a_batch_with_room_waits_as_long_as_told() -> None:
    gate = Gate()
    gate.open.set()
    batcher = Batcher(gate, max_batch=2, wait=20.0).start(10)
    one, two = (slot.submit(i) for i, slot in enumerate(batcher.admit(2)))
    assert [one.result(10), two.result(10)] == [0, 2]  # full: nothing to wait for
    assert gate.batches == [(None, [0, 1])]
    alone = batcher.admit()[0].submit(5)
    assert batcher.stop()  # stopping ends the wait
    assert alone.result(0) == 10


def test_a_full_queue_refuses_before_anything_is_prepared_and_says_when_to_come_back() -> None:
    gate, seen = Gate(), Seen()
    batcher = Batcher(gate, max_batch=1, capacity=3, watch=seen).start(10)
    held_at(gate, batcher)
    slots = batcher.admit(2)
    with pytest.raises(Overloaded, match=r"3 of 3") as refused:
        batcher.admit()
    assert refused.value.retry_after >= 1 and isinstance(refused.value, ShapleyCamError)
    slots[0].release()
    slots[0].release()  # twice is once
    with pytest.raises(Overloaded):
        batcher.admit(2)  # all or none
    [again] = batcher.admit()
    again.release()
    slots[1].release()
    assert batcher.held == 1 and seen.events == ["overloaded"] * 2
    gate.open.set()
    assert batcher.stop()


def test_a_passed_deadline_drops_the_work() -> None:
    gate, seen = Gate(), Seen()
    batcher = Batcher(gate, watch=seen).start(10)
    held_at(gate, batcher)
    late, good = batcher.admit(2)
    late_future = late.submit("late", deadline=time.monotonic() - 1)
    good_future = good.submit("good", deadline=time.monotonic() + 60)
    gate.open.set()
    with pytest.raises(DeadlinePassed):
        late_future.result(10)
    assert good_future.result(10) == "goodgood"
    assert [items for _, items in gate.batches] == [[1000], ["good"]] and seen.events == ["deadline"]
    assert batcher.stop()


def test_cancelling_drops_the_work_and_the_memory_at_once() -> None:
    class Big:
        pass

    gate, seen = Gate(), Seen()
    batcher = Batcher(gate, capacity=2, watch=seen).start(10)
    held_at(gate, batcher)
    item = Big()
    alive = weakref.ref(item)
    future = batcher.admit()[0].submit(item)
    del item
    assert future.cancel()
    gc.collect()
    assert alive() is None and batcher.held == 1
    gate.open.set()
    assert batcher.stop() and len(gate.batches) == 1 and seen.events == ["cancelled"]
    with pytest.raises(CancelledError):
        future.result(0)


def test_a_poisoned_batch_fails_only_the_bad_one() -> None:
    def fault(items: list[Any]) -> None:
        if "bad" in items:
            raise ValueError("poison")

    gate, seen = Gate(fault), Seen()
    batcher = Batcher(gate, watch=seen).start(10)
    held_at(gate, batcher)
    futures = [slot.submit(item) for slot, item in zip(batcher.admit(4), ["a", "bad", "b", "c"], strict=True)]
    gate.open.set()
    with pytest.raises(ValueError, match="poison"):
        futures[1].result(10)
    assert [futures[i].result(10) for i in (0, 2, 3)] == ["aa", "bb", "cc"]
    assert seen.events == ["failed_batch", "failed_item"]
    assert batcher.stop() and batcher.held == 0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError,
        MemoryError,
        lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        lambda: RuntimeException("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer"),
        lambda: Fail("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory ; GPU=0"),
    ],
)
def test_a_batch_that_does_not_fit_is_split_and_later_ones_are_smaller(error: Callable[[], Exception]) -> None:
    def fault(items: list[Any]) -> None:
        if len(items) > 2 or "huge" in items:
            raise error()

    gate, seen = Gate(fault), Seen()
    batcher = Batcher(gate, max_batch=8, watch=seen).start(10)
    held_at(gate, batcher)
    futures = [slot.submit(item) for slot, item in zip(batcher.admit(8), [*range(7), "huge"], strict=True)]
    gate.open.set()
    assert [future.result(10) for future in futures[:7]] == [2 * i for i in range(7)]
    with pytest.raises(OutOfMemory):
        futures[7].result(10)
    assert batcher.max_batch == 1  # halved until all but the huge one went well
    assert [items for _, items in gate.batches[1:5]] == [[*range(7), "huge"], [0, 1, 2, 3], [0, 1], [2, 3]]
    assert set(seen.events) == {"out_of_memory"}
    assert batcher.stop()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_a_dead_thread_fails_all_that_waits_and_is_told(error: BaseException) -> None:
    def fault(items: list[Any]) -> None:
        raise error

    gate, seen, told = Gate(fault), Seen(), threading.Event()
    batcher = Batcher(gate, watch=seen, on_death=lambda _: told.set()).start(10)
    running = held_at(gate, batcher)
    waiting = batcher.admit()[0].submit(1)
    gate.open.set()
    for future in (running, waiting):
        with pytest.raises(Stopped, match=type(error).__name__):
            future.result(10)
    assert told.wait(10) and batcher.state == "dead" and batcher.held == 0
    with pytest.raises(Stopped, match="died"):
        batcher.admit()
    assert not batcher.stop()
    assert seen.events == ["died"]


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="this torch has no error for a lost device")
def test_a_lost_device_is_a_dead_thread() -> None:
    def run(key: Hashable, items: list[Any]) -> list[Any]:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    batcher = Batcher(run).start(10)
    with pytest.raises(Stopped):
        batcher.admit()[0].submit(1).result(10)
    assert batcher.state == "dead"


@pytest.mark.parametrize(
    "error",
    [
        Fail("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 700: an illegal memory access was encountered ; GPU=0"),
        Fail("[ONNXRuntimeError] : 1 : FAIL : CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED ; GPU=0"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
    ],
)
def test_a_device_that_onnx_runtime_has_lost_is_a_dead_thread_too(error: Exception) -> None:
    def run(key: Hashable, items: list[Any]) -> list[Any]:
        raise error

    batcher = Batcher(run).start(10)
    with pytest.raises(Stopped):
        batcher.admit()[0].submit(1).result(10)
    assert batcher.state == "dead"


@pytest.mark.parametrize(
    "error",
    [
        Fail("[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Reshape node."),
        ValueError("the user wrote: CUDA failure 700"),
    ],
)
def test_other_errors_are_of_one_item(error: Exception) -> None:
    def run(key: Hashable, items: list[Any]) -> list[Any]:
        raise error

    batcher = Batcher(run).start(10)
    with pytest.raises(type(error)):
        batcher.admit()[0].submit(1).result(10)
    assert batcher.state == "ready" and batcher.stop()


def test_too_few_results_are_an_error_and_nobody_gets_anothers() -> None:
    batcher = Batcher(lambda key, items: [], max_batch=2).start(10)
    with pytest.raises(RuntimeError, match="0 results for 1"):
        batcher.admit()[0].submit(1).result(10)
    assert batcher.stop()


def test_preparing_comes_first_on_the_same_thread_and_sets_the_batch() -> None:
    threads = []

    def prepare() -> int:
        threads.append(threading.current_thread())
        return 5

    def run(key: Hashable, items: list[Any]) -> list[Any]:
        threads.append(threading.current_thread())
        return items

    batcher = Batcher(run, prepare=prepare)
    with pytest.raises(Stopped, match="new"):
        batcher.admit()
    batcher.start(10)
    assert batcher.max_batch == 5
    assert batcher.admit()[0].submit(7).result(10) == 7
    assert threads[0] is threads[1] is not threading.current_thread()
    assert batcher.stop()
    with pytest.raises(Stopped, match="stopped"):
        batcher.start()


def test_a_failed_preparation_is_told() -> None:
    def prepare() -> int:
        raise ShapleyCamError("no such layer")

    batcher = Batcher(lambda key, items: items, prepare=prepare)
    with pytest.raises(Stopped, match="no such layer") as told:
        batcher.start(10)
    assert isinstance(told.value.__cause__, ShapleyCamError)


def test_stopping_drains_and_after_its_time_fails_what_is_left() -> None:
    gate = Gate()
    batcher = Batcher(gate, max_batch=1).start(10)
    running = held_at(gate, batcher)
    waiting = batcher.admit()[0].submit(1)
    assert batcher.busy_for() > 0
    assert not batcher.stop(timeout=0.05)
    for future in (running, waiting):
        with pytest.raises(Stopped):
            future.result(0)
    gate.open.set()  # the thread comes back, and nobody wants its result
    batcher._thread.join(10)
    assert not batcher._thread.is_alive() and batcher.state == "stopped" and batcher.busy_for() == 0


def test_stopping_has_one_time_for_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    batcher = Batcher(gate, max_batch=1).start(10)
    stuck = held_at(gate, batcher)
    waited: list[float] = []
    join = batcher._thread.join
    monkeypatch.setattr(batcher._thread, "join", lambda seconds: (waited.append(seconds), join(seconds)))
    assert not batcher.stop(1.0)  # all of which goes into waiting for the one that is stuck
    assert len(waited) == 1 and waited[0] < 0.5
    with pytest.raises(Stopped):
        stuck.result(10)
    gate.open.set()


def test_many_threads_get_their_own_answers() -> None:
    batcher = Batcher(lambda key, items: [(key, item) for item in items], max_batch=7, capacity=50).start(10)
    wrong: list[Any] = []

    def client(number: int) -> None:
        for i in range(50):
            while True:
                try:
                    [slot] = batcher.admit()
                    break
                except Overloaded:
                    time.sleep(0.001)
            if slot.submit((number, i), key=number % 3).result(10) != (number % 3, (number, i)):
                wrong.append((number, i))

    threads = [threading.Thread(target=client, args=(n,)) for n in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong and batcher.held == 0 and batcher.stop()


def test_tuning_takes_the_smallest_batch_that_is_as_fast_as_any(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def chosen(cost: Callable[[int], float], **options: Any) -> tuple[int, dict[int, float]]:
        def run(size: int) -> None:
            now[0] += cost(size)

        return tune(run, **options)

    assert chosen(lambda n: 10 + n)[0] == 32  # a launch that all share
    best, found = chosen(lambda n: n)
    assert best == 1 and found == pytest.approx({1: 1, 2: 1, 4: 1, 8: 1, 16: 1, 32: 1})
    best, found = chosen(lambda n: n * n)  # batching hurts: no need to try the large ones
    assert best == 1 and list(found) == [1, 2]
    assert chosen(lambda n: max(n, 4))[0] == 4


def test_tuning_stops_at_the_memory_and_lets_other_errors_through() -> None:
    def run(size: int) -> None:
        if size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    best, found = tune(run, rounds=1)
    assert list(found) == [1, 2, 4] and best in found
    with pytest.raises(ZeroDivisionError):
        tune(lambda size: 1 / 0)


@pytest.mark.parametrize("bad", [{"max_batch": 0}, {"capacity": 0}, {"wait": -1.0}])
def test_numbers_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ShapleyCamError, match="positive"):
        Batcher(lambda key, items: items, **bad)
