"""The paper's twelve networks: invariants of their target layers with seeded weights, and its numbers as data."""

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("timm")

import timm
import torchvision

from shapleycam import Explainer, InputError
from shapleycam.data.images import Preprocess
from shapleycam.evaluate.metrics.functional import adcc
from shapleycam.evaluate.paper import COLUMNS, PREPROCESS, PRESETS, get_preset, load_preset, paper_accuracy, paper_row

from ..helpers import wake


def seeded(preset):
    torch.manual_seed(0)
    if preset.library == "timm":
        return timm.create_model(preset.name, pretrained=False, img_size=64, embed_dim=96)  # of Swin-L 192
    fast = {"init_weights": False} if preset.network == "VGG-16" else {}
    return torchvision.models.get_model(preset.name, weights=None, **fast)


@pytest.mark.slow
@pytest.mark.parametrize("network", PRESETS)
def test_invariants(network):
    preset = PRESETS[network]
    model = wake(seeded(preset), size=64)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    found = Explainer(model, layer=preset.layer).compare(images)
    maps = {name: explanation.heatmaps() for name, explanation in found.items()}
    for name in ("shapleycam", "shapleycam-h", "gradcam", "hirescam", "xgradcam"):
        assert float(maps[name].amax((1, 2)).min()) > 0.99, f"the maps of {name} are dead: nothing is compared"

    def apart(a, b):
        return float((maps[a] - maps[b]).abs().max())

    # The second order says something on every network.
    assert apart("shapleycam", "gradcam") > 2e-4
    if preset.constant:
        assert found["gradcam"].diagnostics.engine == "closed_form"
        assert apart("gradcam", "hirescam") == 0
        assert apart("shapleycam", "shapleycam-h") == 0
        # its weight is g·ΣA / (ΣA + 1e-7): equal but for the guard
        assert apart("gradcam", "xgradcam") < 1e-4
    else:
        assert found["gradcam"].diagnostics.engine == "reverse_over_reverse"
        assert apart("gradcam", "hirescam") > 0.01 and apart("gradcam", "xgradcam") > 0.01
        assert apart("shapleycam", "shapleycam-h") > 0.01


def test_there_are_the_paper_s_rows():
    assert len(PRESETS) == 12 and Preprocess((224, 224), 256, "bilinear") == PREPROCESS
    # as printed in the paper
    assert paper_row("ResNet-18", "gradcam") == {
        "AD": 18.73,
        "Coh": 97.51,
        "Com": 38.84,
        "ADCC": 77.10,
        "IC": 33.77,
        "ADD": 51.89,
    }
    assert paper_row("ResNet-18", "hirescam") == paper_row("ResNet-18", "gradcam")
    assert paper_row("VGG-16", "hirescam") is None and paper_row("VGG-16", "gradcam") is not None
    assert paper_accuracy("Swin-L") == 85.83
    rows = [paper_row(n, m) for n in PRESETS for m in ("shapleycam", "gradcam", "shapleycam-e", "gradcam++", "randomcam")]
    assert all(row is not None and list(row) == list(COLUMNS) for row in rows)


def test_the_paper_s_adcc_follows_from_its_other_columns():
    for network in PRESETS:
        for method in ("shapleycam", "gradcam", "gradcam++", "randomcam"):
            row = {name: torch.tensor(value / 100).double() for name, value in paper_row(network, method).items()}
            # digits are printed to 0.01
            assert float(adcc(row["AD"], row["Coh"], row["Com"])) == pytest.approx(float(row["ADCC"]), abs=2e-4), network


def test_names_and_missing_weights(tmp_path):
    assert get_preset("swin-t") is PRESETS["Swin-T"] and get_preset("resnet50") is PRESETS["ResNet-50"]
    with pytest.raises(InputError, match="Did you mean ResNet-1"):
        get_preset("ResNet-180")
    with pytest.raises(InputError, match=r"resnet18-f37072fd\.pth or resnet18\.pth.*--download"):
        load_preset(PRESETS["ResNet-18"], tmp_path)


def test_weights_from_a_folder(tmp_path):
    preset = PRESETS["MobileNet-V2"]
    model = seeded(preset)
    torch.save(model.state_dict(), tmp_path / "mobilenet_v2.pth")
    found = load_preset(preset, tmp_path)
    assert found.preprocess == PREPROCESS and not found.model.training
    for key, value in found.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
