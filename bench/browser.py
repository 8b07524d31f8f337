"""The browser example with the demo's network and a photograph, against Python.

    python -m bench.browser        # or: make browser

Needs Node.js, npm and Chromium. Exports the network, installs the example's packages, opens its page in headless Chromium,
compares the maps of the two most probable classes with the explainer's in float64, and writes docs/pictures/browser.png.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

from shapleycam import Explainer
from shapleycam.export import export
from shapleycam.models import load_classifier

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "examples" / "browser"
PICTURE = ROOT / "docs" / "pictures" / "browser.png"
TOLERANCE = 1e-4


def main() -> int:
    """The exit status: 1 where a map differs."""
    from skimage import data

    subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=PAGE, check=True)
    classifier = load_classifier()
    photograph = Image.fromarray(data.astronaut())
    images = classifier.preprocess.normalise(classifier.preprocess.view(photograph))[None]
    precise = Explainer(copy.deepcopy(classifier.model).double())
    with tempfile.TemporaryDirectory() as folder:
        photograph.save(Path(folder) / "photo.png")
        artefact = export(
            Explainer(classifier.model),
            images,
            Path(folder) / "explained.onnx",
            targets="given",
            preprocess=classifier.preprocess,
            resize=True,
            classes=[names[0] for names in classifier.classes],
            name=classifier.name,
        )
        command = ["node", "check.mjs", artefact.path, Path(folder) / "photo.png", PICTURE]
        found = json.loads(subprocess.run(command, cwd=PAGE, check=True, capture_output=True, text=True).stdout)
    print("requests to other machines:", found["outside"] or "none", "- errors:", found["errors"] or "none")
    wrong = bool(found["outside"] or found["errors"])
    for which in ("predicted", "second"):
        each = found[which]
        expected = precise(images.double(), each["chosen"])
        off = float((torch.tensor(each["map"]).double() - expected.heatmaps().flatten()).abs().max())
        print(f"{classifier.class_name(each['chosen'])}: {each['probability']:.4f}, map off by {off:.1e} of 1")
        wrong |= not off < TOLERANCE or abs(each["probability"] - float(expected.probabilities)) > TOLERANCE
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
