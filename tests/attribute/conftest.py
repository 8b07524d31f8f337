"""A small data set with a broken file in it, and a network that explains it in milliseconds."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("pyarrow")
pytest.importorskip("PIL")

from shapleycam.attribute import Settings
from shapleycam.data.images import Preprocess, to_picture
from shapleycam.model.zoo import Classifier

from ..helpers import network

SMALL = Preprocess((20, 24), 28, "bicubic")
NAMES = (("ant",), ("bee", "honeybee"), ("cat",), ("dog",), ("eel",), ("fox",), ("gnu",))
SETTINGS = Settings(layer="2", batch_size=4)


def save(file: Path, seed: int, size: tuple[int, int] = (40, 30), **options: object) -> Path:
    """A smooth picture that another seed does not have."""
    noise = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    pixels = torch.nn.functional.interpolate(noise, (size[1], size[0]), mode="bicubic").clamp(0, 1).mul(255).byte()
    file.parent.mkdir(parents=True, exist_ok=True)
    to_picture(pixels[0].permute(1, 2, 0)).save(file, **options)
    return file


@pytest.fixture
def classifier() -> Classifier:
    return Classifier("toy", network(curved=False), SMALL, NAMES, "seeded")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for n in range(21):
        save(root / ("bee", "cat", "unicorn")[n % 3] / f"{n:02}.{('png', 'jpg')[n % 2]}", n)
    (root / "bee" / "01-text.jpg").write_text("not a picture")
    (root / "cat" / "cut.png").write_bytes((root / "cat" / "04.png").read_bytes()[:60])
    (root / "notes.txt").write_text("no picture, no complaint")
    return root
