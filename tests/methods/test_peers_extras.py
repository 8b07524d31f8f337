"""ScoreCAM, AblationCAM, EigenCAM, EigenGradCAM and smoothing against pytorch-grad-cam's, from PyPI, in float64.

pytorch-grad-cam keeps scores, weights and maps in float32 whatever the model's dtype; the bounds below are what that leaves.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shapleycam import Explainer
from shapleycam.methods.perturbation import ABLATION_FLOOR
from shapleycam.smoothing import smoothed

from ..helpers import wake

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
peer = pytest.importorskip("pytorch_grad_cam")
model_targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
svd = pytest.importorskip("pytorch_grad_cam.utils.svd_on_activations")

# network -> a layer behind ReLU; behind the first is a pool-and-linear head, behind the second convolutions
NETWORKS = {"timm:test_resnet": "layer4", "timm:test_byobnet": "stages.2"}
UTILITIES = {
    "logit": model_targets.ClassifierOutputTarget,
    "probability": model_targets.ClassifierOutputSoftmaxTarget,
    "rest": model_targets.ClassifierOutputReST,
}


def build(name):
    torch.manual_seed(0)
    library, _, model = name.partition(":")
    made = torchvision.models.get_model(model, weights=None) if library == "tv" else timm.create_model(model, pretrained=False)
    coarse = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(5)) * 2
    return wake(made, 64).double(), F.interpolate(coarse, (64, 64), mode="bicubic").double()


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    model, images = build(request.param)
    return model, NETWORKS[request.param], images


def liveliest(model, layer, method, utility, images):
    """Per image, the class of forty whose map varies most: some seeded maps are negative everywhere."""
    classes = torch.arange(0, 1000, 25).expand(images.shape[0], -1)
    raw = Explainer(model, layer, method, utility)(images, classes).raw.clamp_min(0).flatten(2)
    return classes[0][(raw.std(2) / raw.mean(2).clamp_min(1e-12) * (raw.amax(2) > 0.1 * raw.amax())).argmax(1)].tolist()


def theirs(name, model, layer, images, targets, **options):
    with getattr(peer, name)(model=model, target_layers=[model.get_submodule(layer)]) as cam:
        found = torch.from_numpy(cam(images, targets, **options))
    assert found.dtype == torch.float32 and found.flatten(1).std(1).min() > 0.05, "a dead map proves nothing"
    return found


@pytest.mark.parametrize("method", ["scorecam", "ablationcam"])
@pytest.mark.parametrize("utility", ["logit", "rest"])
def test_the_map_is_pytorch_grad_cams(network, method, utility):
    model, layer, images = network
    classes = liveliest(model, layer, method, utility, images) if method == "ablationcam" else [281, 7]
    targets = [UTILITIES[utility](c) for c in classes]
    expected = theirs({"scorecam": "ScoreCAM", "ablationcam": "AblationCAM"}[method], model, layer, images, targets)
    found = Explainer(model, layer, method, utility)(images, classes).heatmaps().float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_ablationcam_on_a_regnet_is_pytorch_grad_cams():
    model, images = build("tv:regnet_x_400mf")
    layer = "trunk_output.block3"
    classes = liveliest(model, layer, "ablationcam", "rest", images[:1])
    expected = theirs("AblationCAM", model, layer, images[:1], [UTILITIES["rest"](c) for c in classes])
    found = Explainer(model, layer, "ablationcam")(images[:1], classes).heatmaps().float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_floor_of_ablationcam_is_pytorch_grad_cams():
    model, images = build("timm:test_efficientnet")
    layer = "blocks.2"  # ends in a batch norm: of both signs
    classes = liveliest(model, layer, ABLATION_FLOOR, "logit", images)
    expected = theirs("AblationCAM", model, layer, images, [UTILITIES["logit"](c) for c in classes])
    found = Explainer(model, layer, ABLATION_FLOOR, "logit")(images, classes).heatmaps().float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_eigencam_is_pytorch_grad_cams_but_for_the_sign(network):
    model, layer, images = network
    found = Explainer(model, layer, "eigencam")(images)
    with torch.no_grad():
        kept = []
        handle = model.get_submodule(layer).register_forward_hook(lambda *a: kept.append(a[2].clone()))
        model(images)
        handle.remove()
    signed = torch.from_numpy(svd.get_2d_projection_with_sign_correction(kept[0].numpy()))
    torch.testing.assert_close(found.raw.float(), signed, rtol=1e-5, atol=1e-5 * float(signed.abs().max()))
    # Their EigenCAM takes the sign that LAPACK happens to return.
    with peer.EigenCAM(model=model, target_layers=[model.get_submodule(layer)]) as cam:
        expected = torch.from_numpy(cam(images, [UTILITIES["logit"](0)] * 2))
    unsigned = torch.from_numpy(svd.get_2d_projection(kept[0].numpy()))
    agree = (signed * unsigned).flatten(1).sum(1) > 0
    for i in range(2):
        if agree[i]:
            torch.testing.assert_close(found.heatmaps()[i].float(), expected[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("utility", ["logit", "rest"])
def test_eigengradcam_is_pytorch_grad_cams_but_for_the_sign(network, utility):
    model, layer, images = network
    classes = [281, 7]
    found = Explainer(model, layer, "eigengradcam", utility)(images, classes).raw
    kept = {}

    class Spy(peer.EigenGradCAM):
        def get_cam_image(self, *arguments):
            kept["map"] = torch.from_numpy(super().get_cam_image(*arguments))
            return kept["map"].numpy()

    with Spy(model=model, target_layers=[model.get_submodule(layer)]) as cam:
        cam(images, [UTILITIES[utility](c) for c in classes])
    expected = kept["map"].float()
    sign = (found * expected).flatten(1).sum(1).sign()[:, None, None]
    torch.testing.assert_close(found.float(), expected * sign.float(), rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("method", ["gradcam", "shapleycam"])
def test_smoothing_is_pytorch_grad_cams(network, method):
    model, layer, images = network
    pytest.importorskip("ttach")
    classes = liveliest(model, layer, method, "rest", images)
    name = {"gradcam": "GradCAM", "shapleycam": "ShapleyCAM"}[method]
    targets = [UTILITIES["rest"](c) for c in classes]
    expected = theirs(name, model, layer, images, targets, aug_smooth=True)
    found = smoothed(Explainer(model, layer, method), images, torch.tensor(classes)).heatmaps().float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(found, theirs(name, model, layer, images, targets), atol=0.01)
