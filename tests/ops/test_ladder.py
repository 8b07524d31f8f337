"""The ladder of backends, with backends of the test's own; the names that Python, Triton and the extension share."""

import ast
import importlib
import inspect
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import shapleycam
from shapleycam import BackendError, ops
from shapleycam.ops import shared
from shapleycam.ops.backends import LADDER, Backend, Call
from shapleycam.ops.backends.compiled import native_module

A = torch.arange(1.0, 25.0).reshape(2, 3, 4)


class Partial(Backend):
    """Serves one operator, without the pooling "plusplus", and answers with sevens."""

    name = "partial"

    def __init__(self):
        self.asked = []

    def status(self):
        return ops.BackendStatus(True, "a test's own", ("cpu",), ("weighted_reduce",))

    def can(self, call):
        self.asked.append(call)
        return super().can(call) or ("it lacks the pooling 'plusplus'" if call.pooling == "plusplus" else None)

    def weighted_reduce(self, activations, gradient, hvp, pooling, out):
        out.fill_(7)


def test_a_backend_is_a_class_and_a_rung():
    before = ops.ORDER
    with LADDER.holding(Partial()) as partial:
        assert ("partial", *before) == ops.ORDER and list(ops.backends()) == ["partial", *before]
        assert ops.select("weighted_reduce", A, pooling="mean") == "partial"
        assert (ops.weighted_reduce(A, A) == 7).all() and (ops.weighted_reduce(A, A, backend="partial") == 7).all()
        assert ops.weighted_reduce(A[:0], A[:0]).shape == (0, 4)  # nothing to fill
        assert partial.asked == [Call("weighted_reduce", "cpu", torch.float32, "mean")] * 2  # each choice is made once
        with LADDER.holding(Partial()):
            assert ("partial", *before) == ops.ORDER  # it hides the one of its name
    assert before == ops.ORDER
    assert not (ops.weighted_reduce(A, A) == 7).any()
    with pytest.raises(BackendError, match="'partial' is no backend"):
        ops.weighted_reduce(A, A, backend="partial")


def test_the_ladder_passes_on_where_a_pooling_or_an_operator_is_lacking():
    expected = ops.weighted_reduce(A, A, None, "plusplus", backend="torch")
    with LADDER.holding(Partial()):
        assert ops.select("weighted_reduce", A, pooling="plusplus") != "partial"
        torch.testing.assert_close(ops.weighted_reduce(A, A, None, "plusplus"), expected)
        with pytest.raises(BackendError, match=r"cannot serve weighted_reduce \(plusplus\) on cpu: it lacks the pooling"):
            ops.weighted_reduce(A, A, None, "plusplus", backend="partial")
        assert ops.select("channel_weighted_sum", A) != "partial"
        with pytest.raises(BackendError, match="cannot serve channel_weighted_sum on cpu: it does not implement this op"):
            ops.channel_weighted_sum(A, A[:, :, :3].transpose(1, 2), backend="partial")
        with pytest.raises(BackendError, match="on meta: it serves cpu tensors only"):
            ops.weighted_reduce(A.to("meta"), A.to("meta"), backend="partial")


def test_a_kernel_that_lacks_a_pooling_says_so(monkeypatch):
    module = pytest.importorskip("shapleycam.kernels")
    monkeypatch.setattr(module, "POOLINGS", ("mean",))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    [triton] = (rung for rung in LADDER if rung.name == "triton")
    call = Call("weighted_reduce", device, torch.float32, "plusplus")
    assert triton.can(call) == "it does not implement the pooling 'plusplus'"
    assert triton.can(call._replace(pooling="mean")) is None


def test_other_devices_have_the_reference():
    meta = A.to("meta")
    assert ops.select("weighted_reduce", meta, pooling="mean") == "torch"
    assert ops.weighted_reduce(meta, meta).shape == (2, 4)


# -------------------------------------------------------------------------------------------- what traces sees operators

CALLS = {
    "weighted_reduce": lambda a: ops.weighted_reduce(a, a),
    "channel_weighted_sum": lambda a: ops.channel_weighted_sum(a, a[:, :, :3].transpose(1, 2)),
    "utility_rows": lambda a: ops.utility_rows(a[:, 0], torch.zeros(2, 1, dtype=torch.int64)),
    "quadrature_rows": lambda a: ops.utility_rows(
        a[:, 0], torch.zeros(2, 1, dtype=torch.int64), a[0, 0], nodes=(0.2, 0.8), weights=(0.5, 0.5)
    ),
    "class_maps": lambda a: ops.class_maps(a, a[:, :, :3].transpose(1, 2), (2, 2), (3, 3))[1],
    "display_map": lambda a: ops.display_map(a, (5, 6)),
    "overlay": lambda a: ops.overlay(torch.zeros(2, 3, 3, 4), a, mean=(0, 0, 0), std=(1, 1, 1)),
}


def operators_of(graph):
    return [str(node.target) for node in graph.nodes if "shapleycam" in str(node.target)]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_sees_the_operator(name, mode):
    graph = make_fx(CALLS[name], tracing_mode=mode)(A)
    assert operators_of(graph.graph) == [f"shapleycam.{name}.default"]
    torch.testing.assert_close(graph(A + 1), CALLS[name](A + 1))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("strict", [False, True])
def test_export_sees_the_operator(name, strict):
    class Module(torch.nn.Module):
        def forward(self, a):
            return CALLS[name](a)

    program = torch.export.export(Module(), (A,), strict=strict)
    assert operators_of(program.graph) == [f"shapleycam.{name}.default"]
    torch.testing.assert_close(program.module()(A + 1), CALLS[name](A + 1))


@pytest.mark.parametrize("name", CALLS)
def test_the_compiler_sees_the_operator(name):
    seen = []

    def backend(module, inputs):
        seen.extend(operators_of(module.graph))
        return module.forward

    compiled = torch.compile(CALLS[name], fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(A), CALLS[name](A))
    assert len(seen) == 1 and name in seen[0]
    torch.testing.assert_close(torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")(A), CALLS[name](A))


def test_eager_calls_skip_the_dispatcher(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("through the dispatcher")

    for name in CALLS:
        operator = sys.modules[f"shapleycam.ops.{name}"].OPERATOR
        monkeypatch.setattr(operator, "_registered", refuse)
    for call in CALLS.values():
        call(A)
        call(torch.nn.Parameter(A, requires_grad=False))

    class Own(torch.Tensor):
        pass

    with pytest.raises(AssertionError, match="through the dispatcher"):
        CALLS["weighted_reduce"](A.as_subclass(Own))


# ------------------------------------------------------------------------------------------------------- shared names


def test_eager_calls_skip_the_dispatcher_while_another_thread_exports(monkeypatch):
    """Torch's flag is one for the process, and its dispatcher then writes into what the exporting thread reads."""
    for name in CALLS:
        monkeypatch.setattr(sys.modules[f"shapleycam.ops.{name}"].OPERATOR, "_registered", None)
    inside, done = threading.Event(), threading.Event()

    class Waits(torch.nn.Module):
        def forward(self, a):
            inside.set()
            assert done.wait(60)
            return a + 1

    exporting = threading.Thread(target=torch.export.export, args=(Waits(), (A,)), kwargs={"strict": False})
    exporting.start()
    try:
        assert inside.wait(60) and torch.compiler.is_compiling()
        for call in CALLS.values():
            call(A)
    finally:
        done.set()
        exporting.join()


def test_enums_are_the_same_everywhere():
    native, kernels = native_module(), pytest.importorskip("shapleycam.kernels")
    assert native.poolings == {name: code for code, name in enumerate(shared.POOLINGS)}
    assert native.utilities == {name: code for code, name in enumerate(shared.UTILITIES)}
    assert native.most_nodes == shared.MOST_NODES
    assert set(native.dtypes) == {*(str(dtype)[6:] for dtype in shared.DTYPES), "uint8"}
    header = (Path(__file__).parents[2] / "csrc" / "include" / "shapleycam.h").read_text(encoding="utf-8")
    declared = {name: int(code) for name, code in re.findall(r"\b(SHAPLEYCAM_\w+) = (\d+)", header)}
    for names in (native.poolings, native.utilities, native.dtypes):
        assert names == {name: declared[f"SHAPLEYCAM_{name.upper()}"] for name in names}
        assert len(set(names.values())) == len(names)

    assert kernels.POOLINGS == shared.POOLINGS
    reduce = importlib.import_module("shapleycam.kernels.weighted_reduce")
    assert native.poolings == reduce._CODES
    rows = importlib.import_module("shapleycam.kernels.utility_rows")
    integrals = importlib.import_module("shapleycam.kernels.quadrature_rows")
    for module, codes in ((reduce, native.poolings), (rows, native.utilities), (integrals, native.utilities)):
        constants = {name.lower(): getattr(module, name).value for name in codes_in(module)}
        assert constants and constants.items() <= codes.items()
    assert list(sys.modules["shapleycam.ops.coefficients"].COEFFICIENTS) == list(shared.UTILITIES)


def codes_in(module):
    return [name for name, value in vars(module).items() if name.isupper() and type(value).__name__ == "constexpr"]


def test_the_stub_is_the_module():
    native = native_module()
    stub = ast.parse((Path(inspect.getfile(shapleycam)).parent / "_native.pyi").read_text(encoding="utf-8"))
    functions = {node.name: node.args.args for node in stub.body if isinstance(node, ast.FunctionDef)}
    values = {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    assert {*functions, *values} == {name for name in vars(native) if not name.startswith("__")}
    for name, arguments in functions.items():
        # pybind11 writes "name(arg0: type, arg1: type) -> type" as the first line.
        assert len(re.findall(r"\barg\d+:", getattr(native, name).__doc__.splitlines()[0])) == len(arguments), name
