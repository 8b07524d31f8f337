"""Segmentation, detection and video networks of torchvision, end to end, against pytorch-grad-cam or an independent formula."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shapleycam import Explainer, InputError
from shapleycam.model.roi_align import roi_align
from shapleycam.utilities.tasks import BoxScore, SegmentationScore

torchvision = pytest.importorskip("torchvision")
IntermediateLayerGetter = pytest.importorskip("torchvision.models._utils").IntermediateLayerGetter
peer = pytest.importorskip("pytorch_grad_cam")
model_targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")


def alive(model: nn.Module) -> nn.Module:
    """Seeded statistics, so that the activations differ between places; float64, evaluation mode."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.double().eval()


def scenes(count: int = 2, size: int = 64) -> torch.Tensor:
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(5))
    return F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1).double()


# ------------------------------------------------------------------------------------------------------ segmentation

SEGMENTERS = {
    "deeplabv3_mobilenet_v3_large": "backbone.16",
    "lraspp_mobilenet_v3_large": "backbone.16",
}


class Bare(nn.Module):
    """pytorch-grad-cam wants a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)["out"]


@pytest.fixture(scope="module", params=SEGMENTERS)
def segmenter(request):
    torch.manual_seed(0)
    build = getattr(torchvision.models.segmentation, request.param)
    model = alive(build(weights=None, weights_backbone=None, num_classes=5))
    images = (scenes() - 0.5) * 4
    last = [module for module in model.modules() if isinstance(module, nn.Conv2d)][-1]
    with torch.no_grad():
        z = model(images)["out"]
        last.weight.mul_(3 / z.std())
    return model, SEGMENTERS[request.param], images


@pytest.mark.parametrize("method", ["gradcam", "hirescam"])
def test_segmentation_is_pytorch_grad_cams(segmenter, method):
    model, layer, images = segmenter
    mask = torch.zeros(2, 64, 64)
    mask[0, 10:40, 5:30] = 1
    mask[1, 30:, 30:] = 1
    classes = [1, 3]
    targets = [model_targets.SemanticSegmentationTarget(c, m.numpy()) for c, m in zip(classes, mask, strict=True)]
    name = {"gradcam": "GradCAM", "hirescam": "HiResCAM"}[method]
    with getattr(peer, name)(model=Bare(model), target_layers=[model.get_submodule(layer)]) as cam:
        expected = torch.from_numpy(cam(images, targets))
    found = Explainer(model, layer, method, SegmentationScore(mask=mask, score="logit"))(images, classes).heatmaps()
    assert found.std() > 0.05
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-5)


def test_segmentation_has_a_second_order(segmenter):
    model, layer, images = segmenter
    images, maps = images[:1, :, :32, :32], []
    for engine in ("reverse_over_reverse", "forward_over_reverse"):
        result = Explainer(model, layer, utility=SegmentationScore(), engine=engine)(images, with_norms=True)
        assert (result.hvp_ratio > 1e-4).all()
        maps.append(result.raw)
    torch.testing.assert_close(*maps, rtol=1e-8, atol=1e-10 * float(maps[0].abs().max()))


# --------------------------------------------------------------------------------------------------------- detection


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(4)
    detection = torchvision.models.detection
    few = {"rpn_pre_nms_top_n_test": 60, "rpn_post_nms_top_n_test": 30, "box_detections_per_img": 20}
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=64, **few
    )
    # Narrower than the 1024 of the original, whose weights are most of what a pass reads.
    model.roi_heads.box_head = detection.faster_rcnn.TwoMLPHead(256 * 7 * 7, 64)
    model.roi_heads.box_predictor = detection.faster_rcnn.FastRCNNPredictor(64, 4)
    model = alive(model)
    with torch.no_grad():
        # Scores that differ between boxes and classes, and boxes that move a little.
        for parameter in model.roi_heads.parameters():
            parameter.mul_(4)
        model.roi_heads.box_predictor.bbox_pred.weight.mul_(0.2)
    images = scenes()
    with torch.no_grad():
        found = model(images)
    assert all(len(f["scores"]) >= 4 and f["scores"].std() > 1e-3 for f in found)
    return model, "backbone.body.16", images, found


def boxes_of(found, count=3):
    return [f["boxes"][:count] + 0.5 for f in found], [f["labels"][:count] for f in found]


@pytest.mark.filterwarnings("ignore:.*the map is all zeros:shapleycam.ShapleyCamWarning")
def test_the_lines_of_the_readme_run(detector):
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    [block] = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "SegmentationScore" in b]
    torch.manual_seed(0)
    backbone = torchvision.models.resnet18(weights=None)  # which has the names of the ResNet-50 of the page
    backbone = IntermediateLayerGetter(backbone, {"layer4": "out"})
    fcn = alive(torchvision.models.segmentation.FCN(backbone, torchvision.models.segmentation.fcn.FCNHead(512, 21)))
    with torch.no_grad():
        fcn.classifier[-1].bias[12] += 100  # the class explained is one that pixels are predicted to have
    encoder = alive(torchvision.models.resnet18(num_classes=7))
    rcnn, layer, images, _ = detector
    assert layer in block
    names = {"Explainer": Explainer, "fcn": fcn, "rcnn": rcnn, "encoder": encoder, "images": images}
    names["concept"] = torch.randn(7, generator=torch.Generator().manual_seed(1))
    exec(compile(block, "README.md", "exec"), names)


@pytest.mark.parametrize("method", ["gradcam"])
def test_detection_is_pytorch_grad_cams(detector, method):
    model, layer, images, found = detector
    boxes, labels = boxes_of(found)
    targets = [
        model_targets.FasterRCNNBoxScoreTarget(label.tolist(), box.numpy()) for box, label in zip(boxes, labels, strict=True)
    ]
    name = {"gradcam": "GradCAM", "hirescam": "HiResCAM"}[method]
    with getattr(peer, name)(model=model, target_layers=[model.get_submodule(layer)]) as cam:
        expected = torch.from_numpy(cam(images, targets))
    utility = BoxScore(boxes, labels, any_label=True)
    with torch.no_grad():
        values = torch.stack([target(f)[0] for target, f in zip(targets, found, strict=True)])
    assert (values > 1).all()
    torch.testing.assert_close(utility(found, None), values)
    result = Explainer(model, layer, method, utility)(images)
    assert result.targets is None and (result.heatmaps().flatten(1).std(1) > 0.05).all()
    torch.testing.assert_close(result.heatmaps().float(), expected, rtol=0, atol=1e-5)


def test_detection_has_a_second_order(detector, monkeypatch):
    """Against torchvision's own RoIAlign in plain PyTorch, which autograd differentiates as often as one likes."""
    model, layer, images, found = detector
    utility = BoxScore(*boxes_of(found))
    result = Explainer(model, layer, utility=utility)(images, with_norms=True)
    assert result.diagnostics.engine == "reverse_over_reverse" and (result.hvp_ratio > 1e-3).all()
    assert not torch.allclose(result.raw, Explainer(model, layer, "gradcam", utility)(images).raw, rtol=1e-2)
    module = sys.modules["torchvision.ops.roi_align"]
    plain = module._roi_align.__wrapped__  # not compiled, or there would be no second derivative
    calls = []

    def by_hand(features, rois, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False):
        calls.append(1)
        return plain(features, rois, spatial_scale, *output_size, sampling_ratio, aligned)

    monkeypatch.setattr(sys.modules["torchvision.ops.poolers"], "roi_align", by_hand)
    expected = Explainer(model, layer, utility=utility)(images)
    assert calls
    torch.testing.assert_close(result.raw, expected.raw, rtol=1e-6, atol=1e-9 * float(expected.raw.abs().max()))


@pytest.mark.parametrize("layer", [pytest.param("backbone.body.1.block.1", marks=pytest.mark.long), "backbone.body.2"])
def test_detection_without_derivatives(detector, layer):
    """The first layer has a skip connection around it, the second is all that the head sees of the image."""
    model, _, images, found = detector
    boxes, labels = boxes_of(found)
    utility = BoxScore(boxes[:1], labels[:1])
    kept, ablated = [], 0
    with torch.no_grad():
        handle = model.get_submodule(layer).register_forward_hook(lambda *a: kept.append(a[2].clone()))
        base = utility(model(images[:1]), None)
        handle.remove()
        for c in range(kept[0].shape[1]):

            def block(module, args, output, c=c):
                return torch.cat((output[:, :c], output[:, c : c + 1] * 0, output[:, c + 1 :]), 1)

            handle = model.get_submodule(layer).register_forward_hook(block)
            alpha = (base - utility(model(images[:1]), None)) / base
            handle.remove()
            ablated = ablated + alpha * kept[0][0, c]
    alone = Explainer(model, layer, "ablationcam", utility, chunk=16)(images[:1])
    torch.testing.assert_close(alone.raw[0], ablated, rtol=1e-8, atol=1e-10)
    both = Explainer(model, layer, "ablationcam", BoxScore(boxes, labels), chunk=16)(images)
    torch.testing.assert_close(both.raw[0], ablated, rtol=1e-8, atol=1e-10)


def test_a_one_stage_detector():
    torch.manual_seed(0)
    detection = torchvision.models.detection
    coarser = torchvision.ops.feature_pyramid_network.LastLevelP6P7(64, 64)
    stages = {"layer2": "0", "layer3": "1", "layer4": "2"}
    resnet = torchvision.models.resnet18(weights=None)
    backbone = detection.backbone_utils.BackboneWithFPN(resnet, stages, [128, 256, 512], 64, extra_blocks=coarser)
    model = alive(detection.RetinaNet(backbone, num_classes=4, min_size=64, max_size=64))
    with torch.no_grad():
        model.head.classification_head.cls_logits.weight.mul_(5000)  # its convolutions begin with small weights
    images = scenes()
    found = model(images)
    assert all(len(f["scores"]) >= 2 for f in found)
    utility = BoxScore(*boxes_of([{k: v.detach() for k, v in f.items()} for f in found], 2))
    maps = [
        Explainer(model, "backbone.body.layer4", "shapleycam-h", utility, engine=engine)(images, with_norms=True)
        for engine in ("reverse_over_reverse", "forward_over_reverse")
    ]
    assert (maps[0].hvp_ratio > 1e-3).all()
    torch.testing.assert_close(maps[0].raw, maps[1].raw, rtol=1e-7, atol=1e-9)


def test_a_detector_takes_batches_of_one_size(detector):
    model, layer, images, found = detector
    with pytest.raises(InputError, match="images must be a torch.Tensor"):
        Explainer(model, layer, utility=BoxScore(*boxes_of(found)))(list(images))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling", [2, -1])
def test_roi_align_and_its_derivatives(aligned, sampling):
    features = torch.randn(2, 3, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 0.5, 1.0, 9.0, 8.0], [1, 3.0, 2.0, 11.0, 12.5], [1, 1.0, 1.0, 1.5, 1.25]], dtype=torch.float64)
    ours = lambda x: roi_align(x, rois, 0.5, 2, 3, sampling, aligned)
    theirs = torchvision.ops.roi_align(features, rois, (2, 3), 0.5, sampling, aligned)
    torch.testing.assert_close(ours(features), theirs)
    upstream = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (g1,) = torch.autograd.grad(ours(features), features, upstream)
    (g2,) = torch.autograd.grad(theirs, features, upstream)
    torch.testing.assert_close(g1, g2)
    assert torch.autograd.gradcheck(ours, (features,))
    assert torch.autograd.gradgradcheck(lambda x: ours(x).tanh(), (features,))


# ------------------------------------------------------------------------------------------------------ three dimensions


@pytest.fixture(scope="module")
def video():
    torch.manual_seed(0)
    # As r3d_18, with one block in the place of two.
    resnet = torchvision.models.video.resnet
    model = alive(resnet.VideoResNet(resnet.BasicBlock, [resnet.Conv3DSimple] * 4, [1] * 4, resnet.BasicStem, num_classes=10))
    clips = torch.randn(2, 3, 8, 24, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.no_grad():
        model.fc.weight.mul_(3 / model(clips).std())
    return model, clips


def test_video_end_to_end(video):
    model, clips = video
    result = Explainer(model, "layer3")(clips, with_norms=True)
    assert result.raw.shape == (2, 2, 3, 4) and result.diagnostics.layouts[0].kind == "NCDHW"
    assert (result.hvp_ratio > 1e-3).all()
    heat = result.heatmaps()
    raw = result.raw.clamp_min(0)
    low = raw - raw.amin((1, 2, 3), keepdim=True)
    resized = F.interpolate((low / (low.amax((1, 2, 3), keepdim=True) + 1e-7))[:, None], clips.shape[2:], mode="trilinear")[
        :, 0
    ]
    resized = resized - resized.amin((1, 2, 3), keepdim=True)
    expected = resized / (resized.amax((1, 2, 3), keepdim=True) + 1e-7)
    torch.testing.assert_close(heat, expected)
    assert heat.shape == (2, 8, 24, 32)
    assert result.heatmaps((2, 3, 4)).shape == (2, 2, 3, 4)


def test_video_auto_layer_and_closed_form(video):
    model, clips = video
    clips = F.interpolate(clips[:1], (8, 32, 48))
    result = Explainer(model)(clips)
    assert result.diagnostics.layers == ("layer4",) and result.diagnostics.engine == "closed_form"
    other = Explainer(model, "layer4", engine="reverse_over_reverse")(clips)
    torch.testing.assert_close(result.raw, other.raw, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["GradCAM", *(pytest.param(n, marks=pytest.mark.long) for n in ("GradCAMPlusPlus", "EigenGradCAM"))]
)
def test_video_maps_are_pytorch_grad_cams(video, name):
    """Before the resize, which pytorch-grad-cam does with a cubic spline in three dimensions."""
    model, clips = video
    kept = {}
    base = getattr(peer, name)

    class Spy(base):
        def get_cam_image(self, *arguments):
            kept["map"] = super().get_cam_image(*arguments)
            return kept["map"]

    classes = [1, 7]
    targets = [model_targets.ClassifierOutputReST(c) for c in classes]
    method = {"GradCAMPlusPlus": "gradcam++"}.get(name, name.lower())
    with Spy(model=model, target_layers=[model.layer3]) as cam:
        cam(clips, targets)
    found = Explainer(model, "layer3", method)(clips, classes).raw
    expected = torch.from_numpy(kept["map"]).double()
    if name == "EigenGradCAM":
        expected = expected * (found * expected).flatten(1).sum(1).sign()[:, None, None, None]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_video_without_derivatives(video):
    model, clips = video
    layer, clips, utility = "stem", F.interpolate(clips[:1], (2, 8, 8)), lambda z, c: z.gather(1, c[:, None])[:, 0]
    with torch.no_grad():
        kept = []
        handle = model.stem.register_forward_hook(lambda *a: kept.append(a[2].clone()))
        base = model(clips)[0, 3]
        handle.remove()
        a = kept[0][:1]
        ablated, masked = 0, []
        for c in range(a.shape[1]):
            altered = a.clone()
            altered[:, c] = 0
            z = model.fc(model.avgpool(model.layer4(model.layer3(model.layer2(model.layer1(altered))))).flatten(1))[0, 3]
            ablated = ablated + (base - z) / base * a[0, c]
            mask = F.interpolate(a[:, c : c + 1], clips.shape[2:], mode="trilinear", align_corners=True)
            mask = (mask - mask.min()) / (mask.max() - mask.min() + 1e-8)
            masked.append(model(clips[:1] * mask)[0, 3])
        scored = (torch.stack(masked).softmax(0)[:, None, None, None] * a[0]).sum(0)
    for method, expected in (("ablationcam", ablated), ("scorecam", scored)):
        found = Explainer(model, layer, method, utility)(clips[:1], 3)
        torch.testing.assert_close(found.raw[0], expected, rtol=1e-7, atol=1e-10)
        assert found.heatmaps().shape == (1, 2, 8, 8)
