"""Graphs of programs, with a recorder that behaves on a CPU like CUDA's: fixed buffers, and results that do not last."""

import threading

import pytest
import torch

from shapleycam import Explainer, InputError, ModelStateError, ShapleyCamWarning
from shapleycam.program import Captured

from ..helpers import network


class FakeRecorder:
    """Replays write into the results of the recording. Between end and begin, and at every replay, these are garbage."""

    def __init__(self):
        self.recorded, self.replayed, self.inside, self.busy = 0, 0, False, threading.Lock()

    def record(self, function):
        self.recorded += 1
        results = function()

        def replay():
            assert self.inside, "replayed outside of begin and end"
            self.replayed += 1
            for still, new in zip(results, function(), strict=True):
                still.copy_(new)

        self.spoil = lambda: [part.fill_(-77) for part in results]
        self.spoil()
        return results, replay

    def begin(self):
        assert self.busy.acquire(blocking=False), "two calls at once"
        self.inside = True

    def end(self):
        self.inside = False
        self.spoil()
        self.busy.release()


def images(count, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def captured(targets="predicted", **options):
    program = Explainer(network(), "2").program(images(2), targets=targets, size="image")
    recorder = FakeRecorder()
    return Captured(program, images(2), recorder, **options), program, recorder


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_sizes_padding_and_the_cache():
    graphs, program, recorder = captured(limit=2)
    kept = []
    for count, sizes, recorded in [
        (4, (4,), 1),
        (3, (4,), 1),  # padded
        (2, (4,), 1),
        (1, (1, 4), 2),  # four would be wasted on it
        (4, (1, 4), 2),
        (7, (4, 8), 3),  # 1 was used longest ago
        (1, (1, 8), 4),
        (3, (1, 4), 5),
    ]:
        x = images(count, seed=count)
        found = graphs(x)
        assert graphs.sizes == sizes and recorder.recorded == recorded
        assert [len(part) for part in found] == [count] * 4
        kept.append((found, program(x)))
    for found, expected in kept:  # later calls have not touched them
        same(found, expected)
    assert recorder.replayed == 8 and graphs.reason is None and "graphs for [1, 4]" in repr(graphs)


def test_targets():
    graphs, program, recorder = captured("given")
    x = images(3)
    for targets in (None, torch.tensor([1, -1, 9]), torch.tensor([[0, 1], [2, 3], [-1, 5]]), torch.tensor([4, 0, 2])):
        same(graphs(x, targets), program(x, targets))
    assert recorder.recorded == 3  # without, one and two classes an image
    with pytest.raises(InputError, match="row for each of 3 images"):
        graphs(x, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InputError, match="int64"):
        graphs(x, torch.zeros(3))


def test_nan_stays_in_its_image():
    graphs, program, _ = captured()
    x = images(3)
    x[1, 0, 0, 0] = float("nan")
    found = graphs(x)
    assert found.raw[1].isnan().all() and found.raw[[0, 2]].isfinite().all()
    same(graphs(images(3, seed=1)), program(images(3, seed=1)))


def test_weights():
    graphs, program, recorder = captured()
    x = images(2)
    graphs(x)
    with torch.no_grad():
        program.model[0].weight.mul_(-1)
    same(graphs(x), program(x))
    assert recorder.recorded == 1  # the same memory
    program.model[0].weight = torch.nn.Parameter(program.model[0].weight.detach() * 2)
    same(graphs(x), program(x))
    assert recorder.recorded == 2
    program.model[1] = torch.nn.Tanh()
    with pytest.raises(ModelStateError, match="edited"):
        graphs(x)


def test_a_first_call_in_inference_mode():
    graphs, program, recorder = captured("given")
    x, classes = images(2), torch.tensor([1, 2])
    with torch.inference_mode():
        same(graphs(images(2, seed=1), classes), program(images(2, seed=1), classes))
    found = graphs(x, classes)
    same(found, program(x, classes))
    assert recorder.recorded == 1 and not any(part.is_inference() for part in found)
    with torch.inference_mode():
        same(graphs(x, classes), program(x, classes))


def test_nothing_is_recorded_that_autocast_keeps():
    """A graph would read the casts of the weights after autocast has freed them, and later weights never."""
    program = Explainer(network(curved=False), "2").program(images(2))  # whose model runs under autocast
    kept = []

    class Watches(FakeRecorder):
        def record(self, function):
            kept.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
            if len(kept) > 1:
                raise torch.OutOfMemoryError("on purpose")
            return super().record(function)

    graphs = Captured(program, images(2), Watches())
    with torch.autocast("cpu", torch.bfloat16):
        assert graphs(images(2)).logits.dtype == torch.bfloat16
        with pytest.raises(torch.OutOfMemoryError):
            graphs(images(8))
        assert kept == [(True, False)] * 2 and torch.is_autocast_cache_enabled()


def test_threads():
    graphs, program, _ = captured()
    wrong = []

    def work(seed):
        for count in (1, 2, 3, 4):
            x = images(count, seed)
            try:
                same(graphs(x), program(x))
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_other_images():
    graphs, _, recorder = captured()
    with pytest.raises(InputError, match=r"images \[N, 3, 8, 8\]"):
        graphs(torch.randn(2, 3, 9, 9))
    with pytest.raises(InputError, match="float64 on cpu"):
        graphs(images(2).double())
    assert recorder.recorded == 0


@pytest.mark.filterwarnings("ignore:No CUDA graphs")
def test_what_cannot_be_recorded_runs_without():
    class Refuses(FakeRecorder):
        def record(self, function):
            raise RuntimeError("operation not permitted when stream is capturing")

    program = Explainer(network(), "2").program(images(2))
    graphs = Captured(program, images(2), Refuses())
    with pytest.warns(ShapleyCamWarning, match="not permitted when stream is capturing"):
        found = graphs(images(3))
    same(found, program(images(3)))
    assert "not permitted" in graphs.reason and "without graphs" in repr(graphs)
    same(graphs(images(1)), program(images(1)))  # warned once

    class Full(FakeRecorder):
        def record(self, function):
            raise torch.OutOfMemoryError("on purpose")

    with pytest.raises(torch.OutOfMemoryError):
        Captured(program, images(2), Full())(images(2))


def test_on_a_cpu_the_program_runs():
    explainer = Explainer(network(), "2")
    graphs = explainer.capture(images(2), size="image")
    assert "the images are on cpu" in graphs.reason and graphs.sizes == ()
    torch.testing.assert_close(graphs(images(3)).maps, explainer(images(3)).heatmaps(), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="limit must be"):
        explainer.capture(images(2), limit=0)
