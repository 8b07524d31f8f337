"""Our maps against pytorch-grad-cam's, from PyPI, on live networks under the ReST utility.

In float64 on both sides: with seeded weights many maps vary by a percent of their mean, and the min-max of the display form
magnifies the float32 rounding of either side a hundredfold. (Against the float64 map, ours in float32 is the closer one.)
"""

import pytest
import torch
import torch.nn.functional as F

from shapleycam import Explainer

from ..helpers import build

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
NETWORKS = {"tv:resnet50": "layer4.2", "tv:vgg16": "features.30", "tv:mobilenet_v2": "features.18"}


def liveliest(model, layer, method, images):
    """The class whose map varies most: where a map is almost constant, the min-max of the display form magnifies both
    sides' float32 rounding, and a comparison says nothing about the method."""
    classes = torch.arange(0, 1000, 83 if layer == "features.30" else 5)  # in closed form they cost nothing
    raw = Explainer(model, layer, method)(images, classes[None]).raw[0].clamp_min(0)
    spread = (raw.amax((1, 2)) - raw.amin((1, 2))) / raw.amax((1, 2)).clamp_min(1e-12)
    strong = raw.amax((1, 2)) > raw.amax((1, 2)).median()
    return int(classes[(spread * strong).argmax()])


#: Every method on every network; the classifier of VGG-16 is slow in float64.
CASES = [
    pytest.param(name, method, marks=[pytest.mark.long] * ("vgg" in name and method not in ("shapleycam", "layercam")))
    for name in NETWORKS
    for method in PEERS
]


@pytest.fixture(scope="module")
def network(request):
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randn(1, 3, 6, 6, generator=generator) * 2
    return (
        build(request.param).double(),
        NETWORKS[request.param],
        F.interpolate(coarse, (128, 128), mode="bicubic").double(),
    )


@pytest.mark.parametrize(("network", "method"), CASES, indirect=["network"])
def test_the_map_is_pytorch_grad_cams(network, method):
    model, layer, images = network
    assert hasattr(peer, PEERS[method]), f"pytorch-grad-cam has no {PEERS[method]} any more: the table above is out of date"
    target = liveliest(model, layer, "shapleycam-e" if method in ("layercam", "gradcam-e") else method, images)
    with getattr(peer, PEERS[method])(model=model, target_layers=[model.get_submodule(layer)]) as cam:
        theirs = torch.from_numpy(cam(images, [targets.ClassifierOutputReST(target)]))
    assert theirs.dtype == torch.float32
    for engine in ("auto", "reverse_over_reverse") if layer != "features.30" else ("auto",):  # VGG-16: slow in float64
        ours = Explainer(model, layer, method, engine=engine)(images, target).heatmaps().float()
        assert ours.std() > 0.05, "a dead map proves nothing"
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
