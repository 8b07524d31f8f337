"""The contract on this machine: it passes with our kernels, and a kernel that is wrong in one corner is found."""

import math

import pytest
import torch

from shapleycam import BackendError, InputError, ops
from shapleycam.ops import verify as module
from shapleycam.ops.backends import LADDER, Backend
from shapleycam.ops.shared import DTYPES, POOLINGS

CPU = torch.device("cpu")


class Corner(Backend):
    """The reference, but wrong where ``wrong(operator, arguments)`` says so."""

    name = "corner"

    def __init__(self, wrong):
        self.wrong = wrong
        self.calls = 0

    def status(self):
        return ops.BackendStatus(True, "a test's own", ("cpu",))

    def can(self, call):
        if call.pooling == "plusplus":
            return "it lacks this pooling"
        return None if call.device == "cpu" else "it serves cpu tensors only"

    def run(self, operator, arguments):
        self.calls += 1
        out = operator.reference(*arguments)
        changed = self.wrong(operator.name, arguments)
        if changed is not None and out.numel():
            out.view(-1)[-1] = changed(out.view(-1)[-1])
        return out


@pytest.fixture(scope="module")
def found():
    """What is found of a backend with mistakes in three places, of several kinds."""
    turns = iter(range(10**9))

    def wrong(name, arguments):
        a = arguments[0]
        if name == "weighted_reduce" and 1 not in a.stride():
            if (arguments[3], a.dtype) == ("activation", torch.bfloat16):
                return lambda x: x + 0.01
            if (arguments[3], a.dtype) == ("elementwise", torch.float32):
                return lambda x: x + math.nan
        return (lambda x: x * (1 + 1e-6 * (next(turns) % 2))) if name == "channel_weighted_sum" else None

    with LADDER.holding(Corner(wrong)) as backend:
        assert module.places("cpu", "corner") == [(CPU, backend)]
        return list(module.verify(CPU, backend, quick=True))


CORNERS = [("weighted_reduce activation", torch.bfloat16), ("weighted_reduce elementwise", torch.float32)]


@pytest.mark.slow
def test_every_operator_and_dtype_is_verified(found):
    names = [f"weighted_reduce {pooling}" for pooling in POOLINGS if pooling != "plusplus"]
    names += ["channel_weighted_sum", "utility_rows", "quadrature_rows", "class_maps", "display_map", "overlay"]
    assert [(one.operator, one.dtype) for one in found] == [(name, dtype) for name in names for dtype in DTYPES]
    right = [one for one in found if (one.operator, one.dtype) not in CORNERS and one.operator != "channel_weighted_sum"]
    assert all(one.mistake is None and one.worst <= 1 for one in right)
    assert all(one.calls >= 20 and one.seconds and one.reference for one in found)
    assert all(one.backend == "corner" and one.device == "cpu" for one in found)


@pytest.mark.slow
@pytest.mark.parametrize("corner", CORNERS, ids=lambda corner: corner[0])
def test_a_mistake_in_one_corner_is_found(found, corner):
    [wrong] = [one for one in found if (one.operator, one.dtype) == corner]
    assert wrong.worst > 1 and wrong.where.startswith("strided")
    assert "'corner' computed weighted_reduce wrong" in wrong.mistake and str(corner[1]).removeprefix("torch.") in wrong.mistake


@pytest.mark.slow
def test_results_that_differ_from_call_to_call_are_found(found):
    wrong = [one for one in found if one.operator == "channel_weighted_sum" and one.mistake is not None]
    assert len(wrong) >= 3
    assert all("gave two results for one call" in one.mistake for one in wrong)


@pytest.mark.slow
def test_a_kernel_that_fails_is_found():
    def fails(name, arguments):
        if name == "overlay":
            raise BackendError("the launch failed")
        return None

    with LADDER.holding(Corner(fails)) as backend:
        generator = torch.Generator().manual_seed(0)
        name, operator, make = next(one for one in module._operators() if one[0] == "overlay")
        found = module._one(CPU, backend, name, operator, make, torch.float32, ((2, 3, 4),), ("first",), generator, None)
    assert found.mistake == "the launch failed" and found.worst == math.inf


@pytest.mark.parametrize("layout", module.LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 4), (2, 5, 7), (2, 3, 4, 5), (0, 3, 2), (1, 1, 1)])
def test_layouts_keep_the_values(layout, shape):
    values = torch.randn(shape)
    placed = module.place(values, layout)
    assert torch.equal(placed, values) and placed.dtype == values.dtype
    if layout == "strided" and 0 not in shape:
        assert 1 not in placed.stride()
    if layout == "misaligned":
        assert placed.storage_offset() == 1


def test_places():
    found = module.places()
    assert all(rung.fused for _, rung in found) and len({(str(where), rung.name) for where, rung in found}) == len(found)
    if not torch.cuda.is_available():
        assert "native" in [rung.name for _, rung in found]
        with pytest.raises(BackendError, match="no kernels to verify .cuda on cpu"):
            module.places("cpu", "cuda")
        with pytest.raises(InputError, match="The device 'cuda' cannot be used"):
            module.places("cuda")
    assert [rung.name for _, rung in module.places("cpu", "torch")] == ["torch"]
    with pytest.raises(BackendError, match="'tpu' is no backend"):
        module.places("cpu", "tpu")
    with pytest.raises(InputError, match="The device 'nowhere' cannot be used"):
        module.places("nowhere")
