"""Operators that check themselves, with backends of the test's own that are wrong on purpose."""

import copy
import os
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

from shapleycam import InputError, KernelMismatch, ShapleyCamError, ShapleyCamWarning, ops
from shapleycam.ops import checking as check_function
from shapleycam.ops import reference
from shapleycam.ops.backends import LADDER, Backend
from shapleycam.ops.tolerance import TOLERANCE

from ..helpers import available

A = torch.rand(2, 5, 12, generator=torch.Generator().manual_seed(0)) + 0.1
G = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
H = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2))
ALPHA = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(3))
LOGITS = torch.randn(2, 9, generator=torch.Generator().manual_seed(4)) * 3
TARGETS = torch.tensor([[1, 0], [8, 20]])
CALLS = {
    "weighted_reduce": lambda **how: ops.weighted_reduce(A, G, H, **how),
    "channel_weighted_sum": lambda **how: ops.channel_weighted_sum(A, ALPHA, **how),
    "utility_rows": lambda **how: ops.utility_rows(LOGITS, TARGETS, LOGITS[0], **how),
    "quadrature_rows": lambda **how: ops.utility_rows(LOGITS, TARGETS, nodes=(0.2, 0.8), weights=(0.5, 0.5), **how),
    "class_maps": lambda **how: ops.class_maps(A, ALPHA, (3, 4), (7, 9), **how)[1],
    "display_map": lambda **how: ops.display_map(G, (9, 20), **how),
    "overlay": lambda **how: ops.overlay(torch.rand(2, 3, 5, 12), A, **how),
}


class Spoiled(Backend):
    """The reference's results, with one element of each changed by ``spoil``; it counts what it serves."""

    name = "spoiled"

    def __init__(self, spoil, last_only=False):
        self.spoil, self.served, self.last_only = spoil, [], last_only

    def status(self):
        return ops.BackendStatus(True, "wrong on purpose", ("cpu",))

    def can(self, call):
        return None if call.device == "cpu" else "it serves cpu tensors only"

    def run(self, operator, arguments):
        self.served.append(operator.name)
        out = operator.reference(*arguments)
        for part in (out if isinstance(out, tuple) else (out,))[-1 if self.last_only else 0 :]:
            flat = part.view(-1)
            flat[3] = self.spoil(flat[3])
        return out


def more(x):
    return x + 5 if x.dtype == torch.uint8 else x + 0.01


def a_little(x):
    return x + 1 if x.dtype == torch.uint8 else x * (1 + 1e-6)


@pytest.mark.parametrize("operator", CALLS)
def test_a_wrong_kernel_is_caught(operator):
    with LADDER.holding(Spoiled(more)) as wrong:
        CALLS[operator]()  # off: nothing is said
        with ops.checking(True), pytest.raises(KernelMismatch) as caught:
            CALLS[operator]()
        CALLS[operator]()  # off again, after an exception too
        assert wrong.served == [operator] * 3
    error, text = caught.value, str(caught.value)
    assert (error.operator, error.backend) == (operator, "spoiled")
    assert abs(error.got - error.expected) == pytest.approx(5 if operator == "overlay" else 0.01, abs=1e-4)
    assert "'spoiled' computed" in text and operator in text and "1 of " in text and "shapleycam info" in text
    assert str(list(error.index)) in text and repr(error.got) in text and repr(error.expected) in text
    assert "float32 [2, " in text and "strides [" in text and "on cpu" in text


def test_the_display_form_of_class_maps_is_checked_too():
    with LADDER.holding(Spoiled(more, last_only=True)), ops.checking():
        with pytest.raises(KernelMismatch, match=r"computed class_maps wrong: 1 of 378 elements of the result \(2, 3, 7, 9\)"):
            CALLS["class_maps"]()


@pytest.mark.parametrize("operator", CALLS)
def test_rounding_is_no_mistake(operator):
    with LADDER.holding(Spoiled(a_little)) as rounding, ops.checking(True):
        CALLS[operator]()
        assert rounding.served == [operator]


@pytest.mark.parametrize(
    ("operator", "backend"), [(name, backend) for name in CALLS for backend in available(name) if backend != "torch"]
)
def test_our_kernels_pass(operator, backend):
    with ops.checking(True):
        CALLS[operator](backend=backend)


@pytest.mark.parametrize("scale", [1e-9, 1e6])
def test_neither_scale_nor_cancellation_matters(scale):
    gradient = G * scale
    with LADDER.holding(Spoiled(lambda x: x + 0.01 * scale)), ops.checking(), pytest.raises(KernelMismatch):
        ops.weighted_reduce(A, gradient, None, "elementwise")
    # Each channel has its opposite: the sum is nothing but rounding, and rounding is allowed.
    a, g = torch.cat((A, A), 1), torch.cat((G, -G), 1) * scale
    size = (A * G.abs() * scale).sum(1).view(-1)[3]
    for part, wrong in ((2e-6, False), (1e-4, True)):
        with LADDER.holding(Spoiled(lambda x, part=part: x + part * size)), ops.checking():
            if wrong:
                with pytest.raises(KernelMismatch):
                    ops.weighted_reduce(a, g, None, "elementwise")
            else:
                ops.weighted_reduce(a, g, None, "elementwise")


@pytest.mark.parametrize("pooling", ["mean", "elementwise", "elementwise_relu", "activation", "positive_gradient", "plusplus"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_row_is_checked_and_passes(pooling, dtype):
    a, g, h = (t.to(dtype) for t in (A, G, H))
    with ops.checking():
        ops.weighted_reduce(a, g, h, pooling)
    with LADDER.holding(Spoiled(lambda x: x * 1.01 + 0.01)), ops.checking(), pytest.raises(KernelMismatch):
        ops.weighted_reduce(a, g, h, pooling)


@pytest.mark.parametrize("pooling", ["mean", "activation", "plusplus"])
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("size", [112, 224])
@pytest.mark.parametrize("backend", [name for name in available("weighted_reduce") if name in ("cuda", "native")])
def test_a_long_sum_of_equal_terms_passes(backend, pooling, layout, size):
    # Equal terms round the same way: added one to the other in float32, 112² of them are off by 1e-4 of their sum.
    for value in (0.1, 0.3, 0.9):
        a, g = torch.full((1, size * size, 8), 0.37), torch.full((1, size * size, 8), value)
        a, g = (t.transpose(1, 2).contiguous() if layout == "first" else t.transpose(1, 2) for t in (a, g))
        with ops.checking():
            result = ops.weighted_reduce(a, g, None, pooling, backend=backend)
        expected = reference.weighted_reduce(a.double(), g.double(), None, pooling)
        assert ((result - expected).abs() <= 2e-5 * expected.abs()).all()


@pytest.mark.parametrize("channels", [1024, 2048])
def test_a_long_sum_over_channels_keeps_its_digits(channels):
    # 2048 equal terms, added one to the other in float32, are off by 3e-5 of their sum.
    a, alpha = torch.full((8, channels, 49), 0.4935), torch.ones(8, 1, channels)
    result = ops.channel_weighted_sum(a, alpha, backend="native")
    assert ((result / (channels * 0.4935) - 1).abs() < 1e-5).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_must_match(bad):
    a = A.clone()
    a[1, 2, 3] = bad
    for pooling in ("mean", "elementwise", "activation", "plusplus"):
        with ops.checking():
            ops.weighted_reduce(a, G, H, pooling)
            assert not ops.weighted_reduce(a, G, H, pooling).isfinite().all()
    # The other way round: a NaN or Inf where the reference has a number, and a number where it has NaN or Inf.
    with LADDER.holding(Spoiled(lambda x: bad)), ops.checking(), pytest.raises(KernelMismatch):
        ops.weighted_reduce(A, G)
    a = A.clone()
    a[0, 2, 3] = bad
    with LADDER.holding(Spoiled(lambda x: 0.0)), ops.checking(), pytest.raises(KernelMismatch, match="nan|inf"):
        ops.weighted_reduce(a, G, None, "elementwise")


def test_an_overflow_of_float32_is_no_mistake():
    # In float64 neither g² nor the sum overflows.
    with ops.checking():
        huge = ops.weighted_reduce(A, G * 1e25, None, "plusplus")
        assert not huge.isfinite().all()
        assert ops.weighted_reduce(A * 1e30, G.abs() * 1e30, None, "elementwise").isinf().all()


def test_a_warning_leaves_the_result():
    with LADDER.holding(Spoiled(more)) as wrong, ops.checking(on_mismatch="warn"):
        for _ in range(2):
            with pytest.warns(ShapleyCamWarning, match="'spoiled' computed weighted_reduce wrong.*Its result is used"):
                result = ops.weighted_reduce(A, G)
            assert not torch.allclose(result, reference.weighted_reduce(A, G, None, "mean"), atol=1e-3)
        assert wrong.served == ["weighted_reduce"] * 2


def test_the_fallback_is_the_next_rung_and_said_once():
    expected = reference.weighted_reduce(A, G, None, "mean")
    with LADDER.holding(Spoiled(more)) as wrong:
        check = ops.checking(on_mismatch="fallback")
        with check:
            with pytest.warns(ShapleyCamWarning, match="reference's result is used, and 'spoiled' serves"):
                torch.testing.assert_close(ops.weighted_reduce(A, G), expected)
            assert ops.select("weighted_reduce", A, pooling="mean") != "spoiled"
            assert ops.select("channel_weighted_sum", A) == "spoiled"  # the others are served as before
        with check:  # remembered, and nothing more is said: warnings of the family are errors in these tests
            torch.testing.assert_close(ops.weighted_reduce(A, G), expected)
            torch.testing.assert_close(ops.weighted_reduce(A, G, None, "mean", backend="spoiled"), expected)
            assert wrong.served == ["weighted_reduce"]
        assert ops.select("weighted_reduce", A, pooling="mean") == "spoiled"  # outside, nothing has changed
        with ops.checking(False):
            ops.weighted_reduce(A, G)
        assert len(wrong.served) == 2


def test_a_fraction_is_checked_and_no_generator_is_disturbed():
    import random

    torch.manual_seed(7)
    random.seed(7)
    caught = 0
    with LADDER.holding(Spoiled(more)), ops.checking(0.25, "warn"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(400):
            ops.weighted_reduce(A, G)
        caught = len(said)
    assert 50 <= caught <= 150  # 100 expected, 8.7 their deviation
    drawn, other = torch.rand(1).item(), random.random()
    torch.manual_seed(7)
    random.seed(7)
    assert (torch.rand(1).item(), random.random()) == (drawn, other)


def test_the_innermost_context_counts_and_threads_have_their_own():
    with LADDER.holding(Spoiled(more)):
        failures = []

        def elsewhere():
            try:
                ops.weighted_reduce(A, G)
            except KernelMismatch as error:
                failures.append(error)

        with ops.checking():
            with ops.checking(False):
                ops.weighted_reduce(A, G)
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            assert not failures
            with pytest.raises(KernelMismatch):
                ops.weighted_reduce(A, G)


def test_a_compiled_graph_is_checked():
    compiled = torch.compile(lambda a, g: ops.weighted_reduce(a, g) * 2, fullgraph=True, backend="aot_eager")
    compiled(A, G)
    with LADDER.holding(Spoiled(more)), ops.checking(), pytest.raises(KernelMismatch):
        compiled(A, G)


def test_it_can_be_copied_and_pickled():
    check = ops.checking(0.5, "fallback")
    check.distrusted.add(("cuda", "overlay"))
    for other in (pickle.loads(pickle.dumps(check)), copy.deepcopy(check)):
        assert (other.fraction, other.on_mismatch, other.distrusted) == (0.5, "fallback", {("cuda", "overlay")})
        with other:
            ops.weighted_reduce(A, G)


@pytest.mark.parametrize("check", [-0.1, 1.5, float("nan"), "yes", None])
def test_a_check_that_is_no_fraction(check):
    with pytest.raises(InputError, match="check must be True, False, or the fraction"):
        check_function(check)


def test_an_unknown_action():
    with pytest.raises(InputError, match="on_mismatch must be 'raise', 'warn' or 'fallback', got 'ignore'"):
        ops.checking(True, "ignore")


class Sevens(Backend):
    name = "sevens"

    def status(self):
        return ops.BackendStatus(True, "", ("cpu",))

    def channel_weighted_sum(self, activations, alpha, out):
        out.fill_(7)


def checked_sevens():
    """What a sum of four ones by a backend that makes sevens comes to, or the name of the error."""
    with LADDER.holding(Sevens()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return str(int(ops.channel_weighted_sum(torch.ones(1, 4, 1), torch.ones(1, 1, 4))))
        except ShapleyCamError as error:
            told = not isinstance(error, InputError) or "SHAPLEYCAM_CHECK=" in str(error)
            return type(error).__name__ if told else str(error)


@pytest.fixture
def environment(monkeypatch):
    """Sets the variable as if the process had begun with it: it is read once."""
    read = sys.modules["shapleycam.ops.checking"]._of_environment

    def say(said):
        monkeypatch.setenv("SHAPLEYCAM_CHECK", said)
        read.cache_clear()

    yield say
    monkeypatch.undo()
    read.cache_clear()


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ("", "7"),
        ("0", "7"),
        ("1", "KernelMismatch"),
        ("1:warn", "7"),
        ("1:fallback", "4"),
        ("2", "InputError"),
        ("x", "InputError"),
    ],
)
def test_the_environment_variable(said, outcome, environment):
    environment(said)
    assert checked_sevens() == outcome


@pytest.mark.slow
def test_the_environment_variable_of_a_process():
    done = subprocess.run(
        [sys.executable, "-c", "from tests.ops.test_checking import checked_sevens; print(checked_sevens())"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "SHAPLEYCAM_CHECK": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.stdout.strip(), done.stderr) == ("KernelMismatch", "")


def test_the_table_is_strict():
    assert TOLERANCE[torch.float32] == (2e-5, 2e-5) and TOLERANCE[torch.float64] == (1e-11, 1e-11)
