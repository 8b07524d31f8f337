"""Artefacts for images of any height and width, against autograd in float64 at sizes that they were not made with."""

import copy
from importlib.util import find_spec

import numpy
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from shapleycam import Explainer, ExportError, InputError
from shapleycam.export import export, load, make
from shapleycam.program.pooled import PooledProgram

from ..helpers import Split, build, narrow_vgg11
from .conftest import CLASSES, PREPROCESS, SIZE

ALL = ("prediction", "saliency_map", "raw_map", "target_class", "feature_vector")
#: The least size of the small network, oblong ones, odd ones, and large ones.
SIZES = [(4, 4), (4, 31), (13, 12), (12, 13), (64, 40), (101, 37)]


def images_of(count, height, width):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(height * 1000 + width + count))


def off(found, expected):
    expected = expected.detach()
    assert found.shape == expected.shape
    return float((found.double() - expected).abs().max() / expected.abs().max())


def by_autograd(model, layer="auto"):
    """Nothing of the closed form is in it."""
    return Explainer(copy.deepcopy(model).double(), layer, engine="reverse_over_reverse")


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_any_size_and_number(made, model, suffix):
    artefact, precise = made(suffix, dynamic_size=True, outputs=ALL, targets="given"), by_autograd(model)
    assert artefact.metadata.least_size == (4, 4) and artefact.metadata.image_size == (SIZE, SIZE)
    for i, (height, width) in enumerate(SIZES):
        images = images_of(1 + i % 3, height, width)
        targets = torch.arange(len(images)) * 2
        found, expected = artefact.explain(images, targets), precise(images.double(), targets)
        assert found.maps.shape[1:] == (height, width) and found.raw.shape[1:] == ((height + 1) // 2, (width + 1) // 2)
        assert off(found.logits, expected.logits) < 1e-5
        assert off(found.raw, expected.raw) < 1e-5
        assert off(found.maps, expected.heatmaps()) < 1e-4
        assert off(found.features, precise.model[:3](images.double()).mean((2, 3))) < 1e-5


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_maps_of_several_and_all_classes(made, model, suffix):
    precise, images = by_autograd(model), images_of(2, 9, 22)
    several = made(suffix, dynamic_size=True, targets="several", maps="layer")
    given = torch.tensor([[0, 5, 6]] * 2)
    expected = precise(images.double(), given)
    assert off(several.explain(images, given).maps, expected.heatmaps(expected.raw.shape[2:])) < 1e-4
    everything = made(suffix, dynamic_size=True, targets="all", maps="raw").explain(images)
    assert off(everything.maps, precise(images.double(), torch.arange(CLASSES).expand(2, -1)).raw) < 1e-5


def test_pixels_are_not_resized(made, model):
    artefact = made(dynamic_size=True, preprocess=PREPROCESS, pixels=True, maps="raw")
    assert artefact.metadata.inputs[0].shape == ("n", "height", "width", 3)
    mean, std = (torch.tensor(each, dtype=torch.float64) for each in (PREPROCESS.mean, PREPROCESS.std))
    for height, width in ((SIZE, SIZE), (30, 7)):
        pixels = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8)
        expected = by_autograd(model)(((pixels.double() / 255 - mean) / std).permute(0, 3, 1, 2))
        assert off(artefact.explain(pixels).maps, expected.raw) < 1e-5


class Last(nn.Module):
    """With the channels last at its target layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(3, 10, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.stem(images).permute(0, 2, 3, 1)).mean((1, 2)))


@pytest.mark.parametrize("engine", ["closed_form", "quadrature"])
def test_channels_last_and_quadrature(tmp_path, engine):
    model = Last().eval()
    options = {"method": "shapleycam-h", "engine": engine}
    artefact = export(
        Explainer(model, "norm", **options), images_of(2, 21, 20), tmp_path / "a.onnx", dynamic_size=True, maps="raw"
    )
    options["engine"] = "reverse_over_reverse" if engine == "closed_form" else engine
    precise = Explainer(copy.deepcopy(model).double(), "norm", **options)
    for size in ((21, 20), (40, 8), (17, 33)):
        images = images_of(3, *size)
        assert off(artefact.explain(images).maps, precise(images.double()).raw) < 1e-5


def curved(ceil_mode=True):
    """A stride, a pool whose last window may be cut, and an adaptive one."""
    torch.manual_seed(3)
    head = nn.Sequential(
        nn.Conv2d(6, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.MaxPool2d(3, 2, ceil_mode=ceil_mode),
        nn.AdaptiveAvgPool2d((3, 2)),
        nn.Flatten(),
        nn.Linear(48, CLASSES),
    )
    with torch.no_grad():
        head[-1].weight.mul_(5)
        head[1].running_var.uniform_(0.3, 1.5)
    return Split(nn.Conv2d(3, 6, 3, 2, 1), head).eval()


@pytest.mark.parametrize("suffix", [".onnx", pytest.param(".pt2", marks=pytest.mark.long)])
def test_a_head_with_derivatives_of_its_own(tmp_path, suffix):
    model = curved()
    runtimes = ["onnxruntime", "openvino"] if suffix == ".onnx" and find_spec("openvino") else []
    explainer, path = Explainer(model, "target"), tmp_path / f"a{suffix}"
    made = export(explainer, images_of(2, 32, 32), path, dynamic_size=True, targets="given", outputs=ALL[:4], runtimes=runtimes)
    precise = by_autograd(model, "target")
    assert precise(images_of(1, 32, 32).double()).diagnostics.engine == "reverse_over_reverse"
    for runtime in runtimes or ["torch"]:
        artefact = load(path, runtime=runtime)
        for i, size in enumerate((made.metadata.least_size, (32, 32), (33, 70), (50, 47), (97, 101))):
            images = images_of(1 + i % 3, *size)
            targets = torch.arange(len(images)) * 2
            found, expected = artefact.explain(images, targets), precise(images.double(), targets)
            assert off(found.logits, expected.logits) < 1e-5 and off(found.raw, expected.raw) < 1e-5
            assert off(found.maps, expected.heatmaps()) < 1e-3


class LargeIsOther(nn.Module):
    """torch.export lets rules about height and width together pass in silence."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.tanh() if x.shape[2] * x.shape[3] > 3000 else x.sigmoid()


@pytest.mark.parametrize("options", [{}, {"preprocess": PREPROCESS, "pixels": True, "maps": "raw"}, {"format": "pt2"}])
def test_a_model_that_decides_by_height_and_width_together(tmp_path, options):
    """The closed form is around the model itself, so that its program is right, and has no rules."""
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 6, 3, 2, 1), LargeIsOther(), nn.Conv2d(6, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    explainer = Explainer(nn.Sequential(*parts, nn.Linear(8, CLASSES)).eval(), "2")
    images = images_of(2, SIZE, SIZE)
    assert isinstance(explainer.program(images, dynamic_size=True), PooledProgram)
    with pytest.raises(ExportError, match="for such sizes only: .* <= 3000, which is not so for .*The artefact"):
        export(
            explainer, images, tmp_path / "a.pt2" if "format" in options else tmp_path / "a.onnx", dynamic_size=True, **options
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "layer", "size"),
    [
        ("vgg11", "features.20", 64),
        ("vgg11", "features.18", 64),  # in front of a ReLU that writes
        ("resnet18", "layer3", 64),
        ("densenet121", "features.denseblock4", 64),  # a ReLU and a pool behind it
        ("mobilenet_v3_small", "features.10", 64),  # squeeze and excitation
        ("convnext_tiny", "features.7", 64),  # LayerNorm behind the pool
    ],
)
def test_heads_of_torchvision_with_derivatives_of_their_own(tmp_path, name, layer, size):
    model = narrow_vgg11(size) if name == "vgg11" else build(f"tv:{name}", size)
    artefact = export(Explainer(model, layer), images_of(2, size, size), tmp_path / "a.onnx", dynamic_size=True, maps="raw")
    precise = by_autograd(model, layer)
    for i, other in enumerate(((size, size), (65, 130), (161, 97))):
        images = images_of(1 + i % 3, *other)
        found, expected = artefact.explain(images), precise(images.double())
        assert off(found.logits, expected.logits) < 1e-4 and off(found.maps, expected.raw) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [("resnet18", {}), pytest.param("mobilenet_v2", {"width_mult": 0.25}, marks=pytest.mark.long)]
)
def test_networks_of_torchvision_in_both_runtimes(tmp_path, name, options):
    pytest.importorskip("openvino")
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(2)
    model = getattr(torchvision.models, name)(num_classes=12, **options).eval()
    path, runtimes = tmp_path / "a.onnx", ["onnxruntime", "openvino"]
    export(Explainer(model), images_of(2, 96, 96), path, dynamic_size=True, outputs=ALL[:3], runtimes=runtimes)
    precise = by_autograd(model)
    for runtime in runtimes:
        artefact = load(path, runtime=runtime)
        for i, size in enumerate(((64, 64), (96, 96), (65, 130), (161, 97))):
            images = images_of(1 + i % 3, *size)
            found, expected = artefact.explain(images), precise(images.double())
            assert off(found.logits, expected.logits) < 1e-4
            assert off(found.raw, expected.raw) < 1e-4
            assert found.maps.shape == expected.heatmaps().shape and (found.maps - expected.heatmaps()).abs().max() < 1e-3


def test_openvino(tmp_path, model, example):
    pytest.importorskip("openvino")
    path = tmp_path / "a.onnx"
    export(Explainer(model), example, path, dynamic_size=True, outputs=ALL[:3], runtimes=["onnxruntime", "openvino"])
    artefact, precise = load(path, runtime="openvino"), by_autograd(model)
    for i, size in enumerate(SIZES):
        images = images_of(1 + i % 3, *size)
        found, expected = artefact.explain(images), precise(images.double())
        assert off(found.raw, expected.raw) < 1e-5 and off(found.maps, expected.heatmaps()) < 1e-4


def test_the_model_api_with_pixels(made):
    openvino, models = pytest.importorskip("openvino"), pytest.importorskip("model_api.models")
    from model_api.adapters import OpenvinoAdapter

    artefact = made(dynamic_size=True, preprocess=PREPROCESS, pixels=True)
    adapter = OpenvinoAdapter(openvino.Core(), str(artefact.path), plugin_config={"INFERENCE_PRECISION_HINT": "f32"})
    pixels = numpy.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=numpy.uint8)
    found = models.Model.create_model(adapter, preload=True)(pixels).saliency_map
    numpy.testing.assert_allclose(found, artefact.explain(pixels[None]).maps, atol=1e-4)


@pytest.mark.long
def test_a_compiled_library_of_a_head_with_derivatives_of_its_own(tmp_path):
    model = curved(ceil_mode=False)
    artefact = export(Explainer(model, "target"), images_of(2, 32, 32), tmp_path / "a.pt2", format="aoti", dynamic_size=True)
    precise = by_autograd(model, "target")
    for i, size in enumerate((artefact.metadata.least_size, (32, 32), (33, 70), (97, 101))):
        images = images_of(1 + i % 3, *size)
        found, expected = artefact.explain(images), precise(images.double())
        assert off(found.logits, expected.logits) < 1e-5 and off(found.maps, expected.heatmaps()) < 1e-3


@pytest.mark.long
def test_what_the_compiler_takes_for_granted_of_the_example(tmp_path, monkeypatch):
    """AOTInductor compiles such a pool for sizes at which its last window is cut as in the example, and says nothing."""
    explainer, path = Explainer(curved(ceil_mode=True), "target"), tmp_path / "a.pt2"
    passed = make.check  # of the sizes that are always tried, which may be such
    monkeypatch.setattr(make, "check", lambda run, about, by, batches, most: passed(run, about, by, batches[-1:], most))
    with pytest.raises(ExportError, match="for such sizes only: .*which is not so for .*artefact"):
        export(explainer, images_of(2, 32, 32), path, format="aoti", dynamic_size=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_compiled_library(tmp_path, model, example):
    artefact = export(Explainer(model), example, tmp_path / "a.pt2", format="aoti", dynamic_size=True, outputs=ALL[:3])
    precise = by_autograd(model)
    for i, size in enumerate(SIZES):
        images = images_of(1 + i % 3, *size)
        found, expected = artefact.explain(images), precise(images.double())
        assert off(found.raw, expected.raw) < 1e-5 and off(found.maps, expected.heatmaps()) < 1e-4


def test_what_the_file_says(made):
    artefact = made(dynamic_size=True, outputs=ALL, targets="given")
    session = onnxruntime.InferenceSession(artefact.path, providers=["CPUExecutionProvider"])
    assert [(value.name, value.shape) for value in (*session.get_inputs(), *session.get_outputs())] == [
        ("image", ["n", 3, "height", "width"]),
        ("target", ["n"]),
        ("prediction", ["n", CLASSES]),
        ("saliency_map", ["n", "height", "width"]),
        ("raw_map", ["n", "grid_height", "grid_width"]),
        ("target_class", ["n"]),
        ("feature_vector", ["n", 12]),
    ]
    onnx.checker.check_model(str(artefact.path), full_check=True)
    sizes = artefact.metadata.checks["onnxruntime"]["sizes"]
    assert sizes[:2] == ((SIZE, SIZE),) * 2 and (4, 4) in sizes and any(height != width for height, width in sizes)


def test_images_that_are_too_small_or_none(made):
    artefact = made(dynamic_size=True, outputs=ALL, targets="given")
    for size in ((3, 40), (40, 3)):
        with pytest.raises(InputError, match=r"float32 \[N, 3, height, width\], height >= 4, width >= 4"):
            artefact.explain(images_of(1, *size))
    with pytest.raises(InputError, match="3, height, width"):
        artefact.explain(torch.zeros(1, 4, 20, 20))


def test_a_resize_has_one_size(model, example, tmp_path):
    with pytest.raises(InputError, match="leave out dynamic_size=True"):
        export(Explainer(model), example, tmp_path / "a.onnx", preprocess=PREPROCESS, resize=True, dynamic_size=True)


class Branching(nn.Module):
    """Other weights for large images: each road by itself is a sound network."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3, padding=1)
        self.classifier = nn.Linear(4, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.features(images)
        if images.shape[2] > 100:
            features = features * features
        return self.classifier(features.mean((2, 3)))


@pytest.mark.parametrize("name", ["a.onnx", "a.pt2"])
def test_a_model_that_looks_at_the_size(example, tmp_path, name):
    """At 12 pixels, and wherever it is tried, the graph of the small road is right."""
    with pytest.raises(ExportError, match=r"for such sizes only: .*height.*\b100\b"):
        export(Explainer(Branching().eval(), "features"), example, tmp_path / name, dynamic_size=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.onnx", "a.pt2"])
def test_a_number_of_positions_that_became_a_constant_is_found(model, example, tmp_path, monkeypatch, name):
    weights, trace = PooledProgram._channel_weights, make.trace

    def constant(self, logits, activations, targets):
        alpha, a = weights(self, logits, activations, targets)
        return alpha * a.shape[2] / 36, a  # right at 12 x 12

    def traced(*arguments):
        monkeypatch.setattr(PooledProgram, "_channel_weights", constant)
        return trace(*arguments)

    monkeypatch.setattr(make, "trace", traced)
    with pytest.raises(ExportError, match="it is off by"):
        export(Explainer(model), example, tmp_path / name, dynamic_size=True, maps="raw")
    monkeypatch.setattr(PooledProgram, "_channel_weights", weights)
    export(Explainer(model), example, tmp_path / name, maps="raw")  # which is why other sizes are tried


@pytest.mark.parametrize(("name", "said"), [("a.onnx", "is to be free, and .* fixed"), ("a.pt2", "does not run with images")])
def test_a_graph_of_one_size_is_found(model, example, tmp_path, monkeypatch, name, said):
    trace = make.trace

    def fixed(interface, inputs, examples, least):
        port = inputs[0]
        return trace(interface, [type(port)(port.name, port.dtype, ("n", *examples[0].shape[1:]), "")], examples, {})

    monkeypatch.setattr(make, "trace", fixed)
    with pytest.raises(ExportError, match=said):
        export(Explainer(model), example, tmp_path / name, dynamic_size=True)


def test_the_file_alone(made, model):
    """In float32 pixels by ONNX Runtime's own interface, at a size that nobody tried."""
    session = onnxruntime.InferenceSession(made(dynamic_size=True, outputs=ALL, targets="given").path)
    images = images_of(2, 50, 29)
    [maps] = session.run(["saliency_map"], {"image": images.numpy(), "target": numpy.array([-1, 3])})
    predicted = int(by_autograd(model).model(images.double())[0].argmax())
    expected = by_autograd(model)(images.double(), torch.tensor([predicted, 3])).heatmaps()
    assert off(torch.from_numpy(maps), expected) < 1e-4
