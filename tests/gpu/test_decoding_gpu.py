"""JPEGs that nvJPEG decodes, against Pillow: nobody has run these yet."""

import io

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("torchcodec.decoders")

from shapleycam.attribute import Settings, attribute, open_maps
from shapleycam.data.decoding import Decoder
from shapleycam.data.images import Preprocess, read_image

from ..attribute.conftest import NAMES, SMALL, save
from ..data.test_decoding import ODD, PICTURES, PLAIN
from ..helpers import network

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("name", [*PICTURES, *ODD])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_pictures_are_those_of_pillow(name, interpolation):
    """Of smooth pictures nvJPEG's levels are a few off, by another transform and other colours between the stored ones."""
    recipe = Preprocess((20, 24), 28, interpolation)
    content = {**PICTURES, **ODD}[name]
    found = Decoder(recipe, "cuda", device=DEVICE)(content, name)
    expected = recipe.view(read_image(io.BytesIO(content), name))
    off = (found.view.cpu().int() - expected.int()).abs().float()
    assert found.view.is_cuda and found.view.dtype == torch.uint8
    assert off.max() <= (16 if name in PLAIN else 1) and off.mean() <= 3


def test_the_job(tmp_path):
    from shapleycam.model.zoo import Classifier

    classifier = Classifier("toy", network(curved=False).to(DEVICE), SMALL, NAMES, "seeded")
    for n in range(40):
        save(tmp_path / "p" / f"{n:02}.{('png', 'jpg', 'jpg')[n % 3]}", n, (90, 70))
    (tmp_path / "p" / "cut.jpg").write_bytes((tmp_path / "p" / "01.jpg").read_bytes()[:-50])
    for decoder in ("auto", "cuda"):
        for run in ("", "-again"):
            settings = Settings(layer="2", batch_size=8, decoder=decoder, threads=4)
            assert attribute(classifier, tmp_path / "p", tmp_path / f"{decoder}{run}", settings).kinds == {
                "ok": 40,
                "undecodable": 1,
            }
    found, again, expected = (open_maps(tmp_path / name) for name in ("cuda", "cuda-again", "auto"))
    for one, other, right in zip(found, again, expected, strict=True):
        assert one.raw.nan_to_num().equal(other.raw.nan_to_num())
        if right.status == "ok":
            assert (one.raw - right.raw).abs().max() <= 0.1 * right.raw.abs().max()
