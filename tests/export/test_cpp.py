"""The C++ programs of examples/, which run artefacts without Python, against Python."""

import os
import shutil
import subprocess
from importlib import util
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from .conftest import CLASSES, PREPROCESS

EXAMPLES = Path(__file__).parents[2] / "examples"
OPTIONS = {"targets": "given", "preprocess": PREPROCESS, "resize": True}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None or shutil.which("cmake") is None, reason="needs CMake and a C++ compiler"),
]


def check(example, setting, artefact, folder):
    """Build an example and compare what it says and writes with what the artefact gives in Python."""
    for command in (["cmake", "-S", EXAMPLES / example, "-B", folder, setting], ["cmake", "--build", folder]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    program = folder / "explain"
    assert "libpython" not in subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    picture = numpy.random.default_rng(3).integers(0, 256, (31, 47, 3), dtype=numpy.uint8)
    Image.fromarray(picture).save(folder / "photo.ppm")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def run(*arguments, photo="photo.ppm"):
        command = [program, artefact.path, folder / photo, folder / "map.pgm", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    for target in (None, -1, 3):
        done = run(*([] if target is None else [str(target)]))
        assert done.returncode == 0, done.stderr
        expected = artefact.explain(picture[None], target)
        words = done.stdout.split()
        assert words[:2] == ["class", f"{int(expected.targets)},"]
        probability = float(expected.logits.softmax(1)[0, int(expected.targets)])
        assert float(words[3]) == pytest.approx(probability, rel=1e-4)
        found = numpy.array(Image.open(folder / "map.pgm")).astype(float)
        assert abs(found - 255 * expected.maps[0].numpy()).max() <= 0.51
    done = run(str(CLASSES))
    assert done.returncode == 2 and "not a number" in done.stderr and done.stdout == ""
    done = run("cat")
    assert done.returncode == 2 and "CLASS must be a whole number, got 'cat'" in done.stderr
    done = run(photo="CMakeCache.txt")
    assert done.returncode == 2 and "is no binary PPM" in done.stderr


@pytest.mark.skipif(util.find_spec("openvino") is None, reason="needs openvino")
def test_openvino(made, tmp_path):
    [package] = util.find_spec("openvino").submodule_search_locations
    check("cpp_openvino", f"-DOpenVINO_DIR={package}/cmake", made(".onnx", **OPTIONS), tmp_path)


@pytest.mark.long
def test_aoti(made, tmp_path):
    check("cpp_aoti", f"-DTORCH={Path(torch.__file__).parent}", made(".pt2", format="aoti", **OPTIONS), tmp_path)
