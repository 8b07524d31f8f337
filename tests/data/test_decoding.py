"""Both decoders see the same picture, and the same as read_image: the oracle is Pillow."""

import io
import random
import struct
import zlib

import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image

from shapleycam import InputError
from shapleycam.data import decoding
from shapleycam.data.decoding import Decoder, simple
from shapleycam.data.images import Preprocess, in_floats, pixels_of, read_image, takes_columns_first, to_picture

RECIPE = Preprocess((20, 24), 28, "bicubic")


def picture(seed=0, size=(61, 43)):
    noise = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(seed))
    pixels = torch.nn.functional.interpolate(noise, (size[1], size[0]), mode="bicubic").clamp(0, 1).mul(255).byte()
    return to_picture(pixels[0].permute(1, 2, 0))


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(), "JPEG", quality=90, exif=exif)


def wide():
    ramp = Image.new("I;16", (61, 43))
    ramp.putdata([(x * 1050) % 65536 for x in range(61 * 43)])
    return ramp


def translucent():
    image = picture().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


PICTURES = {
    "jpeg": encoded(picture(), "JPEG"),
    "jpeg 4:4:4": encoded(picture(), "JPEG", quality=95, subsampling=0),
    "jpeg progressive": encoded(picture(), "JPEG", progressive=True),
    "jpeg grey": encoded(picture().convert("L"), "JPEG"),
    "jpeg cmyk": encoded(picture().convert("CMYK"), "JPEG"),
    **{f"jpeg turned {n}": turned(n) for n in range(1, 9)},
    "png": encoded(picture(), "PNG"),
    "png grey": encoded(picture().convert("L"), "PNG"),
    "png 1 bit": encoded(picture().convert("1"), "PNG"),
    "png palette": encoded(picture().convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
    "png palette, one transparent": encoded(picture().convert("P", palette=Image.Palette.ADAPTIVE), "PNG", transparency=3),
    "png rgb, one transparent": encoded(picture(), "PNG", transparency=picture().getpixel((5, 5))),
    "png alpha": encoded(translucent(), "PNG"),
    "png grey alpha": encoded(translucent().convert("LA"), "PNG"),
    "png 16 bit": encoded(wide(), "PNG"),
    "gif": encoded(picture(), "GIF"),
    "gif animated": encoded(picture(), "GIF", save_all=True, append_images=[picture(1), picture(2)]),
    "webp": encoded(picture(), "WEBP"),
    "webp alpha": encoded(translucent(), "WEBP"),
    "webp animated": encoded(picture(), "WEBP", save_all=True, append_images=[picture(1)]),
    "tiff": encoded(picture(), "TIFF"),
    "bmp": encoded(picture(), "BMP"),
}


@pytest.mark.parametrize("decoder", ["torchcodec", "pillow", "exact"])
@pytest.mark.parametrize("name", PICTURES)
def test_all_see_the_same_picture(name, decoder):
    if decoder == "torchcodec":
        pytest.importorskip("torchcodec.decoders")
    expected = read_image(io.BytesIO(PICTURES[name]), name)
    found = Decoder(RECIPE, decoder)(PICTURES[name], name)
    assert (found.width, found.height) == expected.size == ((43, 61) if name[-1] in "5678" and "turned" in name else (61, 43))
    assert found.view.shape == (3, 20, 24) and found.view.dtype == torch.uint8
    off = (found.view.int() - RECIPE.view(expected).int()).abs()
    assert int(off.max()) <= (0 if decoder == "exact" else 1)
    whole = Preprocess((min(expected.size),) * 2, min(expected.size), "bilinear")  # no resize: what was decoded, and no other
    assert torch.equal(Decoder(whole, decoder)(PICTURES[name], name).view, whole.view(expected))


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_with(*chunks, behind=False):
    """Chunks in front of the pixels, or behind them."""
    content = PICTURES["png"]
    at = len(content) - 12 if behind else 33
    return content[:at] + b"".join(chunks) + content[at:]


def jpeg_with(*segments):
    """Segments APP1."""
    parts = [b"\xff\xe1" + struct.pack(">H", len(each) + 2) + each for each in segments]
    return PICTURES["jpeg"][:2] + b"".join(parts) + PICTURES["jpeg"][2:]


def exif(turn, kind=3, order=">", count=1):
    """Exif with nothing but an orientation, of any type: TIFF's 1 is a byte, 3 has 16 bits, 4 has 32."""
    value = struct.pack(order + {1: "B3x", 3: "H2x", 4: "I"}[kind], turn)
    head = (b"MM" if order == ">" else b"II") + struct.pack(order + "HIHHHI", 42, 8, 1, 0x0112, kind, count)
    return b"Exif\0\0" + head + value + bytes(4)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
ADOBE = b"http://ns.adobe.com/xap/1.0/\0"
RAW = f"\nexif\n{len(exif(6)):8}\n{exif(6).hex()}\n".encode()
#: pictures whose orientation one decoder sees and another may not
ORIENTED = {
    "png, xmp": png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
    "png, xmp in a plain text": png_with(chunk(b"tEXt", b"XML:com.adobe.xmp\0" + XMP)),
    "png, exif in a compressed text": png_with(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW))),
    "png, exif in a plain text": png_with(chunk(b"tEXt", b"Raw profile type exif\0" + RAW)),
    "png, exif in a text of that name": png_with(chunk(b"tEXt", b"exif\0" + exif(6))),
    "png, exif": png_with(chunk(b"eXIf", exif(6)[6:])),
    "png, exif behind the pixels": png_with(chunk(b"eXIf", exif(6)[6:]), behind=True),
    "jpeg, xmp": jpeg_with(ADOBE + XMP),
    "jpeg, xmp that says both": jpeg_with(ADOBE + XMP.replace(b"6", b"1") + XMP),
    "jpeg, exif twice": jpeg_with(exif(1), exif(6)),
    **{
        f"jpeg, exif {order}{kind}{count}": jpeg_with(exif(6, kind, order, count))
        for order, kind, count in ((">", 4, 1), ("<", 1, 1), ("<", 4, 2), (">", 1, 1))
    },
}


@pytest.mark.filterwarnings("ignore:Metadata Warning")  # Pillow's, of what is not as it should be
@pytest.mark.parametrize("name", ORIENTED)
def test_an_orientation_that_not_all_decoders_see_is_pillow_s(name):
    whole = Preprocess((43, 43), 43, "bilinear")
    expected = read_image(io.BytesIO(ORIENTED[name]), name)
    assert simple(ORIENTED[name]) is None
    found = Decoder(whole, "auto")(ORIENTED[name], name)
    assert (found.width, found.height) == expected.size and torch.equal(found.view, whole.view(expected))
    assert expected.size == (
        (61, 43)
        if name in ("jpeg, exif twice", "jpeg, xmp that says both", "jpeg, exif <11", "jpeg, exif <42", "jpeg, exif >11")
        else (43, 61)
    )


def test_what_says_nothing_of_the_orientation_stays_fast():
    upright = jpeg_with(exif(1), ADOBE + XMP.replace(b"6", b"1"))  # as Lightroom writes them
    assert simple(upright) and torch.equal(
        Decoder(RECIPE, "auto")(upright, "a").view, Decoder(RECIPE, "pillow")(upright, "a").view
    )
    assert (
        simple(jpeg_with(ADOBE + b"<x:xmpmeta/>"))
        and simple(jpeg_with(exif(6), ADOBE + b"<x/>"))
        and simple(jpeg_with(exif(6, 3, "<")))
    )
    assert simple(png_with(chunk(b"tEXt", b"Software\0x"), chunk(b"gAMA", struct.pack(">I", 45455)), chunk(b"pHYs", bytes(9))))
    assert simple(PICTURES["png"][:-12]) is None and simple(PICTURES["jpeg"][:200]) is None  # cut: Pillow has the words


def test_torchcodec_is_asked_where_it_can_be_trusted():
    served = {name for name, content in PICTURES.items() if simple(content)}
    assert served == {name for name in PICTURES if name.startswith("jpeg") and "cmyk" not in name} | {"png", "png grey"}
    assert simple(PICTURES["jpeg"]) == simple(PICTURES["png"]) == (61, 43)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(500, 375), (375, 500), (260, 260), (61, 43), (3000, 200)])
def test_the_fast_resize_is_within_a_level_of_pillow_s(interpolation, size):
    recipe = Preprocess((224, 224), 256, interpolation)
    image = picture(3, size)
    noise = torch.randint(-20, 21, (3, size[1], size[0]), generator=torch.Generator().manual_seed(1))
    rough = to_picture(
        (torch.tensor(list(image.tobytes())).view(size[1], size[0], 3) + noise.permute(1, 2, 0)).clamp(0, 255).byte()
    )
    off = (recipe.view_of(_pixels(rough)).int() - recipe.view(rough).int()).abs()
    assert int(off.max()) <= 1 and float((off > 0).float().mean()) < 0.02


def _pixels(image):
    from shapleycam.data.images import pixels_of

    return pixels_of(image)


@pytest.mark.parametrize("interpolation", ["nearest", "lanczos"])
def test_other_interpolations_are_pillow_s(interpolation):
    recipe = Preprocess((20, 24), 28, interpolation)
    found = Decoder(recipe, "pillow")(PICTURES["png"], "png").view
    assert torch.equal(found, recipe.view(picture()))


def test_the_box_is_what_the_crop_shows():
    """A picture whose pixels tell where they are, enlarged: the colours at the crop's rims are those at the box's."""
    width, height = 80, 60
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = to_picture(torch.stack((x * 3, y * 4, x * 0), -1).byte())
    recipe = Preprocess((224, 200), 256, "bilinear")
    view, (left, top, right, bottom) = recipe.view(image).float(), recipe.box(width, height)
    assert float(view[0, 100, 0]) / 3 + 0.5 == pytest.approx(left, abs=0.5)
    assert float(view[0, 100, -1]) / 3 + 0.5 == pytest.approx(right, abs=0.5)
    assert float(view[1, 0, 100]) / 4 + 0.5 == pytest.approx(top, abs=0.5)
    assert float(view[1, -1, 100]) / 4 + 0.5 == pytest.approx(bottom, abs=0.5)
    assert (right - left, bottom - top) == (pytest.approx(200 * width / 341), pytest.approx(224 * height / 256))


@pytest.mark.parametrize("size", [(300, 400), (60, 130), (20, 300), (300, 20), (1, 50), (2, 60)])
@pytest.mark.parametrize("resize", [28, (24, 30)], ids=["kept", "stretched"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_passes_are_in_pillow_s_order(size, resize, interpolation):
    # Of noise, whose overshoots a first pass cuts off: in the other order levels differ by up to 20.
    recipe = Preprocess((20, 24), resize, interpolation)
    noise = to_picture(
        torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    )
    off = (recipe.view_of(pixels_of(noise)).int() - recipe.view(noise).int()).abs()
    assert off.max() <= 2 and (off > 1).float().mean() < 0.002


def ramps(size):
    """Red rises with x and green with y: a crop's values say where it was taken."""
    across = torch.linspace(0, 255, size[0])[None].expand(size[1], -1)
    down = torch.linspace(0, 255, size[1])[:, None].expand(-1, size[0])
    grain = torch.randn(size[1], size[0], 3, generator=torch.Generator().manual_seed(0)) * 4
    return to_picture((torch.stack((across, down, across), 2) + grain).round().clamp(0, 255).byte())


@pytest.mark.parametrize(
    ("size", "part"), [((110, 900), 1), ((112, 900), 2), ((904, 224), 4), ((601, 456), 1), ((600, 456), 8), ((1000, 498), 2)]
)
@pytest.mark.parametrize(
    ("turn", "how"), [(1, {}), (2, {}), (3, {}), (6, {}), (7, {}), (1, {"progressive": True}), (8, {"subsampling": 0})]
)
def test_large_jpegs_are_reduced(size, part, turn, how, monkeypatch):
    reduced = []
    monkeypatch.setattr(
        "shapleycam.data.decoding.read_image",
        lambda *a, reduce=1, **k: reduced.append(reduce) or read_image(*a, reduce=reduce, **k),
    )
    tags = Image.Exif()
    tags[0x0112] = turn
    content = encoded(ramps(size), "JPEG", quality=90, exif=tags, **how)
    found = Decoder(RECIPE, "scaled")(content, "a")
    exact = Decoder(RECIPE, "exact")(content, "a")
    assert [n for n in reduced if n > 1] == ([part] if part > 1 else [])
    assert (found.width, found.height) == (exact.width, exact.height) == (size if turn < 5 else size[::-1])
    off = (found.view.float() - exact.view.float()).flatten(1)
    # The crop is where it was: a pixel's shift would be some nine levels of red and green.
    assert off.abs().max() <= (1 if part == 1 else 8) and off.mean(1).abs().max() < 0.3


def test_reduced_or_not_is_part_of_the_picture_only_for_jpegs():
    for content in (encoded(ramps((904, 632)), "PNG"), encoded(ramps((904, 632)).convert("CMYK"), "JPEG")):
        assert torch.equal(Decoder(RECIPE, "scaled")(content, "a").view, Decoder(RECIPE, "auto")(content, "a").view)
    fixed = Preprocess((20, 24), (24, 30), "bilinear")  # a resize to a shape of its own, either way up
    assert [fixed.reduction(*size) for size in ((60, 900), (118, 900), (120, 900), (121, 900), (900, 240), (5000, 480))] == [
        1,
        1,
        2,
        1,
        4,
        8,
    ]
    assert read_image(io.BytesIO(encoded(ramps((400, 300)), "JPEG")), reduce=4).size == (100, 75)
    with pytest.raises(InputError, match="a has 904 × 632 pixels, more than the limit of 9"):
        Decoder(RECIPE, "scaled", max_pixels=9)(encoded(ramps((904, 632)), "JPEG"), "a")
    with pytest.raises(InputError, match="a cannot be read|truncated|damaged"):
        Decoder(RECIPE, "scaled")(encoded(ramps((904, 632)), "JPEG")[:9000], "a")


def bomb():
    """A PNG header of 30,000 × 30,000 pixels in front of a few bytes."""
    import zlib

    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    size = (30_000).to_bytes(4, "big") * 2
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + bytes([8, 2, 0, 0, 0])) + chunk(b"IDAT", zlib.compress(b"0" * 99))


@pytest.mark.parametrize("decoder", ["auto", "pillow", "exact"])
def test_bombs_are_refused_by_a_limit_that_users_set(decoder):
    with pytest.raises(InputError, match=r"bomb has 30000 × 30000 pixels, more than the limit of 89478485"):
        Decoder(RECIPE, decoder)(bomb(), "bomb")
    with pytest.raises(InputError, match="more than the limit of 1000"):
        Decoder(RECIPE, decoder, max_pixels=1000)(PICTURES["jpeg"], "a")
    assert Decoder(RECIPE, decoder, max_pixels=61 * 43)(PICTURES["jpeg"], "a").width == 61
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(InputError, match="damaged|cannot be"):  # within the limit, and then there is nothing in it
        Decoder(RECIPE, decoder, max_pixels=900_000_001)(bomb()[:60], "bomb")
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("decoder", ["auto", "pillow"])
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 2000)])
def test_tiny_and_narrow(decoder, size):
    recipe = Preprocess((20, 20), 28, "bilinear")
    content = encoded(picture(0, size), "PNG")
    if max(size) > 1000:
        assert Decoder(recipe, decoder)(content, "a").view.shape == (3, 20, 20)
        content = encoded(picture(0, (1, 2000)), "PNG")
        with pytest.raises(InputError, match="more than 1000 times"):
            Decoder(recipe, decoder)(content, "a")
    else:
        assert Decoder(recipe, decoder)(content, "a").view.shape == (3, 20, 20)


@pytest.mark.parametrize("name", ["jpeg", "png", "jpeg progressive", "gif", "webp"])
def test_damage_is_an_error_or_the_same_picture(name):
    """Cut and changed at random places: never a crash, never another exception, and both decoders agree."""
    chance = random.Random(5)
    content = PICTURES[name]
    outcomes = set()
    for _ in range(40):
        damaged = bytearray(content[: chance.randrange(len(content))] if chance.random() < 0.5 else content)
        for _ in range(chance.randrange(3)):
            if damaged:
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        found = []
        for decoder in ("auto", "pillow"):
            try:
                found.append(Decoder(RECIPE, decoder)(bytes(damaged), name).view)
            except InputError as error:
                found.append(str(error))
        outcomes.add(type(found[0]).__name__)
        if isinstance(found[0], str) or isinstance(found[1], str):
            assert found[0] == found[1]
        else:
            assert torch.equal(found[0], found[1])
    assert "str" in outcomes


def test_a_decoder_that_is_named_must_be_there(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    monkeypatch.setattr(decoding, "_torchcodec", decoding._torchcodec.__wrapped__)
    with pytest.raises(InputError, match=r"shapleycam\[decode\]"):
        Decoder(RECIPE, "torchcodec")
    assert decoding._torchcodec() is None and Decoder(RECIPE)(PICTURES["jpeg"], "a").width == 61


# ------------------------------------------------------------------------------------------------- a GPU's part of the work


@pytest.fixture
def on_gpu(monkeypatch):
    """torchcodec on the CPU in the place of nvJPEG; gives what it was asked for."""
    decoders, asked = pytest.importorskip("torchcodec.decoders"), []

    def stand_in(device):
        return lambda content: asked.append(content) or decoders.decode_jpeg(content, mode="RGB", device=device)

    monkeypatch.setattr(decoding, "nvjpeg", stand_in)
    return asked


def rgb_jpeg():
    """A JPEG whose three components are red, green and blue, which Adobe's segment says."""
    return encoded(picture(), "JPEG", keep_rgb=True)


def renamed(content, names):
    """The components under other names, in the frame's header and in the scan's."""
    frame, scan = content.index(b"\xff\xc0") + 10, content.index(b"\xff\xda") + 5
    found = bytearray(content)
    for n, name in enumerate(names):
        found[frame + 3 * n] = found[scan + 2 * n] = name
    return bytes(found)


PLAIN = {"jpeg", "jpeg 4:4:4", "jpeg progressive", "jpeg grey", "jpeg turned 1"}
ODD = {
    "rgb": rgb_jpeg(),
    "names of red, green and blue": renamed(PICTURES["jpeg 4:4:4"], b"RGB"),
    "trailing": PICTURES["jpeg"] + b"\0",
}


@pytest.mark.parametrize("name", [*PICTURES, *ODD])
def test_a_gpu_is_asked_for_plain_jpegs_only(name, on_gpu):
    content = {**PICTURES, **ODD}[name]
    found, expected = Decoder(RECIPE, "cuda")(content, name), Decoder(RECIPE, "pillow")(content, name)
    assert on_gpu == ([content] if name in PLAIN else [])
    assert torch.equal(found.view, expected.view) and found[1:] == expected[1:]


def test_what_a_gpu_may_not_see_the_end_of(on_gpu):
    cut = PICTURES["jpeg"][:-40]
    with pytest.raises(InputError, match="cannot be read"):
        Decoder(RECIPE, "cuda")(cut, "a")
    with pytest.raises(InputError, match="more than the limit of 100"):
        Decoder(RECIPE, "cuda", 100)(PICTURES["jpeg"], "a")
    assert not on_gpu


def test_of_a_gpu_its_own_failures_are_no_picture_s(monkeypatch):
    """What it cannot decode goes the way of all others; that it has no memory left does not."""
    raised = RuntimeError("nvjpeg: JPEG not supported")

    def stand_in(device):
        def fail(content):
            raise raised

        return fail

    monkeypatch.setattr(decoding, "nvjpeg", stand_in)
    decoder = Decoder(RECIPE, "cuda")
    assert torch.equal(decoder(PICTURES["jpeg"], "a").view, Decoder(RECIPE, "pillow")(PICTURES["jpeg"], "a").view)
    raised = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        decoder(PICTURES["jpeg"], "a")


def test_a_gpu_that_is_not_there(monkeypatch):
    with pytest.raises(InputError, match="needs the model on a CUDA device, and it is on cpu"):
        Decoder(RECIPE, "cuda")
    decoders, device = pytest.importorskip("torchcodec.decoders"), torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="torch sees none here"):
        Decoder(RECIPE, "cuda", device=device)

    def without_cuda(content, *, mode, device):
        assert read_image(io.BytesIO(content), "the sample").size == (16, 16)
        raise RuntimeError(f"Unsupported device: {device}\nframe #0: ...")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(decoders, "decode_jpeg", without_cuda)
    with pytest.raises(InputError, match=r"cannot decode on cuda:0 \(Unsupported device: cuda:0\): it needs a build for CUDA"):
        Decoder(RECIPE, "cuda", device=device)
    monkeypatch.delattr(decoders, "decode_jpeg")
    with pytest.raises(InputError, match=r"needs torchcodec 0\.17 or newer"):
        Decoder(RECIPE, "cuda", device=device)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(61, 43), (40, 200), (300, 31)])
def test_the_resize_of_a_gpu_is_pillow_s(interpolation, size):
    """In floats, rounded after each pass: a level off, as the resize of bytes is, on noise that makes bicubic overshoot."""
    pixels = torch.randint(0, 2, (1, 3, size[1], size[0]), generator=torch.Generator().manual_seed(1)).mul(255).byte()
    picture = to_picture(pixels[0].permute(1, 2, 0))
    expected = pixels_of(picture.resize((29, 28), Image.Resampling[interpolation.upper()]))
    columns_first = takes_columns_first() and size[1] - 28 > 2 * max(0, size[0] - 29)
    between = (28, size[0]) if columns_first else (size[1], 29)
    found = in_floats(pixels, [between, (28, 29)], interpolation)[0]
    assert found.dtype == torch.uint8 and int((found.int() - expected.int()).abs().max()) <= 1
