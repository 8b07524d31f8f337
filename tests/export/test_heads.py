"""Heads that are no mean and linear layer: their derivatives are inside the file."""

import copy

import pytest
import torch
from torch import nn

from shapleycam import Explainer, ExportError
from shapleycam.export import export, load

from ..helpers import small_heads

HEADS = ["relu-pool-linear", "conv-bn-silu", "pool-norm-linear", "flatten-mlp", "attention"]


class Network(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.target, self.head = small_heads()[name]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.target(images))


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.detach()
    assert found.shape == expected.shape
    return float((found.double() - expected).abs().max() / expected.abs().max())


#: The others take as long again.
SHORT = {("conv-bn-silu", ".onnx"), ("attention", ".onnx"), ("flatten-mlp", ".pt2")}
CASES = [
    pytest.param(name, suffix, marks=() if (name, suffix) in SHORT else pytest.mark.long)
    for name in HEADS
    for suffix in (".onnx", ".pt2")
]


@pytest.mark.parametrize(("name", "suffix"), CASES)
def test_curved_heads(name, suffix, tmp_path):
    model = Network(name).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    precise = Explainer(copy.deepcopy(model).double(), "target")
    example = torch.randn(2, 3, 4, 4)
    export(
        Explainer(model, "target"),
        example,
        tmp_path / f"explained{suffix}",
        targets="given",
        maps="raw",
        outputs=("prediction", "saliency_map", "target_class"),
    )
    artefact = load(tmp_path / f"explained{suffix}")
    for count in (1, 4):
        images = torch.randn(count, 3, 4, 4)
        given = torch.tensor([-1, 2, 5, 0])[:count]
        found = artefact.explain(images, given)
        predicted = precise.model(images.double()).argmax(1)
        chosen = torch.where(given == -1, predicted, given)
        expected = precise(images.double(), chosen.clamp_max(4))
        assert torch.equal(found.targets, chosen)
        assert off(found.logits, expected.logits) < 1e-5
        well = chosen < 5
        assert off(found.maps[well], expected.raw[well]) < 1e-4
        assert found.maps[~well].isnan().all()


def test_a_feature_vector_needs_the_layers_own_module(tmp_path):
    model = Network("flatten-mlp").eval()
    with pytest.raises(ExportError, match="no feature vector"):
        export(
            Explainer(model, "target"),
            torch.randn(2, 3, 4, 4),
            tmp_path / "explained.onnx",
            outputs=("prediction", "saliency_map", "feature_vector"),
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_weights_are_not_repeated_for_every_image(tmp_path):
    """PyTorch's transposed attention repeats its weight by a stride of zero; an ONNX runtime would copy it."""
    onnx, torchvision = pytest.importorskip("onnx"), pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(16, 4, 1, 2, 8, 16, num_classes=5).eval()
    nn.init.normal_(model.heads.head.weight)
    images = torch.randn(2, 3, 16, 16)
    artefact = export(Explainer(model, "encoder.layers.encoder_layer_0.ln_1"), images, tmp_path / "a.onnx", maps="raw")
    graph = onnx.load(artefact.path).graph
    made = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        before = made.get(node.input[1]) if node.op_type == "MatMul" else None
        while before is not None and before.op_type == "Transpose":
            before = made.get(before.input[0])
        assert before is None or before.op_type != "Expand", node.name
    read = {name for node in graph.node for name in node.input}
    assert {each.name for each in graph.initializer} <= read
    precise = Explainer(copy.deepcopy(model).double(), "encoder.layers.encoder_layer_0.ln_1")
    found, expected = artefact.explain(images), precise(images.double())
    assert off(found.maps, expected.raw) < 1e-4
