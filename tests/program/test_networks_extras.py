"""Programs of real networks, through torch.export and ONNX Runtime, against float64."""

import copy
import re
from pathlib import Path

import pytest
import torch

from shapleycam import Explainer

from ..helpers import build

pytest.importorskip("torchvision")

SIZE = 64


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("efficientnet_b0", "mobilenet_v2", "regnet_y_400mf")),
    ],
)
def test_networks(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = build(f"tv:{name}")
    images = torch.randn(5, 3, SIZE, SIZE)
    program = Explainer(model).program(images[:2], targets="given", size="image")
    assert program.engine == "closed_form"
    precise = copy.deepcopy(program).double()
    dims = ({0: torch.export.Dim("n", min=1)},) * 2
    exported = torch.export.export(program, (images[:2], torch.tensor([-1, 3])), dynamic_shapes=dims)
    file = tmp_path / "explained.onnx"
    names = {"input_names": ["image", "target"], "output_names": ["prediction", "target_class", "raw", "saliency_map"]}
    torch.onnx.export(exported, f=file, dynamo=True, external_data=False, verbose=False, **names)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for count in (1, 5):
        x, targets = images[:count], torch.tensor([-1, 3, 999, 1000, 0])[:count]
        ran = session.run(None, {"image": x.numpy(), "target": targets.numpy()})
        expected = precise(x.double(), targets)
        for found in (exported.module()(x, targets), tuple(map(torch.from_numpy, ran))):
            good = targets < 1000
            assert torch.equal(found[1], expected.targets)
            assert found[2][~good].isnan().all() and found[3][~good].isnan().all()
            assert off(found[0], expected.logits) < 1e-4
            assert off(found[2][good], expected.raw[good]) < 1e-4
            assert off(found[3][good], expected.maps[good]) < 1e-3


def test_the_page_about_export(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    write, run = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(write, "export.md", "exec"), {"model": build("tv:resnet18"), "images": torch.randn(2, 3, SIZE, SIZE)})
    names: dict = {}
    exec(compile(run, "export.md", "exec"), names)
    assert names["heatmap"].shape == (1, SIZE, SIZE) and names["prediction"].shape == (1, 1000)
