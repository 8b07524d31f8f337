"""Seeds, backends and tolerances for all tests."""

import os

# Two processes of the suite share two cores; and the processes that they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Without a GPU, Triton kernels run under the interpreter, and count as Triton. This must be set before Triton is imported.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
from torch import Tensor, nn

from shapleycam import ops
from shapleycam.ops.backends import LADDER, Call
from shapleycam.ops.backends.compiled import Compiled

from .helpers import wake

if emulated := os.environ.get("SHAPLEYCAM_CUDA_ON_CPU"):
    # The path of an extension whose CUDA half was compiled for the CPU (make cuda-on-cpu): tests of "cuda" then run on it.
    spec = importlib.util.spec_from_file_location("shapleycam._native", emulated)
    assert spec is not None and spec.loader is not None
    sys.modules["shapleycam._native"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["shapleycam._native"])

    class CudaOnCpu(Compiled):
        """The CUDA kernels on the CPU, where they are named: there are no streams, and no device to go to."""

        name = "cuda"
        suffix = "cuda"

        def status_of(self, module: ModuleType) -> ops.BackendStatus:
            return ops.BackendStatus(True, "CUDA kernels on the CPU", ("cpu",), tuple(module.cuda_operators))

        def volunteers(self, call: Call) -> bool:
            return False

        def queue(self, tensor: Tensor) -> int:
            return 0

    # For the whole session, and while the test files are collected.
    _emulator = LADDER.holding(CudaOnCpu())
    _emulator.__enter__()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def wake_up() -> Callable[..., nn.Module]:
    return wake


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(3))


def pytest_collection_modifyitems(items):
    """Marks what a backend's name and a file's name say: ``interpreter``, and ``slow`` for whole files of other libraries."""
    on_gpu = torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("gpu") and not on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if not on_gpu and "triton" in [value for value in parameters if isinstance(value, str)]:
            item.add_marker(pytest.mark.interpreter)
        if item.path.stem.endswith("_extras") or item.path.parent.name == "compat":
            item.add_marker(pytest.mark.slow)
