"""Artefacts compiled by AOTInductor, in Python and in a C++ program without Python."""

import copy
import os
import shutil
import subprocess
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from shapleycam import Explainer, ExportError
from shapleycam.export import export, load
from shapleycam.export.formats.aoti import Aoti

from .conftest import CLASSES, PREPROCESS

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp_aoti"
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


@compiler
@pytest.mark.long
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake")
def test_in_cpp_without_python(made, tmp_path):
    artefact = made(".pt2", **OPTIONS)
    for command in (
        ["cmake", "-S", EXAMPLE, "-B", tmp_path, f"-DTORCH={Path(torch.__file__).parent}"],
        ["cmake", "--build", tmp_path],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    program = tmp_path / "explain"
    assert "libpython" not in subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    Image.fromarray(picture()).save(tmp_path / "photo.ppm")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def run(*arguments):
        command = [program, artefact.path, tmp_path / "photo.ppm", tmp_path / "map.pgm", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    for target in (None, -1, 3):
        done = run(*([] if target is None else [str(target)]))
        assert done.returncode == 0, done.stderr
        expected = artefact.explain(picture()[None], target)
        chosen = int(expected.targets)
        words = done.stdout.split()
        assert words[:2] == ["class", f"{chosen},"]
        assert float(words[3]) == pytest.approx(float(expected.logits.softmax(1)[0, chosen]), rel=1e-4)
        found = numpy.array(Image.open(tmp_path / "map.pgm")).astype(float)
        assert abs(found - 255 * expected.maps[0].numpy()).max() <= 0.51
    assert run(str(CLASSES)).returncode == 2 and "no" not in run(str(CLASSES)).stdout
    assert "not a number" in run(str(CLASSES)).stderr
    assert run("cat").returncode == 2 and "CLASS must be a whole number, got 'cat'" in run("cat").stderr


def test_without_a_compiler(model, example, tmp_path, monkeypatch):
    def missing(*args, **kwargs):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", missing)
    with pytest.raises(ExportError, match=r"is there a C\+\+ compiler\?.*No working"):
        export(Explainer(model), example, tmp_path / "explained.pt2", format="aoti")
    assert list(tmp_path.iterdir()) == [] and Aoti.name == "aoti"
