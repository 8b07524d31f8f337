"""What artefacts return, against the explainer in float64; every format alike where nothing else is said."""

import copy
import json

import numpy
import onnx
import onnxruntime
import pytest
import torch

from shapleycam import Explainer, InputError
from shapleycam.export import load

from .conftest import CLASSES, PREPROCESS, SIZE

ALL = ("prediction", "saliency_map", "raw_map", "target_class", "feature_vector")


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.detach()
    assert found.shape == expected.shape and not found.requires_grad
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.fixture
def precise(model):
    return Explainer(copy.deepcopy(model).double())


@pytest.fixture
def images():
    return torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_predicted_classes(made, precise, images, suffix, count):
    artefact = made(suffix, outputs=ALL)
    found, expected = artefact.explain(images[:count]), precise(images[:count].double())
    assert torch.equal(found.targets, expected.targets)
    assert off(found.logits, expected.logits) < 1e-5
    assert off(found.raw, expected.raw) < 1e-5
    assert off(found.maps, expected.heatmaps()) < 1e-4
    activations = precise.model[:3](images[:count].double())
    assert off(found.features, activations.mean((2, 3))) < 1e-5


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_given_classes(made, precise, images, suffix):
    artefact = made(suffix, targets="given", maps="raw")
    given = torch.tensor([-1, 3, CLASSES, 0, -2])
    found = artefact.explain(images, given)
    predicted = precise.model(images.double()).argmax(1)
    assert found.targets.tolist() == [int(predicted[0]), 3, CLASSES, 0, -2]
    expected = precise(images.double(), torch.tensor([int(predicted[0]), 3, 0, 0, 0])).raw
    assert found.maps[[2, 4]].isnan().all() and not found.maps[[0, 1, 3]].isnan().any()
    assert off(found.maps[[0, 1, 3]], expected[[0, 1, 3]]) < 1e-5
    assert torch.equal(artefact.explain(images).targets, predicted)
    assert artefact.explain(images, 4).targets.tolist() == [4] * 5


def test_several_classes(made, precise, images):
    artefact = made(targets="several", maps="layer")
    given = torch.tensor([[1, -1, 6]] * 5)
    found = artefact.explain(images, given)
    expected = precise(images.double(), torch.where(given == -1, precise.model(images.double()).argmax(1)[:, None], given))
    grid = tuple(expected.raw.shape[2:])
    assert found.maps.shape == (5, 3, *grid)
    assert off(found.maps, expected.heatmaps(grid)) < 1e-4
    assert artefact.explain(images, given[:, :1]).maps.shape == (5, 1, *grid)


def test_all_classes(made, precise, images):
    found = made(targets="all", maps="raw").explain(images)
    expected = precise(images.double(), torch.arange(CLASSES).expand(5, -1))
    assert torch.equal(found.targets, expected.targets)
    assert off(found.maps, expected.raw) < 1e-5


def test_an_image_with_nan_has_a_map_of_nan(made, images):
    images = images.clone()
    images[1, 0, 0, 0] = float("nan")
    images[2, 0, 0, 0] = float("inf")
    for suffix in (".onnx", ".pt2"):
        maps = made(suffix, targets="given", maps="raw").explain(images).maps
        assert maps.isnan().flatten(1).all(1).tolist() == [False, True, True, False, False]


def test_pixels_of_the_models_size(made, precise):
    pixels = torch.randint(0, 256, (4, SIZE, SIZE, 3), dtype=torch.uint8)
    found = made(preprocess=PREPROCESS, pixels=True, maps="raw").explain(pixels)
    mean, std = (torch.tensor(each, dtype=torch.float64) for each in (PREPROCESS.mean, PREPROCESS.std))
    expected = precise(((pixels.double() / 255 - mean) / std).permute(0, 3, 1, 2))
    assert off(found.logits, expected.logits) < 1e-5
    assert off(found.maps, expected.raw) < 1e-5


@pytest.mark.parametrize(("height", "width"), [(31, 47), (16, 16), (90, 400), (9, 13)])
def test_pictures_of_any_size_are_resized_as_pillow_does(made, precise, height, width):
    from PIL import Image

    pixels = numpy.random.default_rng(height).integers(0, 256, (2, height, width, 3), dtype=numpy.uint8)
    found = made(preprocess=PREPROCESS, resize=True, maps="raw").explain(pixels)
    views = torch.stack([PREPROCESS.view(Image.fromarray(each)) for each in pixels])
    mean, std = (torch.tensor(each, dtype=torch.float64)[:, None, None] for each in (PREPROCESS.mean, PREPROCESS.std))
    expected = precise((views.double() / 255 - mean) / std)
    assert off(found.logits, expected.logits) < 1e-5
    assert off(found.maps, expected.raw) < 1e-5


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_stretched_resize(made, precise, suffix):
    """torchvision's Resize((h, w)) and CenterCrop: both orders of Pillow's passes are in one file."""
    from dataclasses import replace

    from PIL import Image

    stretched = replace(PREPROCESS, resize=(SIZE + 4, SIZE + 4))
    artefact = made(suffix, preprocess=stretched, resize=True, maps="raw")
    assert artefact.metadata.versions["pillow"]
    mean, std = (torch.tensor(each, dtype=torch.float64)[:, None, None] for each in (stretched.mean, stretched.std))
    for height, width in ((60, 90), (90, 30), (90, 60), (40, 40)):
        pixels = numpy.random.default_rng(height).integers(0, 256, (2, height, width, 3), dtype=numpy.uint8)
        found = artefact.explain(pixels)
        views = torch.stack([stretched.view(Image.fromarray(each)) for each in pixels])
        expected = precise((views.double() / 255 - mean) / std)
        assert off(found.logits, expected.logits) < 1e-5 and off(found.maps, expected.raw) < 1e-5


def test_the_file_alone_is_enough(made, precise, images):
    """Nothing of shapleycam reads it here."""
    artefact = made(targets="given", outputs=ALL, classes=[f"class {i}" for i in range(CLASSES)], prediction="logits")
    session = onnxruntime.InferenceSession(artefact.path, providers=["CPUExecutionProvider"])
    assert [(value.name, value.type, value.shape) for value in session.get_inputs()] == [
        ("image", "tensor(float)", ["n", 3, SIZE, SIZE]),
        ("target", "tensor(int64)", ["n"]),
    ]
    assert [value.name for value in session.get_outputs()] == ["logits", *ALL[1:]]
    logits, maps = session.run(["logits", "raw_map"], {"image": images.numpy(), "target": numpy.full(5, 2)})
    expected = precise(images.double(), 2)
    assert off(torch.from_numpy(logits), expected.logits) < 1e-5
    assert off(torch.from_numpy(maps), expected.raw) < 1e-5
    about = json.loads(session.get_modelmeta().custom_metadata_map["shapleycam"])
    assert about["classes"][3] == "class 3" and about["method"] == "shapleycam" and about["layer"] == ["2"]
    onnx.checker.check_model(str(artefact.path), full_check=True)
    assert onnx.load(artefact.path).opset_import[0].version == 18


def test_metadata_say_how_it_was_made(made, model):
    about = made(outputs=ALL, targets="given", classes=[f"class {i}" for i in range(CLASSES)], prediction="logits").metadata
    assert about.layout_version == 1 and about.format == "onnx" and about.engine == "closed_form" and about.utility == "rest"
    assert set(about.versions) == {"shapleycam", "torch", "onnx", "onnxscript", "onnxruntime"}
    assert list(about.checks) == ["onnxruntime"]
    checks = about.checks["onnxruntime"]
    assert checks["batches"] == (1, 3) and 0 < checks["maps"] < 1e-5 and 0 < checks["logits"] < 1e-5
    assert 0 < checks["features"] < 1e-5 and 0 < checks["display"] < 1e-4 and checks["tolerance"] == 1e-4
    other = copy.deepcopy(model)
    from shapleycam.export.metadata import weights_checksum

    assert weights_checksum(other) == about.weights
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1e-6
    assert weights_checksum(other) != about.weights
    assert weights_checksum(copy.deepcopy(model).to(memory_format=torch.channels_last)) == about.weights


@pytest.mark.parametrize(
    ("images", "targets", "said"),
    [
        (torch.zeros(1, 3, SIZE, SIZE + 1), None, r"float32 \[N, 3, 12, 12\]"),
        (torch.zeros(1, 3, SIZE, SIZE, dtype=torch.float64), None, "float64"),
        (torch.zeros(0, 3, SIZE, SIZE), None, r"\(0, 3, 12, 12\)"),
        ("cat.jpg", None, "str"),
        (torch.zeros(2, 3, SIZE, SIZE), torch.zeros(3, dtype=torch.int64), r"N = 2"),
        (torch.zeros(2, 3, SIZE, SIZE), torch.zeros(2), "float32"),
        (torch.zeros(2, 3, SIZE, SIZE), "cat", "an int, or int64 .* got 'cat'"),
        (torch.zeros(2, 3, SIZE, SIZE), [[1], [2, 3]], r"got \[\[1\], \[2, 3\]\]"),
        (torch.zeros(2, 3, SIZE, SIZE), {"class": 1}, "got {'class': 1}"),
        (torch.zeros(2, 3, SIZE, SIZE), 2**70, "got 1180591620717411303424"),
        (torch.zeros(2, 3, SIZE, SIZE), True, "bool"),
    ],
)
def test_what_an_artefact_does_not_take(made, images, targets, said):
    with pytest.raises(InputError, match=said):
        made(targets="given", maps="raw").explain(images, targets)


def test_one_class_for_all_images_is_any_whole_number(made, images):
    artefact = made(targets="given", maps="raw")
    for one in (numpy.int64(2), torch.tensor(2), [2] * 5):
        assert artefact.explain(images, one).targets.tolist() == [2] * 5


def test_no_targets_where_none_are_taken(made, images):
    with pytest.raises(InputError, match="takes no targets"):
        made(outputs=ALL).explain(images, 3)


def test_an_artefact_is_loaded_from_a_text_path(made):
    assert "format='pt2'" in repr(load(str(made(".pt2", outputs=ALL).path)))
