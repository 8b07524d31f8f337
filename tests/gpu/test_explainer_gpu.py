"""The explainer and the operators on a CUDA device: agreement with the CPU in float64, streams, graphs, no synchronisation."""

import copy

import pytest
import torch

from shapleycam import Explainer, ops
from shapleycam.ops.shared import POOLINGS
from shapleycam.shapley import Game

from ..helpers import Split, small_heads

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: (head, engine): every engine, and token and grid layouts.
PAIRS = [
    ("pool-linear", "closed_form"),
    ("conv-bn-silu", "reverse_over_reverse"),
    ("flatten-mlp", "forward_over_reverse"),
    ("conv-bn-silu", "midpoint"),
    ("pool-linear", "quadrature"),
    ("attention", "quadrature"),
    ("attention", "reverse_over_reverse"),
]
#: Largest error over the largest value of the float64 map.
BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@pytest.fixture(autouse=True)
def _no_tf32():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def made(head, batch=3):
    torch.manual_seed(0)
    model = Split(*small_heads()[head]).eval()
    return model, torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(3))


def expected(model, images, targets, engine):
    return Explainer(copy.deepcopy(model).double(), "target", engine=engine, backend="torch")(images.double(), targets).raw


def error(raw, exact):
    return ((raw.double().cpu() - exact).abs().amax() / exact.abs().amax()).item()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("head", "engine"), PAIRS)
def test_agrees_with_the_cpu_in_float64(head, engine, memory_format):
    model, images = made(head)
    exact = expected(model, images, 1, engine)
    model = model.to(DEVICE, memory_format=memory_format)
    result = Explainer(model, "target", engine=engine)(images.to(DEVICE, memory_format=memory_format), 1)
    assert error(result.raw, exact) < BOUND[torch.float32]
    assert result.raw.device.type == DEVICE.type
    assert result.heatmaps().isfinite().all()


@pytest.mark.parametrize(("head", "engine"), [PAIRS[0], PAIRS[1]])
def test_bfloat16(head, engine):
    model, images = made(head)
    model, images = model.bfloat16(), images.bfloat16()
    exact = expected(model, images, 1, engine)
    result = Explainer(model.to(DEVICE), "target", engine=engine)(images.to(DEVICE), 1)
    assert error(result.raw, exact) < BOUND[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_each_backend_serves_the_explainer(backend):
    model, images = made("conv-bn-silu")
    exact = expected(model, images, 1, "auto")
    result = Explainer(model.to(DEVICE), "target", backend=backend)(images.to(DEVICE), 1)
    assert result.diagnostics.backend == backend
    assert error(result.raw, exact) < BOUND[torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize(("head", "engine"), PAIRS)
def test_a_prepared_call_does_not_synchronise(head, engine):
    model, images = made(head)
    explain, images = Explainer(model.to(DEVICE), "target", engine=engine), images.to(DEVICE)
    targets = torch.tensor([0, 1, 2], device=DEVICE)
    explain(images, targets)  # the first call studies the model and loads its kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for wanted in (None, 1, targets):
            explain(images, wanted)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_device_target_out_of_range_pays_nan_in_the_game():
    model, images = made("pool-linear")
    wrong = torch.tensor([0, 99, 2], device=DEVICE)
    game = Game(Explainer(model.to(DEVICE), "target"), images.to(DEVICE), wrong, cells=(2, 2))
    assert game.exact().values.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.gpu
def test_a_device_target_out_of_range_is_nan_for_its_image_only():
    model, images = made("pool-linear")
    explain, images = Explainer(model.to(DEVICE), "target"), images.to(DEVICE)
    for wrong in (5, -1, 1 << 40):
        raw = explain(images, torch.tensor([1, wrong, 1], device=DEVICE)).raw
        assert raw[1].isnan().all()
        assert raw[[0, 2]].isfinite().all()


def calls(backend):
    """Operators on fixed inputs: name -> (inputs, function of them)."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    a, g, h = (torch.rand(3, 40, 49, device=DEVICE, generator=generator) for _ in range(3))
    alpha = torch.rand(3, 2, 40, device=DEVICE, generator=generator)
    found = {row: ((a, g, h), lambda a, g, h, r=row: ops.weighted_reduce(a, g, h, r, backend=backend)) for row in POOLINGS}
    found["sum"] = ((a, alpha), lambda a, alpha: ops.channel_weighted_sum(a, alpha, backend=backend))
    found["display"] = ((a[:, 0].view(3, 7, 7),), lambda raw: ops.display_map(raw, (19, 33), backend=backend))
    found["overlay"] = (
        (torch.rand(3, 3, 7, 7, device=DEVICE, generator=generator), a[:, 1].view(3, 7, 7)),
        lambda images, heat: ops.overlay(images, heat, backend=backend),
    )
    return found


NAMES = [*POOLINGS, "sum", "display", "overlay"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_capture_in_a_graph(backend, name):
    inputs, function = calls(backend)[name]
    inputs = [t.clone() for t in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function(*inputs)  # compiles and loads what capture must not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*inputs)
    for seed in range(2):
        fresh = [torch.rand(t.shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed)) for t in inputs]
        for held, new in zip(inputs, fresh, strict=True):
            held.copy_(new)
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, function(*fresh))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_another_stream_orders_the_call(backend, name):
    """A call launched on the wrong stream would read its inputs before the delayed copies into them."""
    inputs, function = calls(backend)[name]
    right = function(*inputs)
    late = [torch.zeros_like(t) for t in inputs]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for held, new in zip(late, inputs, strict=True):
            held.copy_(new)
        out = function(*late)
    side.synchronize()
    assert torch.equal(out, right)


@pytest.mark.gpu
def test_the_explainer_on_another_stream():
    model, images = made("conv-bn-silu")
    explain, images = Explainer(model.to(DEVICE), "target"), images.to(DEVICE)
    right = explain(images, 1).raw
    late = torch.zeros_like(images)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(images)
        raw = explain(late, 1).raw
    side.synchronize()
    torch.testing.assert_close(raw, right)
