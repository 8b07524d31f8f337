"""Artefacts compiled by AOTInductor."""

import copy
import shutil

import numpy
import pytest
import torch
from PIL import Image

from shapleycam import Explainer, ExportError
from shapleycam.export import export, load
from shapleycam.export.formats.aoti import Aoti

from .conftest import CLASSES, PREPROCESS

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

OPTIONS = {"format": "aoti", "targets": "given", "preprocess": PREPROCESS, "resize": True}


def picture():
    return numpy.random.default_rng(3).integers(0, 256, (31, 47, 3), dtype=numpy.uint8)


@compiler
@pytest.mark.slow
def test_in_python(made, model):
    artefact = load(made(".pt2", **OPTIONS).path)
    assert artefact.metadata.format == "aoti" and "onnx" not in artefact.metadata.versions
    pixels = numpy.stack([picture()] * 4)
    given = torch.tensor([-1, 2, CLASSES, -3])
    found = artefact.explain(pixels, given)
    view = PREPROCESS.view(Image.fromarray(picture())).double()
    mean, std = (torch.tensor(each, dtype=torch.float64)[:, None, None] for each in (PREPROCESS.mean, PREPROCESS.std))
    explainer = Explainer(copy.deepcopy(model).double())
    images = ((view / 255 - mean) / std).expand(2, -1, -1, -1)
    predicted = int(explainer.model(images[:1]).argmax())
    expected = explainer(images, torch.tensor([predicted, 2]))
    assert found.targets.tolist() == [predicted, 2, CLASSES, -3]
    assert found.maps[2:].isnan().all()
    torch.testing.assert_close(found.maps[:2].double(), expected.heatmaps(), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.logits[:2].double(), expected.logits.detach(), rtol=1e-4, atol=1e-5)


def test_without_a_compiler(model, example, tmp_path, monkeypatch):
    def missing(*args, **kwargs):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", missing)
    with pytest.raises(ExportError, match=r"is there a C\+\+ compiler\?.*No working"):
        export(Explainer(model), example, tmp_path / "explained.pt2", format="aoti")
    assert list(tmp_path.iterdir()) == [] and Aoti.name == "aoti"
