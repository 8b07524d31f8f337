"""Our maps against pytorch-grad-cam's, from PyPI, on live networks under the ReST utility.

In float64 on both sides: with seeded weights many maps vary by a percent of their mean, and the min-max of the display form
magnifies the float32 rounding of either side a hundredfold. (Against the float64 map, ours in float32 is the closer one.)
"""

import pytest
import torch
import torch.nn.functional as F

from shapleycam import Explainer

from ..helpers import build, narrow_vgg11

peer = pytest.importorskip("pytorch_grad_cam")
targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")

PEERS = {
    "shapleycam": "ShapleyCAM",
    "gradcam": "GradCAM",
    "hirescam": "HiResCAM",
    "gradcam-e": "GradCAMElementWise",
    "xgradcam": "XGradCAM",
    "layercam": "LayerCAM",
    "gradcam++": "GradCAMPlusPlus",
}
NETWORKS = {"tv:resnet18": "layer4.1", "tv:vgg11": "features.20", "tv:mobilenet_v2": "features.18"}
SIZE = 96


def liveliest(raw):
    """Which class's map [M, h, w] varies most: where a map is almost constant, the min-max of the display form magnifies both
    sides' float32 rounding, and a comparison says nothing about the method."""
    raw = raw.clamp_min(0)
    spread = (raw.amax((1, 2)) - raw.amin((1, 2))) / raw.amax((1, 2)).clamp_min(1e-12)
    strong = raw.amax((1, 2)) > raw.amax((1, 2)).median()
    return int((spread * strong).argmax())


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """(model, layer, images, the class to explain by method)"""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randn(1, 3, 6, 6, generator=generator) * 2
    images = F.interpolate(coarse, (SIZE, SIZE), mode="bicubic").double()
    model = (narrow_vgg11(SIZE) if request.param == "tv:vgg11" else build(request.param, SIZE)).double()
    layer = NETWORKS[request.param]
    classes = torch.arange(0, 1000, 31 if "vgg" in request.param else 5)  # in closed form they cost nothing
    raws = Explainer(model, layer).compare(images, classes[None], [m for m in PEERS if m != "layercam"] + ["shapleycam-e"])
    chosen = {method: int(classes[liveliest(explanation.raw[0])]) for method, explanation in raws.items()}
    return model, layer, images, {**chosen, "layercam": chosen["shapleycam-e"], "gradcam-e": chosen["shapleycam-e"]}


@pytest.mark.parametrize("method", PEERS)
def test_the_map_is_pytorch_grad_cams(network, method):
    model, layer, images, classes = network
    assert hasattr(peer, PEERS[method]), f"pytorch-grad-cam has no {PEERS[method]} any more: the table above is out of date"
    target = classes[method]
    with getattr(peer, PEERS[method])(model=model, target_layers=[model.get_submodule(layer)]) as cam:
        theirs = torch.from_numpy(cam(images, [targets.ClassifierOutputReST(target)]))
    assert theirs.dtype == torch.float32
    for engine in ("auto",) if layer == "features.20" else ("auto", "reverse_over_reverse"):  # of VGG they are one
        ours = Explainer(model, layer, method, engine=engine)(images, target).heatmaps().float()
        assert ours.std() > 0.05, "a dead map proves nothing"
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
