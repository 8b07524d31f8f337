"""Decoding and preprocessing: what the network sees is what a person would see."""

import pytest

pytest.importorskip("PIL")

import torch
from PIL import Image

from shapleycam import InputError
from shapleycam.data.images import Preprocess, read_image, to_picture, to_tensor


def ramp(width=40, height=30):
    """An RGB picture in which every pixel tells where it is."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return to_picture(torch.stack((x * 6, y * 8, (x + y) * 3), -1).to(torch.uint8))


def test_pictures_and_tensors_round_trip():
    picture = ramp()
    pixels = to_tensor(picture)
    assert pixels.shape == (3, 30, 40)
    assert pixels[:, 7, 11].tolist() == [66, 56, 54]
    assert to_picture(pixels.permute(1, 2, 0)).tobytes() == picture.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path, orientation):
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # a camera stores it so; shown, it is turned back by 270°
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = ramp()
    stored = upright.transpose(turn[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").tobytes() == upright.tobytes()


def test_transparency_is_laid_over_white(tmp_path):
    picture = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))  # black below, but invisible
    picture.save(tmp_path / "a.png")
    assert list(to_tensor(read_image(tmp_path / "a.png"))[:, 0].T.tolist()) == [[200, 0, 0], [255, 255, 255]]
    Image.new("LA", (1, 1), (10, 128)).save(tmp_path / "la.png")
    assert to_tensor(read_image(tmp_path / "la.png")).flatten().tolist() == pytest.approx([132, 132, 132], abs=1)
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 9, 9])
    palette.save(tmp_path / "p.png", transparency=0)
    assert to_tensor(read_image(tmp_path / "p.png")).flatten().tolist() == [255, 255, 255]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_greyscale_is_scaled_not_clipped(tmp_path, suffix):
    levels = [0, 128, 129, 256, 32768, 65407, 65535]
    picture = Image.frombytes("I;16", (len(levels), 1), b"".join(v.to_bytes(2, "little") for v in levels))
    picture.save(tmp_path / f"wide.{suffix}")
    seen = to_tensor(read_image(tmp_path / f"wide.{suffix}"))
    assert seen.shape == (3, 1, len(levels))
    assert seen[0, 0].tolist() == [round(v / 257) for v in levels]


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(tmp_path, mode):
    suffix = "png" if mode in "L1" else "tiff"
    ramp().convert(mode).save(tmp_path / f"x.{suffix}")
    read = read_image(tmp_path / f"x.{suffix}")
    assert read.mode == "RGB"
    assert read.size == (40, 30)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_samples_without_a_white_point_are_refused(tmp_path, mode):
    Image.new(mode, (4, 4), 70000).save(tmp_path / "x.tiff")
    with pytest.raises(InputError, match="white point"):
        read_image(tmp_path / "x.tiff")


def test_16_bit_greyscale_of_netpbm(tmp_path):
    """Which Pillow gives in 32 bits, with 65535 for white."""
    (tmp_path / "x.pgm").write_bytes(b"P5 3 1 65535\n" + b"".join(v.to_bytes(2, "big") for v in (0, 32768, 65535)))
    assert to_tensor(read_image(tmp_path / "x.pgm"))[0, 0].tolist() == [0, 128, 255]


def test_damaged_files_say_what_is_wrong(tmp_path):
    ramp(200, 200).save(tmp_path / "whole.jpg")
    ramp(200, 200).save(tmp_path / "whole.png")
    for name in ("whole.jpg", "whole.png"):
        data = (tmp_path / name).read_bytes()
        for part in (0, 2, 10, 30, len(data) // 3, len(data) // 2):
            (tmp_path / "cut").write_bytes(data[:part])
            with pytest.raises(InputError, match="cut"):
                read_image(tmp_path / "cut")
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(InputError, match="not an image"):
        read_image(tmp_path / "text.jpg")
    with pytest.raises(InputError, match="No such file"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(InputError, match="folder"):
        read_image(tmp_path)


@pytest.mark.parametrize("size", [(224, 224), (300, 451), (1000, 301), (33, 50), (257, 255)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_view_is_torchvisions(size, interpolation):
    transforms = pytest.importorskip("torchvision.transforms")
    noise = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8)
    picture = to_picture(noise)
    recipe = Preprocess((224, 200), 240, interpolation)
    mode = transforms.InterpolationMode(interpolation)
    expected = transforms.Compose([transforms.Resize(240, mode), transforms.CenterCrop((224, 200)), transforms.PILToTensor()])
    assert torch.equal(recipe.view(picture), expected(picture))
    normal = transforms.Normalize(recipe.mean, recipe.std)(expected(picture).float() / 255)
    torch.testing.assert_close(recipe.normalise(recipe.view(picture)), normal)


def test_a_view_may_squash():
    assert Preprocess((10, 20), (10, 20)).view(ramp()).shape == (3, 10, 20)


def test_impossible_views():
    with pytest.raises(InputError, match="smaller than the crop"):
        Preprocess((224, 224), 200).view(ramp())
    with pytest.raises(InputError, match="1000 times"):
        Preprocess().view(Image.new("RGB", (2001, 2)))
    with pytest.raises(InputError, match="uint8"):
        to_picture(torch.zeros(3, 4, 4))
