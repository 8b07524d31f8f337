"""The resize inside an artefact against Pillow, which is the reference."""

import numpy
import pytest
import torch
from PIL import Image

from shapleycam import InputError
from shapleycam.data.images import Preprocess
from shapleycam.export.pixels import Pixels

SIZES = [(300, 400), (400, 300), (224, 224), (70, 95), (256, 256), (803, 577), (60, 600)]


def both(preprocess, height, width):
    pixels = numpy.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    found = Pixels(preprocess, resize=True).view(torch.from_numpy(pixels)[None])[0]
    return found, preprocess.view(Image.fromarray(pixels)).permute(1, 2, 0).float()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_levels_are_pillows(interpolation, height, width):
    found, expected = both(Preprocess((64, 56), 75, interpolation), height, width)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("resize", [(80, 70), (64, 90)])
def test_without_the_aspect_ratio(resize):
    found, expected = both(Preprocess((64, 56), resize, "bicubic"), 300, 310)
    assert torch.equal(found, expected)


def test_high_pictures_are_within_a_level():
    found, expected = both(Preprocess((64, 56), 75, "bilinear"), 600, 100)
    assert (found - expected).abs().max() <= 1


def test_normalised_images_are_those_of_the_preprocessing():
    preprocess = Preprocess((64, 56), 75, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    pixels = numpy.random.default_rng(0).integers(0, 256, (100, 120, 3), dtype=numpy.uint8)
    found = Pixels(preprocess, resize=True)(torch.from_numpy(pixels)[None])
    torch.testing.assert_close(found, preprocess.normalise(preprocess.view(Image.fromarray(pixels)))[None])


def test_nearest_is_refused():
    with pytest.raises(InputError, match="not 'nearest'"):
        Pixels(Preprocess(interpolation="nearest"), resize=True)
