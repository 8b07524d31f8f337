"""One contract for every backend: each operator, dtype and layout against float64, on awkward shapes."""

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shapleycam import BackendError, DerivativeError, InputError, ops
from shapleycam.ops import reference
from shapleycam.ops.shared import POOLINGS

from ..helpers import TOLERANCE, available

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
REGISTERED = torch.ops.shapleycam
LAYOUTS = ["first", "last", "tokens", "misaligned", "transposed"]


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = available("weighted_reduce", DEVICE)


def test_the_backends_that_must_be_here_are():
    assert {"torch", "triton", "native" if DEVICE == "cpu" else "cuda"} <= set(BACKENDS)


def place(values, layout):
    """``values`` [N, C, S] in another layout, as a view with the same shape."""
    n, c, s = values.shape
    if layout == "first":
        return values.clone()
    if layout == "last":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "tokens":  # two prefix tokens, skipped by stride arithmetic
        stored = torch.full((n, s + 2, c), float("nan"), dtype=values.dtype, device=values.device)
        stored[:, 2:] = values.transpose(1, 2)
        return stored[:, 2:].transpose(1, 2)
    if layout == "misaligned":
        stored = torch.full((values.numel() + 1,), float("nan"), dtype=values.dtype, device=values.device)
        stored[1:] = values.flatten()
        return stored[1:].view(n, c, s)
    # no unit stride at all
    stored = torch.full((s, n, c, 2), float("nan"), dtype=values.dtype, device=values.device)
    stored[..., 0] = values.permute(2, 0, 1)
    return stored[..., 0].permute(1, 2, 0)


def draw(shape, dtype, seed=0, positive=False):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # Rows that divide by a sum of activations are ill-conditioned where it vanishes; ReLU features do not.
    values = values.abs() + 0.1 if positive else values
    return values.to(dtype).to(DEVICE)


def poisoned(monkeypatch):
    """Every output and every workspace is full of NaN before the call."""
    empty = torch.empty

    def fill(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(0xFF)

    monkeypatch.setattr(torch, "empty", fill)


def check(result, expected, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.dtype == wide and result.is_contiguous()
    rtol, atol = TOLERANCE[wide]
    scale = expected.abs().amax().clamp_min(1.0).item() if expected.numel() else 1.0
    torch.testing.assert_close(result.double(), expected, rtol=rtol, atol=atol * scale)


def exact(activations, gradient, hvp, pooling):
    wide = [None if t is None else t.double() for t in (activations, gradient, hvp)]
    return reference.weighted_reduce(*wide, pooling)


#: All combinations; of Triton's, which the interpreter is slow at, every pair of a pooling, a layout and a dtype.
REDUCED = [
    (backend, pooling, dtype, layout)
    for backend in BACKENDS
    for (i, pooling), (j, dtype), (k, layout) in itertools.product(*map(enumerate, (POOLINGS, DTYPES, LAYOUTS)))
    if backend != "triton" or DEVICE != "cpu" or (i + j + k) % len(DTYPES) == 0
]


def test_every_pair_is_tried_on_every_backend():
    for backend in BACKENDS:
        tried = [cell[1:] for cell in REDUCED if cell[0] == backend]
        for (i, one), (j, other) in itertools.combinations(enumerate((POOLINGS, DTYPES, LAYOUTS)), 2):
            assert {(cell[i], cell[j]) for cell in tried} == set(itertools.product(one, other))


@pytest.mark.parametrize(("backend", "pooling", "dtype", "layout"), REDUCED, ids=str)
def test_weighted_reduce(backend, pooling, dtype, layout, monkeypatch):
    shape = (3, 37, 49)
    a, g, h = draw(shape, dtype, 0, positive=True), draw(shape, dtype, 1), draw(shape, dtype, 2)
    poisoned(monkeypatch)
    for hvp in (h, None):
        placed = [None if t is None else place(t, layout) for t in (a, g, hvp)]
        result = ops.weighted_reduce(*placed, pooling, backend=backend)
        check(result, exact(a, g, hvp, pooling), dtype)
        assert torch.equal(result, ops.weighted_reduce(*placed, pooling, backend=backend)), "not deterministic"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_mixed_layouts_and_dtypes_and_constant_weights(backend, pooling):
    a = draw((2, 19, 21), torch.bfloat16, 0, positive=True)
    g, h = draw((2, 19, 21), torch.float32, 1), draw((2, 19, 21), torch.float16, 2)
    result = ops.weighted_reduce(place(a, "last"), place(g, "first"), place(h, "tokens"), pooling, backend=backend)
    check(result, exact(a, g, h, pooling), torch.bfloat16)
    g, h = (t[:, :, :1].expand_as(a) for t in (g, h))
    for layout in ("first", "last"):
        check(
            ops.weighted_reduce(place(a, layout), g, h, pooling, backend=backend),
            exact(a, g, h, pooling),
            torch.bfloat16,
        )
    mixed = ops.weighted_reduce(a.double(), g, h, pooling, backend=backend)
    check(mixed, exact(a, g, h, pooling), torch.float64)


SHAPES = st.tuples(st.integers(0, 5), st.integers(1, 70), st.integers(1, 70))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    shape=SHAPES,
    pooling=st.sampled_from(POOLINGS),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    second=st.booleans(),
)
def test_weighted_reduce_on_any_shape(backend, shape, pooling, layouts, dtypes, second):
    values = [draw(shape, dtype, i, positive=i == 0) for i, dtype in enumerate(dtypes)]
    a, g, h = (place(v, layout) for v, layout in zip(values, layouts, strict=True))
    h = h if second else None
    result = ops.weighted_reduce(a, g, h, pooling, backend=backend)
    assert result.shape == (shape[0], shape[2])
    check(result, exact(a, g, h, pooling), dtypes[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1500, 5), (1, 5, 2500), (2, 2100, 3), (9, 130, 3), (1, 2048, 49)])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_more_than_one_block(backend, shape, layout):
    """Shapes beyond one block, tile or piece of any backend."""
    if backend == "triton" and DEVICE == "cpu":
        # The interpreter is slow. These are several pieces of channels, the last one ragged, and several tiles of positions.
        shape = tuple(map(min, shape, (3, 130, 600)))
    a, g, h = draw(shape, torch.float32, 0, positive=True), draw(shape, torch.float32, 1), draw(shape, torch.float32, 2)
    for pooling in POOLINGS:
        result = ops.weighted_reduce(*(place(t, layout) for t in (a, g, h)), pooling, backend=backend)
        check(result, exact(a, g, h, pooling), torch.float32)
    alpha = draw((shape[0], 3, shape[1]), torch.float32, 3)
    check(
        ops.channel_weighted_sum(place(a, layout), alpha, backend=backend),
        reference.channel_weighted_sum(a.double(), alpha.double()),
        torch.float32,
    )


EXTENTS = [(2, 96, 49), (2, 64, 16), (3, 40, 196), (1, 24, 784), (1, 8, 1032), (5, 8, 1), (1, 328, 9)]
# One Triton kernel serves all extents, and compiling (or interpreting) every variant once more takes minutes.
ON_EXTENTS = [
    (backend, dtype, shape)
    for backend, dtype, shape in itertools.product(BACKENDS, DTYPES[:3], EXTENTS)
    if backend != "triton" or (dtype == torch.bfloat16 and shape in EXTENTS[:2])
]


@pytest.mark.parametrize(("backend", "dtype", "shape"), ON_EXTENTS, ids=str)
@pytest.mark.parametrize("layout", ["first", "last"])
def test_extents_of_networks(backend, dtype, layout, shape, monkeypatch):
    """Channels in whole vectors and images that are one run of memory: what kernels with wide loads take."""
    poolings = ("mean", "plusplus") if backend == "triton" else POOLINGS
    a, g, h = draw(shape, dtype, 0, positive=True), draw(shape, dtype, 1), draw(shape, dtype, 2)
    placed = [place(t, layout) for t in (a, g, h)]
    alphas = [draw((shape[0], rows, shape[1]), torch.float32, 3) for rows in (1, 3, 6)]
    poisoned(monkeypatch)
    for pooling in poolings:
        for used in (placed, [*placed[:2], None]):
            result = ops.weighted_reduce(*used, pooling, backend=backend)
            check(result, exact(a, g, None if used[2] is None else h, pooling), dtype)
            assert torch.equal(result, ops.weighted_reduce(*used, pooling, backend=backend)), "not deterministic"
    for alpha in alphas:
        expected = reference.channel_weighted_sum(a.double(), alpha.double())
        check(ops.channel_weighted_sum(placed[0], alpha, backend=backend), expected, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_channel_weighted_sum(backend, dtype, layout, monkeypatch):
    a, alpha = draw((3, 37, 49), dtype), draw((3, 2, 37), torch.float32, 1)
    expected = reference.channel_weighted_sum(a.double(), alpha.double())
    poisoned(monkeypatch)
    check(ops.channel_weighted_sum(place(a, layout), alpha, backend=backend), expected, dtype)
    strided = alpha.transpose(1, 2).contiguous().transpose(1, 2)
    check(ops.channel_weighted_sum(place(a, layout), strided, backend=backend), expected, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(shape=SHAPES, rows=st.integers(0, 4), layout=st.sampled_from(LAYOUTS), dtype=st.sampled_from(DTYPES))
def test_channel_weighted_sum_on_any_shape(backend, shape, rows, layout, dtype):
    a, alpha = draw(shape, dtype), draw((shape[0], rows, shape[1]), dtype, 1)
    result = ops.channel_weighted_sum(place(a, layout), alpha, backend=backend)
    assert result.shape == (shape[0], rows, shape[2])
    check(result, reference.channel_weighted_sum(a.double(), alpha.double()), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_nan_and_inf_come_out_where_the_reference_puts_them(backend, pooling, layout, bad, where):
    parts = [draw((2, 9, 7), torch.float32, i, positive=i == 0) for i in range(3)]
    parts[where][1, 3, 2] = bad
    placed = [place(p, layout) for p in parts]
    result = ops.weighted_reduce(*placed, pooling, backend=backend).double()
    expected = exact(*parts, pooling)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.isinf(), expected.isinf())
    finite = expected.isfinite()
    torch.testing.assert_close(result[finite], expected[finite], rtol=1e-4, atol=1e-4)
    assert torch.equal(result[expected.isinf()].sign(), expected[expected.isinf()].sign())


def test_native_results_do_not_depend_on_the_number_of_threads():
    # Large enough that five threads have something to do (csrc/cpu/parallel.h).
    a, g, h = (draw((1, 2048, 2600), torch.float32, i).cpu() for i in range(3))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append([ops.weighted_reduce(a, g, h, p, backend="native") for p in POOLINGS])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_native_calls_run_in_pytorchs_own_pool():
    # Threads beside those of PyTorch, which spin for a while after every operator, would compete with them for the cores.
    a, g, h = (draw((4, 2048, 400), torch.float32, i).cpu() for i in range(3))

    def call(_):
        return ops.weighted_reduce(a, g, h, "mean", backend="native")

    def count_threads():  # in a thread of its own, which has no team yet
        torch.set_num_threads(3)
        counts = [len(os.listdir("/proc/self/task"))]
        for act in (call, lambda _: a + g):
            act(None)
            counts.append(len(os.listdir("/proc/self/task")))
        return counts

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as one:
            first, ours, torchs = one.submit(count_threads).result()
        with ThreadPoolExecutor(4) as four:
            found = list(four.map(call, range(16)))
    finally:
        torch.set_num_threads(before)
    assert (ours - first, torchs - ours) == (2, 0)  # the team that our call started stays, and serves PyTorch
    assert all(torch.equal(other, found[0]) for other in found)


def test_native_calls_find_a_pool_that_is_loaded_privately():
    # As in PyTorch's packages for Arm: loaded, but not among the symbols that everybody sees. Run without PyTorch.
    loaded = (Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines())
    # Not one that another package brought for itself under a name of its own, such as libgomp-e985bcbb.so.1.0.0.
    runtime = next(str(path) for path in loaded if path.name.startswith(("libgomp.so", "libomp.so", "libiomp5.so")))
    script = """
import ctypes, os, sys
from importlib.util import module_from_spec, spec_from_file_location

native = module_from_spec(spec := spec_from_file_location("_native", sys.argv[1]))
spec.loader.exec_module(native)
ctypes.CDLL(sys.argv[2], mode=os.RTLD_LOCAL | os.RTLD_NOW)
n, c, s = 4, 2048, 200
a, alpha, out, workspace = ((ctypes.c_float * k)() for k in (n * c * s, n * c, n * s, n * c * s))
a[0], alpha[0] = 3.0, 2.0
view = (ctypes.addressof(a), 0, c * s, s, 1)
before = len(os.listdir("/proc/self/task"))
rest = ctypes.addressof(workspace), ctypes.sizeof(workspace), 3
status = native.channel_weighted_sum_cpu(view, ctypes.addressof(alpha), n, c, s, 1, ctypes.addressof(out), 0, *rest)
print(status, out[0], out[1], len(os.listdir("/proc/self/task")) - before)
"""
    command = [sys.executable, "-c", script, find_spec("shapleycam._native").origin, runtime]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["0", "6.0", "0.0", "2"]  # the two threads of the pool stay


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["first", "last"])
def test_offsets_beyond_32_bits(backend, layout):
    # Four images 2**30 elements apart: neither an offset nor a product of an index and a stride fits an int. The memory between
    # them is never touched, so a CPU does not hold it.
    n, c, s = 4, 3, 5
    strides = (s, 1) if layout == "first" else (1, c)
    try:
        stored = torch.empty(3 * 2**30 + 3 * c * s, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"6 GiB cannot be had here: {error}")
    a, g, h = (stored.as_strided((n, c, s), (2**30, *strides), k * c * s) for k in range(3))
    for k, view in enumerate((a, g, h)):
        view.copy_(draw((n, c, s), torch.bfloat16, k))
    found = ops.weighted_reduce(a, g, h, "mean", backend=backend)
    check(found, exact(a.contiguous(), g.contiguous(), h.contiguous(), "mean"), torch.float32)
    alpha = draw((n, 2, c), torch.float32, 3)
    found = ops.channel_weighted_sum(a, alpha, backend=backend)
    check(found, torch.einsum("nmc,ncs->nms", alpha.double(), a.double()), torch.float32)


# ------------------------------------------------------------------------------------------------------ torch.library


def samples():
    a, g, h = (draw((2, 5, 12), torch.float32, i) for i in range(3))
    alpha = draw((2, 3, 5), torch.float32, 3)
    backend = "native" if DEVICE == "cpu" else "cuda"
    yield REGISTERED.weighted_reduce.default, (a, g, h, "mean", backend)
    yield REGISTERED.weighted_reduce.default, (a, g, None, "plusplus", "torch")
    yield REGISTERED.channel_weighted_sum.default, (a, alpha, backend)
    yield REGISTERED.display_map.default, (a[:, 0].unflatten(1, (3, 4)), [7, 9], True, None, "auto")
    yield REGISTERED.display_map.default, (a[:, 0].unflatten(1, (3, 4)), [7, 9], False, torch.uint8, "torch")
    images, heat = draw((2, 3, 4, 5), torch.float32), draw((2, 4, 5), torch.float32, positive=True)
    yield REGISTERED.overlay.default, (images, heat, "jet", 0.5, None, None, "auto")
    yield REGISTERED.overlay.default, (images, heat, "jet", 0.5, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7], "torch")


@pytest.mark.parametrize("sample", list(samples()), ids=lambda s: f"{s[0].name()}-{s[1][-1]}")
def test_opcheck(sample):
    torch.library.opcheck(*sample)


def test_compile_without_graph_breaks():
    def maps(a, g, h, alpha):
        raw = ops.weighted_reduce(a, g, h, "mean").unflatten(1, (3, 4))
        more = ops.channel_weighted_sum(a, alpha).unflatten(2, (3, 4))
        heat = ops.display_map(raw + 1, (6, 8))
        return heat, ops.display_map(more[:, 0], (5, 5)), ops.overlay(images, heat)

    a, g, h = (draw((2, 5, 12), torch.float32, i) for i in range(3))
    alpha = draw((2, 3, 5), torch.float32, 3)
    images = draw((2, 3, 6, 8), torch.float32, 4)
    compiled = torch.compile(maps, fullgraph=True)
    for one, other in zip(compiled(a, g, h, alpha), maps(a, g, h, alpha), strict=True):
        torch.testing.assert_close(one, other)


# ------------------------------------------------------------------------------------------------------- bad arguments


def test_bad_arguments():
    a = torch.zeros(2, 3, 4)
    for arguments, match in [
        ((a[0], a[0]), r"\[N, C, S\]"),
        ((a[:, :0], a[:, :0]), "C, S >= 1"),
        ((a, a[:, :2]), r"gradient must be \(2, 3, 4\).*expand_as"),
        ((a, a, a.to("meta")), "hvp must be"),
        ((a.long(), a), "activations must be float16"),
        ((a, a.bool()), "gradient must be float16"),
        ((a, a, None, "max"), "unknown pooling 'max'"),
        (([1.0], a), "must be a torch.Tensor"),
    ]:
        with pytest.raises(InputError, match=match):
            ops.weighted_reduce(*arguments)
    with pytest.raises(InputError, match=r"alpha must be \[2, M, 3\]"):
        ops.channel_weighted_sum(a, torch.zeros(2, 3))
    for size in ((3,), (3, 0), (3, 3, 3)):
        with pytest.raises(InputError, match="size must be 2"):
            ops.display_map(a, size)
    with pytest.raises(InputError, match="raw must be"):
        ops.display_map(a[0, 0], (3,))


def test_gradients_are_refused_and_not_lost():
    a = torch.zeros(2, 3, 4, requires_grad=True)
    with pytest.raises(DerivativeError, match="no derivative"):
        ops.weighted_reduce(a, a.detach())
    with torch.no_grad():
        ops.weighted_reduce(a, a)


# ------------------------------------------------------------------------------------------------------------- ladder


def test_an_explicit_backend_serves_or_raises(monkeypatch):
    a = torch.zeros(1, 2, 3)
    if DEVICE == "cpu":
        with pytest.raises(BackendError, match="cuda.*cannot serve weighted_reduce"):
            ops.weighted_reduce(a, a, backend="cuda")
        assert ops.select("weighted_reduce", a, pooling="mean") == "native"
    with pytest.raises(BackendError, match="'tpu' is no backend"):
        ops.weighted_reduce(a, a, backend="tpu")
    with pytest.raises(BackendError, match="native.*cannot serve shapley_value"):
        ops.select("shapley_value", a, backend="native")
    monkeypatch.setenv("SHAPLEYCAM_BACKEND", "torch")
    assert ops.select("weighted_reduce", a, pooling="mean") == "torch"
    monkeypatch.setenv("SHAPLEYCAM_BACKEND", "cuda")
    if DEVICE == "cpu":
        with pytest.raises(BackendError, match="SHAPLEYCAM_BACKEND='cuda'"):
            ops.weighted_reduce(a, a)
    monkeypatch.setenv("SHAPLEYCAM_BACKEND", "")
    ops.weighted_reduce(a, a)


def test_status_of_every_backend():
    known = ops.backends()
    assert list(known) == ["cuda", "triton", "native", "torch"]
    assert all(status.reason for status in known.values())
    assert known["torch"].available


def test_all_rows_agree_between_backends_bit_for_bit_on_integers():
    """Small integers are exact in every order of summation, so every backend must give the same bits."""
    generator = torch.Generator().manual_seed(4)
    a, g, h = (torch.randint(-4, 5, (2, 6, 8), generator=generator).float().to(DEVICE) for _ in range(3))
    for pooling in ("mean", "elementwise", "elementwise_relu", "positive_gradient"):
        results = [ops.weighted_reduce(a, g, 2 * h, pooling, backend=b) for b in BACKENDS]
        for one, other in itertools.pairwise(results):
            assert torch.equal(one, other), pooling
