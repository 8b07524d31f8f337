"""layer="auto" on networks whose branches join in an unusual place; small inputs, seeded weights."""

import pytest
import torch

from shapleycam.model.layers import find_layer, survey
from shapleycam.utilities.named import get_utility
from shapleycam.utilities.tasks import SegmentationScore

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")


def auto(model, *size, utility="rest"):
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    seen = survey(model.eval(), images, gradients=True)
    return find_layer(model, seen, images.shape, get_utility(utility), "auto")[0], seen.notes


def test_the_block_that_joins_the_branches_of_an_inception_network():
    torch.manual_seed(0)
    model = torchvision.models.video.s3d(num_classes=7)
    model.avgpool = torch.nn.AvgPool3d(2, 1)  # instead of 2 × 7 × 7, for which clips must be large
    assert auto(model, 16, 64, 64) == ("features", [])


@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "lraspp_mobilenet_v3_large"])
def test_segmentation_ends_before_its_logits(name):
    torch.manual_seed(0)
    model = torchvision.models.segmentation.__dict__[name](weights=None, weights_backbone=None)
    layer, _ = auto(model, 96, 96, utility=SegmentationScore(mask=torch.ones(96, 96)))
    assert layer in ("classifier.3", "classifier.cbr")


def test_a_residual_branch_of_a_traced_network_is_doubted():
    torch.manual_seed(0)
    model = torch.fx.symbolic_trace(torchvision.models.resnet18(weights=None).eval())
    layer, [note] = auto(model, 64, 64)
    assert layer.startswith("layer4.1") and "only a part" in note


@pytest.mark.parametrize(("name", "size"), [("crossvit_tiny_240", 120), ("coat_tiny", 64)])
def test_one_of_several_branches_is_doubted(name, size):
    torch.manual_seed(0)
    [note] = auto(timm.create_model(name, pretrained=False, num_classes=7, img_size=size), size, size)[1]
    assert "only a part" in note
