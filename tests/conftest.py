"""Seeds, backends and tolerances for all tests."""

import os

# Without a GPU, Triton kernels run under the interpreter, and count as Triton. This must be set before Triton is imported.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

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
