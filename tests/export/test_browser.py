"""The example page in headless Chromium, with onnxruntime-web from npm, against Python."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy
import pytest
from PIL import Image

from .conftest import CLASSES, PREPROCESS

PAGE = Path(__file__).parents[2] / "examples" / "browser"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("npm") and shutil.which("node")), reason="needs Node.js and npm"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A copy of the example with its packages, of the versions that the lock has."""
    folder = tmp_path_factory.mktemp("browser")
    for file in PAGE.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    done = subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def opened(page, artefact, pixels):
    """What the page shows of an artefact and a picture."""
    Image.fromarray(pixels).save(page / "photo.png")
    done = subprocess.run(
        ["node", "check.mjs", artefact.path, "photo.png"],
        cwd=page,
        env={**os.environ, "CHROMIUM": str(CHROMIUM)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["errors"] == [] and found["outside"] == []  # the photograph stays here
    return found


def compare(found, artefact, pixels):
    for each, target in ((found["predicted"], -1), (found["second"], found["second"]["chosen"])):
        result = artefact.explain(pixels[None], target)
        assert int(result.targets[0]) == each["chosen"]
        numpy.testing.assert_allclose(each["map"], result.maps.flatten(), atol=1e-4)
        probabilities = result.logits.softmax(1)[0]
        assert each["probability"] == pytest.approx(float(probabilities[each["chosen"]]), rel=1e-4)
    assert found["second"]["chosen"] == int(result.logits[0].argsort(descending=True)[1])


def test_a_small_network(page, made):
    artefact = made(preprocess=PREPROCESS, resize=True, targets="given", classes=[f"kind {i}" for i in range(CLASSES)])
    pixels = numpy.random.default_rng(1).integers(0, 256, (41, 57, 3), dtype=numpy.uint8)
    found = opened(page, artefact, pixels)
    compare(found, artefact, pixels)
    assert f"kind {found['predicted']['chosen']}" in found["predicted"]["status"]
