"""Seeds, backends and tolerances for all tests."""

import os

# Without a GPU, Triton kernels run under the interpreter, and count as Triton. This must be set before Triton is imported.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import importlib.util
import sys
from contextlib import nullcontext

import pytest

from shapleycam.ops import ladder, launch

if emulated := os.environ.get("SHAPLEYCAM_CUDA_ON_CPU"):
    # The path of an extension whose CUDA half was compiled for the CPU (make cuda-on-cpu): tests of "cuda" then run on it.
    spec = importlib.util.spec_from_file_location("shapleycam._native", emulated)
    assert spec is not None and spec.loader is not None
    sys.modules["shapleycam._native"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["shapleycam._native"])
    operators = tuple(sys.modules["shapleycam._native"].cuda_operators)
    ladder._cuda_status = lambda: ladder.BackendStatus(True, "CUDA kernels on the CPU", ("cpu",), operators)
    launch._device, launch._stream = lambda tensor: nullcontext(), lambda tensor: 0

#: (rtol, atol) against float64 for results accumulated in float32 from inputs that are exact in their own dtype.
TOLERANCE = {torch.float64: (1e-11, 1e-11), torch.float32: (2e-5, 2e-5)}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
