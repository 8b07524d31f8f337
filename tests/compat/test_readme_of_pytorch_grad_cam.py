"""Code for pytorch-grad-cam runs with the imports changed: its README's snippets, and code in the style of its tests."""

import gc
import importlib.metadata
import re

import numpy as np
import pytest
import torch

from shapleycam import compat

torchvision = pytest.importorskip("torchvision")
peer = pytest.importorskip("pytorch_grad_cam")

METHODS = (
    "AblationCAM",
    "EigenCAM",
    "EigenGradCAM",
    "GradCAM",
    "GradCAMPlusPlus",
    "HiResCAM",
    "LayerCAM",
    "RandomCAM",
    "ScoreCAM",
    "ShapleyCAM",
    "XGradCAM",
)


#: The image, and sizes for a small one. Everything else is as it is written there.
STUBS = {
    "input_tensor = # Create an input tensor image for your model..": "input_tensor = images",
    "base_method=GradCAM)": "base_method=GradCAM, num_scales=2)",
    "num_scales=4": "num_scales=2",
    "step_size=224": "step_size=64",
}


def snippets():
    text = importlib.metadata.metadata("grad-cam").get_payload()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    # The rest is about guided backpropagation and metrics, which take no method of ours.
    return [
        block for block in blocks if re.search(r"\b(GradCAM|SESS|ClassifierOutputTarget)\b", block) and "metrics" not in block
    ]


def small_resnet50(weights=None):
    """Stands for the download: the real network, with fewer channels and seeded weights."""
    torch.manual_seed(0)
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], width_per_group=16)


def as_ours(code):
    return code.replace("pytorch_grad_cam", "shapleycam.compat")


def test_the_snippets_are_found():
    found = snippets()
    assert len(found) == 4
    assert "with GradCAM(model=model, target_layers=target_layers) as cam" in found[0]


def test_the_snippets_run(monkeypatch):
    monkeypatch.setattr(torchvision.models, "resnet50", small_resnet50)
    torch.manual_seed(1)
    images = torch.randn(1, 3, 64, 64)
    results = []
    for change in (lambda code: code, as_ours):
        # One session, as a reader of the README would type it.
        names = {"rgb_img": np.random.default_rng(0).random((64, 64, 3), np.float32), "images": images}
        kept = {}
        for number, code in enumerate(snippets()):
            for written, stub in STUBS.items():
                code = code.replace(written, stub)
            code = change(code)
            exec(compile(code, "README.md", "exec"), names)
            if number == 0:
                kept = {key: names[key] for key in ("grayscale_cam", "visualization", "model_outputs")}
        kept["session"] = names["grayscale_cam"]
        kept["last"] = names["cam"](names["input_tensor"], names["targets"])
        results.append(kept)
        assert names["GradCAM"].__module__.startswith("pytorch_grad_cam" if change is not as_ours else "shapleycam")
    theirs, ours = results
    assert ours["grayscale_cam"].std() > 0.05
    for key, expected in theirs.items():
        found = ours[key]
        assert found.shape == expected.shape, key
        if key == "visualization":
            assert np.abs(found.astype(int) - expected).max() <= 1
        else:
            wanted = expected.detach() if key == "model_outputs" else expected
            np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=0, atol=2e-4)


class TwoBlocks(torch.nn.Module):
    """The end of a ResNet, narrow enough for the methods that ask the model once per channel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        block = torchvision.models.resnet.BasicBlock
        self.stem = torch.nn.Conv2d(3, 12, 7, stride=8, padding=3)
        self.layer4 = torch.nn.Sequential(block(12, 12), block(12, 12))
        self.fc = torch.nn.Linear(12, 200)

    def forward(self, x):
        return self.fc(self.layer4(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize("layers", [["layer4[-1]", "layer4[-2]"], ["layer4[-1]"]])
@pytest.mark.parametrize(("batch_size", "width", "height"), [(2, 32, 32), (1, 32, 40)])
@pytest.mark.parametrize("category", [None, 100])
@pytest.mark.parametrize("eigen_smooth", [False, True])
def test_code_in_the_style_of_its_tests(layers, batch_size, width, height, category, eigen_smooth):
    model = TwoBlocks()
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    input_tensor = compat.preprocess_image(picture).repeat(batch_size, 1, 1, 1)
    target_layers = [model.layer4[int(name[7:-1])] for name in layers]
    for name in METHODS:
        if name == "ShapleyCAM" and category is None:
            continue  # it warns, see test_drop_in
        cam = getattr(compat, name)(model=model, target_layers=target_layers)
        cam.batch_size = 4
        targets = None if category is None else [compat.ClassifierOutputReST(category) for _ in range(batch_size)]
        grayscale_cam = cam(input_tensor=input_tensor, targets=targets, aug_smooth=False, eigen_smooth=eigen_smooth)
        assert grayscale_cam.shape == (batch_size, height, width)
        assert grayscale_cam.dtype == np.float32 and grayscale_cam.min() >= 0 and grayscale_cam.max() <= 1


def test_one_channel():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 5), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(3), torch.nn.Flatten(), torch.nn.Linear(144, 10)
    )
    maps = compat.GradCAM(model, [model[0]])(torch.randn(2, 1, 20, 20), [compat.ClassifierOutputTarget(3)] * 2)
    assert maps.shape == (2, 20, 20) and maps.std() > 0.05


def test_the_context_releases_everything():
    model = small_resnet50().eval()
    with compat.GradCAM(model=model, target_layers=[model.layer4[-1]]) as cam:
        cam(torch.randn(1, 3, 64, 64), [compat.ClassifierOutputTarget(1)])
        assert cam.activations_and_grads.activations
    assert not cam.activations_and_grads.activations and not model.layer4[-1]._forward_hooks
    # Nothing but the caller's names keeps the object alive.
    import weakref

    gone = weakref.ref(cam)
    del cam
    gc.collect()
    assert gone() is None


def test_its_metrics_take_our_objects():
    arcc = pytest.importorskip("pytorch_grad_cam.metrics.arcc")
    mult = pytest.importorskip("pytorch_grad_cam.metrics.cam_mult_image")
    model = small_resnet50().eval()
    images, targets = torch.randn(2, 3, 64, 64), [compat.ClassifierOutputSoftmaxTarget(1)] * 2
    found = []
    for library in (peer, compat):
        cam = library.GradCAM(model, [model.layer4[-1]])
        maps = cam(images, targets)
        drop = mult.CamMultImageConfidenceChange()(images, maps, targets, model)
        found.append((drop, arcc.ARCC(base_method=cam)(images, maps, targets, model)))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-3, atol=1e-6)
