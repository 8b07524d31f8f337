"""A small pool-and-linear network, and artefacts of it that many tests read."""

from pathlib import Path

import pytest
import torch

from shapleycam import Explainer
from shapleycam.data.images import Preprocess
from shapleycam.export import Artefact, export

from ..helpers import network

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

SIZE, CLASSES = 12, 7
PREPROCESS = Preprocess((SIZE, SIZE), SIZE + 4, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


@pytest.fixture(scope="session")
def example() -> torch.Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def model() -> torch.nn.Module:
    return network(curved=False, classes=CLASSES)


@pytest.fixture(scope="session")
def made(model: torch.nn.Module, example: torch.Tensor, tmp_path_factory: pytest.TempPathFactory):
    """Exports once per set of options: ``made(targets="given")``."""
    folder, known = tmp_path_factory.mktemp("artefacts"), {}

    def make(suffix: str = ".onnx", **options: object) -> Artefact:
        key = (suffix, *sorted((name, str(value)) for name, value in options.items()))
        if key not in known:
            path = Path(folder) / f"{len(known)}{suffix}"
            known[key] = export(Explainer(model), example, path, **options)
        return known[key]

    return make
