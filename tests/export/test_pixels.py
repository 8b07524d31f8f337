"""The resize inside an artefact against Pillow, which is the reference."""

import numpy
import PIL
import pytest
import torch
from PIL import Image

from shapleycam import InputError
from shapleycam.data.images import Preprocess
from shapleycam.export.pixels import Pixels

#: Landscape, portrait and square, reduced and enlarged; from (600, 100) on with columns first since Pillow 13.
SIZES = [(300, 400), (400, 300), (224, 224), (70, 95), (256, 256), (803, 577), (60, 600), (600, 100), (900, 400), (190, 80)]


def both(preprocess, height, width):
    pixels = numpy.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    found = Pixels(preprocess, resize=True).view(torch.from_numpy(pixels)[None])[0]
    return found, preprocess.view(Image.fromarray(pixels)).permute(1, 2, 0).float()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_levels_are_pillows(interpolation, height, width):
    found, expected = both(Preprocess((64, 56), 75, interpolation), height, width)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("resize", [(80, 70), (64, 90), (75, 75)])
@pytest.mark.parametrize(("height", "width"), [(300, 310), (400, 150), (150, 400), (200, 200), (90, 60), (50, 300), (300, 40)])
def test_without_the_aspect_ratio(resize, height, width):
    found, expected = both(Preprocess((64, 56), resize, "bicubic"), height, width)
    assert torch.equal(found, expected)


@pytest.mark.skipif(int(PIL.__version__.partition(".")[0]) < 13, reason="about the order of passes since Pillow 13")
def test_the_pictures_whose_columns_come_first():
    """A row more or less changes the order; the sizes are the last of one and the first of the other."""
    preprocess = Preprocess((20, 20), (20, 30), "bilinear")
    pixels = Pixels(preprocess, resize=True)
    differs = False
    for width, height in ((70, 100), (70, 101), (30, 20), (30, 21), (25, 21), (31, 22), (31, 23)):
        found, expected = both(preprocess, height, width)
        assert torch.equal(found, expected), (height, width)
        picture = torch.from_numpy(numpy.random.default_rng(height).integers(0, 256, (1, height, width, 3), dtype=numpy.uint8))
        pixels.high_first = False
        differs = differs or not torch.equal(pixels.view(picture)[0], expected)
    assert differs  # or this says nothing


def test_normalised_images_are_those_of_the_preprocessing():
    preprocess = Preprocess((64, 56), 75, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    pixels = numpy.random.default_rng(0).integers(0, 256, (100, 120, 3), dtype=numpy.uint8)
    found = Pixels(preprocess, resize=True)(torch.from_numpy(pixels)[None])
    torch.testing.assert_close(found, preprocess.normalise(preprocess.view(Image.fromarray(pixels)))[None])


def test_nearest_is_refused():
    with pytest.raises(InputError, match="not 'nearest'"):
        Pixels(Preprocess(interpolation="nearest"), resize=True)
