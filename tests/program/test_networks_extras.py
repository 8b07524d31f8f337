"""Programs of real networks, through torch.export and ONNX Runtime, against float64."""

import copy

import pytest
import torch

from shapleycam import Explainer

from ..helpers import build, wake

torchvision = pytest.importorskip("torchvision")

SIZE = 64


def made(name: str, **options: object) -> torch.nn.Module:
    """A live network by name; "tv:resnet10" is ResNet-18 with one block in the place of two."""
    if name != "tv:resnet10":
        return build(name, **options)
    torch.manual_seed(0)
    return wake(torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]), SIZE)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "name",
    [
        "resnet10",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("resnet18", "efficientnet_b0", "mobilenet_v2", "regnet_y_400mf")
        ),
    ],
)
def test_pool_and_linear_heads(name, tmp_path):
    program = runs_elsewhere(made(f"tv:{name}"), "auto", "auto", tmp_path)
    assert program.engine == "closed_form"


@pytest.mark.parametrize(
    ("name", "layer", "engine"),
    [
        ("tv:resnet10", "layer3", "auto"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ("tv:resnet18", "layer3", "auto"),
                ("tv:resnet18", "layer3", "quadrature"),
                ("tv:vgg11", "features.20", "auto"),  # VGG's last layer: a pool, and three linear layers
                ("tv:vgg11", "features.18", "auto"),  # in front of a ReLU that writes
                ("tv:mobilenet_v3_small", "features.10", "auto"),  # squeeze and excitation, hard swish, hard sigmoid
                ("tv:densenet121", "features.denseblock3", "auto"),  # an average pool with stride
                ("timm:convnext_atto", "stages.2", "auto"),  # depthwise convolutions, LayerNorm
                ("timm:vit_tiny_patch16_224", "blocks.10.norm1", "auto"),  # a class token, attention
                ("timm:swin_tiny_patch4_window7_224", "layers.3.blocks.0", "auto"),  # attention by windows
            )
        ),
    ],
)
def test_other_heads(name, layer, engine, tmp_path):
    options = {"img_size": SIZE} if "vit" in name or "swin" in name else {}
    program = runs_elsewhere(made(name, **options), layer, engine, tmp_path)
    assert program.engine == ("quadrature" if engine == "quadrature" else "reverse_over_reverse")


def runs_elsewhere(model, layer, engine, tmp_path):
    """The program, after it ran through torch.export and in ONNX Runtime at other batch sizes, compared in float64."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    images = torch.randn(5, 3, SIZE, SIZE)
    program = Explainer(model, layer, engine=engine).program(images[:2], targets="given", size="image")
    exact = Explainer(copy.deepcopy(model).double(), layer, engine=engine, backend="torch")
    dims = ({0: torch.export.Dim("n", min=1)},) * 2
    exported = torch.export.export(program, (images[:2], torch.tensor([-1, 3])), dynamic_shapes=dims)
    file = tmp_path / "explained.onnx"
    names = {"input_names": ["image", "target"], "output_names": ["prediction", "target_class", "raw", "saliency_map"]}
    torch.onnx.export(exported, f=file, dynamo=True, external_data=False, verbose=False, **names)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for count in (1, 5):
        x, targets = images[:count], torch.tensor([-1, 3, 999, 1000, 0])[:count]
        ran = session.run(None, {"image": x.numpy(), "target": targets.numpy()})
        good = targets < 1000
        predicted = exact(x.double()).targets
        wanted = torch.where(targets == -1, predicted, targets)
        expected = exact(x.double(), torch.where(good, wanted, 0))
        for found in (exported.module()(x, targets), tuple(map(torch.from_numpy, ran))):
            assert torch.equal(found[1], wanted)
            assert found[2][~good].isnan().all() and found[3][~good].isnan().all()
            assert off(found[0], expected.logits) < 1e-4
            assert off(found[2][good], expected.raw[good]) < 1e-4
            assert off(found[3][good], expected.heatmaps()[good]) < 1e-3
    return program
