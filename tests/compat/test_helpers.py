"""The helpers: pictures and targets, against pytorch-grad-cam's own."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from shapleycam import InputError, compat

image = pytest.importorskip("pytorch_grad_cam.utils.image")
targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")

RGB = np.random.default_rng(0).random((12, 17, 3), np.float32)
MASK = np.random.default_rng(1).random((12, 17), np.float32)


@pytest.mark.parametrize("picture", [RGB, RGB.astype(np.float64), (RGB * 255).astype(np.uint8), RGB[::-1, ::2]])
@pytest.mark.parametrize("options", [{}, {"mean": [0.485, 0.456, 0.406], "std": (0.229, 0.224, 0.225)}])
def test_preprocess_image(picture, options):
    torch.testing.assert_close(compat.preprocess_image(picture, **options), image.preprocess_image(picture, **options))


def test_deprocess_image():
    noise = np.random.default_rng(2).standard_normal((5, 6, 3))
    np.testing.assert_array_equal(compat.deprocess_image(noise), image.deprocess_image(noise))


@pytest.mark.parametrize("options", [{}, {"use_rgb": True}, {"use_rgb": True, "image_weight": 0.8}])
@pytest.mark.parametrize("colormap", [None, 2, 13, 16, 20, 4])
def test_show_cam_on_image(options, colormap):
    options = options if colormap is None else {**options, "colormap": colormap}
    ours, theirs = (library.show_cam_on_image(RGB, MASK, **options) for library in (compat, image))
    np.testing.assert_array_equal(ours, theirs)
    assert ours.dtype == np.uint8


def test_show_cam_on_image_without_opencv(monkeypatch):
    expected, expected_turbo = image.show_cam_on_image(RGB, MASK), image.show_cam_on_image(RGB, MASK, False, 20)
    monkeypatch.setitem(sys.modules, "cv2", None)
    found = compat.show_cam_on_image(RGB, MASK).astype(int)
    assert np.abs(found - expected).max() <= 2  # OpenCV's jet is a step off the formula in places
    np.testing.assert_array_equal(compat.show_cam_on_image(RGB, MASK, colormap="turbo"), expected_turbo)
    with pytest.raises(InputError, match=r"20 \(turbo\)"):
        compat.show_cam_on_image(RGB, MASK, colormap=4)


def test_show_cam_on_image_refuses():
    with pytest.raises(InputError, match="Divide an 8-bit picture"):
        compat.show_cam_on_image((RGB * 255).astype(np.uint8), MASK)
    with pytest.raises(InputError, match="image_weight"):
        compat.show_cam_on_image(RGB, MASK, image_weight=1.5)


Z = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


@pytest.mark.parametrize("output", [Z, Z[0]])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ClassifierOutputTarget", (2,)),
        ("ClassifierOutputSoftmaxTarget", (2,)),
        ("ClassifierOutputReST", (2,)),
        ("BinaryClassifierOutputTarget", (1,)),
        ("BinaryClassifierOutputTarget", (0,)),
        ("SoftmaxOutputTarget", ()),
        ("RawScoresOutputTarget", ()),
        ("FinerWeightedTarget", (2, [0, 4], 0.7)),
    ],
)
def test_targets_of_classifiers(name, arguments, output):
    ours, theirs = (getattr(library, name)(*arguments)(output) for library in (compat, targets))
    torch.testing.assert_close(ours.squeeze(), theirs.squeeze())


def test_segmentation_target():
    mask, output = np.float32(MASK > 0.5), torch.randn(3, 12, 17)
    ours, theirs = (library.SemanticSegmentationTarget(1, mask)(output) for library in (compat, targets))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.9])
def test_detection_target(threshold):
    generator = torch.Generator().manual_seed(4)
    corners = torch.rand(9, 2, generator=generator) * 40
    boxes = torch.cat((corners, corners + 5 + torch.rand(9, 2, generator=generator) * 40), 1)
    outputs = {"boxes": boxes, "labels": torch.arange(9) % 3, "scores": torch.rand(9, generator=generator)}
    wanted = (boxes[[0, 4, 7]] + 2).numpy()
    ours, theirs = (library.FasterRCNNBoxScoreTarget([0, 1, 2], wanted, threshold)(outputs) for library in (compat, targets))
    torch.testing.assert_close(ours, theirs)
    empty = {name: value[:0] for name, value in outputs.items()}
    assert compat.FasterRCNNBoxScoreTarget([0], wanted[:1])(empty).tolist() == [0.0]


def test_detection_target_counts():
    outputs = {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([3]), "scores": torch.tensor([0.5])}
    # Half the width in common: 50 of 150.
    target = compat.FasterRCNNBoxScoreTarget([3], [[5, 0, 15, 10]], 0.3)
    assert float(target(outputs)) == pytest.approx(1 / 3 + 0.5)
    assert float(compat.FasterRCNNBoxScoreTarget([2], [[5, 0, 15, 10]], 0.3)(outputs)) == 0


def test_the_import_is_light():
    heavy = ("scipy", "cv2", "torchvision", "PIL", "pytorch_grad_cam")
    code = f"import sys, shapleycam.compat; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
