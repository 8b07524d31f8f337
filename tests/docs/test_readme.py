"""What the README says is so: its code runs, its tables are those of the package, its links lead somewhere."""

import json
import re
from pathlib import Path

import pytest
import torch

from shapleycam import METHODS, UTILITIES, Explainer

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_there_are_examples():
    assert len(BLOCKS) == 6
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 10


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS[:2], ids=["photo", "own"])
def test_the_first_examples_run(tmp_path, monkeypatch, block):
    for module in ("PIL", "torchvision", "efficientnet_lite_pytorch", "skimage"):
        pytest.importorskip(module)
    from PIL import Image

    from shapleycam.cli.demo import photographs

    monkeypatch.chdir(tmp_path)
    with Image.open(photographs()[0]) as photo:
        photo.convert("RGB").save("photo.jpg")
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    if "signed" in names:
        assert names["heatmaps"].shape == (8, 224, 224)
        assert names["signed"].shape == (8, 7, 7)
        assert names["how"].engine == "closed_form"
    else:
        assert names["classifier"].class_name(int(names["explanation"].targets[0])) == "tiger cat"
        assert Path("overlay.png").stat().st_size > 10_000
        assert torch.isfinite(names["explanation"].heatmaps()).all()


@pytest.mark.slow
def test_the_other_examples_run():
    """Those that go on from the one before, on small networks; the one of other tasks is in tests/utilities."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    model.layer4 = torch.nn.Sequential(torch.nn.Conv2d(256, 32, 3, 2, 1), torch.nn.ReLU())  # as far as the names are used
    model.fc = torch.nn.Linear(32, 1000)
    model.eval()
    names: dict = {"torch": torch, "model": model, "images": torch.randn(2, 3, 64, 64), "explainer": Explainer(model)}
    path, _, drop_in, game = BLOCKS[2:]
    for line in path.strip().splitlines():
        given: dict = {"Explainer": Explainer, "model": model}
        exec(compile(line, "README.md", "exec"), given)
        assert given["explainer"](names["images"]).diagnostics.engine == "quadrature"
    exec(compile(drop_in, "README.md", "exec"), names)
    assert names["grayscale_cam"].shape == (2, 64, 64)
    names["images"] = torch.randn(1, 3, 128, 128)  # a map of 4 x 4, as many as the cells
    exec(compile(game, "README.md", "exec"), names)
    assert names["oracle"].values.shape == (1, 16)


def test_the_figures_of_the_path_are_those_of_the_study():
    rows = json.loads((ROOT / "bench" / "results" / "agreement-heads.json").read_text())["heads"]

    def error(network, baseline, way):
        [row] = [r for r in rows if (f"{r['network']} {r['layer']}", r["baseline"]) == (network, baseline)]
        return f"{sorted(row[way]['error'])[1]:.3f}"

    said = {
        "tv:resnet18 layer4": [("zero", "first order"), ("zero", "second order"), ("zero", "K=4")],
        "timm:swin_tiny_patch4_window7_224 layers.3.blocks.0": [
            ("zero", "first order"),
            ("zero", "second order"),
            ("mean", "K=4"),
        ],
        "tv:vgg11 features": [("zero", "first order"), ("zero", "second order"), ("mean", "K=4, 16 masks")],
    }
    figures = [error(network, *place) for network, places in said.items() for place in places]
    [sentence] = re.findall(r"The relative error to the exact Shapley values.*?`features`\.", TEXT, re.DOTALL)
    assert re.findall(r"\d\.\d{3}", sentence) == figures


def test_the_method_table_is_the_packages():
    rows = re.findall(r"^\| `([^`]+)` \| (\S+) \| (.+) \|$", TEXT, re.MULTILINE)
    listed = {name: (title, formula.replace("−", "-")) for name, title, formula in rows if name in METHODS}
    assert listed == {row.name: (row.title, row.formula) for row in METHODS.values()}
    for name in UTILITIES:
        assert f"`{name}`" in TEXT


def test_links_lead_somewhere():
    headings = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert (ROOT / target).exists(), target
