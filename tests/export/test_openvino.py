"""OpenVINO, and its Model API with saliency code of its own, read an artefact."""

import copy

import numpy
import pytest
import torch
from torch import nn

from shapleycam import Explainer, ExportError
from shapleycam.export import export, load
from shapleycam.export.formats import onnx

from .conftest import CLASSES, PREPROCESS, SIZE

openvino = pytest.importorskip("openvino")
models = pytest.importorskip("model_api.models")

OPTIONS = {
    "outputs": ("prediction", "saliency_map", "feature_vector"),
    "preprocess": PREPROCESS,
    "classes": [f"kind {i}" for i in range(CLASSES)],
}
#: OpenVINO computes in bfloat16 where the processor has it, unless it is told not to.
PRECISE = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture
def precise(model):
    return Explainer(copy.deepcopy(model).double())


def test_openvino(made, precise):
    compiled = openvino.Core().compile_model(made(**OPTIONS).path, "CPU", PRECISE)
    for count in (1, 4):
        images = torch.randn(count, 3, SIZE, SIZE)
        images[-1, 0, 0, 0] = float("nan") if count > 1 else 0.0
        found = compiled({"image": images.numpy()})
        images[-1, 0, 0, 0] = 0.0
        expected = precise(images.double())
        assert numpy.isnan(found["saliency_map"][count - 1]).all() == (count > 1)
        well = slice(0, max(1, count - 1))
        numpy.testing.assert_allclose(found["prediction"][well], expected.logits.detach()[well], rtol=1e-4, atol=1e-4)
        numpy.testing.assert_allclose(found["saliency_map"][well], expected.heatmaps()[well], atol=1e-4)


def test_openvino_given_classes(made, precise):
    compiled = openvino.Core().compile_model(made(targets="given", maps="raw").path, "CPU", PRECISE)
    images = torch.randn(3, 3, SIZE, SIZE)
    found = compiled({"image": images.numpy(), "target": numpy.array([-1, 4, CLASSES])})
    expected = precise(images.double(), torch.tensor([int(precise.model(images[:1].double()).argmax()), 4, 0])).raw
    numpy.testing.assert_allclose(found["saliency_map"][:2], expected[:2], rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert numpy.isnan(found["saliency_map"][2]).all()


def test_a_class_that_is_none_behind_a_relu(model, example, tmp_path):
    """Its maximum of NaN and 0 is 0, which LayerCAM takes of the channels' weights."""
    options = {"targets": "given", "maps": "raw", "runtimes": ["openvino"]}
    artefact = export(Explainer(model, method="layercam"), example, tmp_path / "explained.onnx", **options)
    found = load(artefact.path, "openvino").explain(example, torch.tensor([CLASSES, 2])).maps
    assert found[0].isnan().all() and found[1].isfinite().all()


def test_an_export_is_checked_there_too_where_that_is_asked_for(model, example, tmp_path, monkeypatch):
    path = tmp_path / "explained.onnx"
    artefact = export(Explainer(model), example, path, runtimes=["onnxruntime", "openvino"], maps="raw")
    assert list(artefact.metadata.checks) == ["onnxruntime", "openvino"]
    assert 0 < artefact.metadata.checks["openvino"]["maps"] < 1e-5
    images = torch.randn(2, 3, SIZE, SIZE)
    found, other = artefact.explain(images), load(path, runtime="openvino").explain(images)
    torch.testing.assert_close(found.maps, other.maps, rtol=1e-4, atol=1e-5)
    start = onnx._openvino

    def wrong(*arguments):
        run = start(*arguments)
        return lambda inputs: tuple(each * 1.001 for each in run(inputs))

    monkeypatch.setattr(onnx, "_openvino", wrong)
    with pytest.raises(ExportError, match="in openvino it is off by"):
        export(Explainer(model), example, path, runtimes=["onnxruntime", "openvino"], overwrite=True)
    assert load(path).metadata.maps == "raw"  # the good one is still there


def test_the_model_api_finds_the_map_the_features_and_the_labels(made, precise):
    from model_api.adapters import OpenvinoAdapter

    adapter = OpenvinoAdapter(openvino.Core(), str(made(**OPTIONS).path), plugin_config=PRECISE)
    model = models.Model.create_model(adapter, preload=True)
    assert isinstance(model, models.ClassificationModel)  # by the file's own words
    pixels = numpy.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=numpy.uint8)
    result = model(pixels)
    mean, std = (torch.tensor(each, dtype=torch.float64) for each in (PREPROCESS.mean, PREPROCESS.std))
    images = ((torch.from_numpy(pixels).double() / 255 - mean) / std).permute(2, 0, 1)[None]
    expected = precise(images)
    numpy.testing.assert_allclose(result.saliency_map, expected.heatmaps(), atol=1e-4)
    numpy.testing.assert_allclose(result.feature_vector, precise.model[:3](images).mean((2, 3)).detach(), rtol=1e-3, atol=1e-4)
    best = int(expected.targets)
    assert (result.top_labels[0].id, result.top_labels[0].name) == (best, f"kind_{best}")
    numpy.testing.assert_allclose(result.top_labels[0].confidence, float(expected.probabilities), rtol=1e-4)


def test_a_square_matrix_is_not_taken_for_its_transpose(tmp_path):
    """OpenVINO 2026.4 mixes up the two that a derivative multiplies by, where both come from one constant of this size."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.Linear(768, 768), nn.GELU(), nn.Linear(768, 768), nn.GELU(), nn.Linear(768, 9))
    model = nn.Sequential(nn.Conv2d(3, 48, 1), head).eval()
    images = torch.randn(2, 3, 4, 4)
    artefact = export(Explainer(model, "0"), images, tmp_path / "a.onnx", maps="raw", runtimes=["onnxruntime", "openvino"])
    assert all(0 < checks["maps"] < 1e-5 for checks in artefact.metadata.checks.values())
