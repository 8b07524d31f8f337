"""ViT and Swin: with and without reshape transforms, and where pytorch-grad-cam fails."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from shapleycam import LayerError, Layout, compat
from shapleycam.model.layouts import ReshapeTransform, Transformed

timm = pytest.importorskip("timm")
peer = pytest.importorskip("pytorch_grad_cam")
peer_transforms = pytest.importorskip("pytorch_grad_cam.utils.reshape_transforms")

CLOSE = {"rtol": 0, "atol": 2e-6}


def alive(model):
    """Logits with a deviation of a few, so that there is curvature."""
    model = model.double().eval()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    return model


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return alive(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, embed_dim=48, num_heads=3, num_classes=7))


@pytest.fixture(scope="module")
def swin():
    torch.manual_seed(0)
    options = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 7}
    return alive(timm.create_model("swin_tiny_patch4_window7_224", **options))


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tokens(tensor):
    return compat.vit_reshape_transform(tensor, 4, 4)


TARGETS = [compat.ClassifierOutputReST(2), compat.ClassifierOutputReST(5)]


def shapleycam(model, layer, images, classes, view):
    """ShapleyCAM's display map by differentiating twice, without the package; ``view`` makes the output [N, C, h, w]."""
    kept = []
    handle = layer.register_forward_hook(lambda module, args, output: kept.append(output))
    with sdpa_kernel(SDPBackend.MATH):
        z = model(images)
        rows = range(len(classes))
        value = (z[rows, classes] + z.log_softmax(1)[rows, classes]).sum()
        [gradient] = torch.autograd.grad(value, kept, create_graph=True)
        [hvp] = torch.autograd.grad(gradient, kept, kept[0].detach())
    handle.remove()
    a, w = view(kept[0]).detach(), view(gradient - hvp / 2).detach()
    maps = unit((w.mean((2, 3), keepdim=True) * a).sum(1).clamp_min(0))
    large = unit(F.interpolate(maps[:, None], images.shape[2:], mode="bilinear")[:, 0])
    return large.numpy(), float((hvp.norm() / gradient.norm()).detach())


def unit(maps):
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (1e-7 + maps.amax((1, 2), keepdim=True))


@pytest.mark.parametrize("name", ["GradCAM", "HiResCAM", "LayerCAM", "XGradCAM"])
def test_vit(vit, images, name):
    layer = vit.blocks[-1].norm1
    theirs_transform = lambda t: peer_transforms.vit_reshape_transform(t, 4, 4)
    theirs = getattr(peer, name)(vit, [layer], theirs_transform)(images, TARGETS)
    assert theirs.std() > 0.05
    for transform in (None, tokens, theirs_transform):
        ours = getattr(compat, name)(vit, [layer], transform)(images, TARGETS)
        np.testing.assert_allclose(ours, theirs, **CLOSE)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its __del__ fails too
def test_shapleycam_of_a_vit(vit, images):
    """pytorch-grad-cam's fails twice: fused attention has no second derivative, and the activations are never reshaped."""
    layer = vit.blocks[-1].norm1
    with pytest.raises(RuntimeError, match="scaled_dot_product"):
        peer.ShapleyCAM(vit, [layer], tokens)(images, TARGETS)
    with sdpa_kernel(SDPBackend.MATH), pytest.raises(ValueError, match="activation shape"):
        peer.ShapleyCAM(vit, [layer], tokens)(images, TARGETS)
    expected, curvature = shapleycam(vit, layer, images, [2, 5], tokens)
    assert expected.std() > 0.05 and curvature > 0.01
    for transform in (None, tokens):
        np.testing.assert_allclose(compat.ShapleyCAM(vit, [layer], transform)(images, TARGETS), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["GradCAM", "XGradCAM", "ShapleyCAM"])
def test_swin(swin, images, name):
    layer = swin.layers[-1].blocks[-1].norm1
    first = lambda t: t.movedim(-1, 1)
    if name == "ShapleyCAM":
        with sdpa_kernel(SDPBackend.MATH), pytest.raises(ValueError, match="broadcast"):
            peer.ShapleyCAM(swin, [layer], first)(images, TARGETS)
        expected, curvature = shapleycam(swin, layer, images, [2, 5], first)
        assert curvature > 0.01
    else:
        expected = getattr(peer, name)(swin, [layer], first)(images, TARGETS)
    assert expected.std() > 0.05
    for transform in (None, first, lambda t: compat.swinT_reshape_transform(t, 8, 8)):
        np.testing.assert_allclose(getattr(compat, name)(swin, [layer], transform)(images, TARGETS), expected, **CLOSE)
    # Its own transform is for a Swin that timm no longer has.
    with pytest.raises(RuntimeError, match="shape"):
        getattr(peer, name)(swin, [layer], peer_transforms.swinT_reshape_transform)(images, TARGETS)
    with pytest.raises(LayerError, match="reshape transform fails"):
        getattr(compat, name)(swin, [layer], peer_transforms.swinT_reshape_transform)(images, TARGETS)


def test_two_layers_of_a_swin(swin, images):
    layers = [swin.layers[0], swin.layers[1].blocks[-1]]
    maps = compat.ShapleyCAM(swin, layers)(images, TARGETS)
    assert maps.shape == (2, 64, 64) and maps.std() > 0.05


def test_the_reshape_transforms_are_theirs():
    plain = torch.randn(2, 17, 5)
    torch.testing.assert_close(compat.vit_reshape_transform(plain, 4, 4), peer_transforms.vit_reshape_transform(plain, 4, 4))
    plain = torch.randn(2, 12, 5)
    torch.testing.assert_close(
        compat.swinT_reshape_transform(plain, 3, 4), peer_transforms.swinT_reshape_transform(plain, 3, 4)
    )
    levels = {"0": torch.randn(1, 2, 8, 8), "pool": torch.randn(1, 2, 3, 3)}
    ours, theirs = (library.fasterrcnn_reshape_transform(levels) for library in (compat, peer_transforms))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("shape", "function", "layout"),
    [
        ((2, 17, 5), tokens, Layout("NTC", (4, 4), 1)),
        ((2, 12, 5), lambda t: compat.swinT_reshape_transform(t, 3, 4), Layout("NTC", (3, 4), 0)),
        ((2, 3, 4, 5), compat.swinT_reshape_transform, Layout("NHWC", (3, 4))),
        ((2, 5, 3, 4), lambda t: t, Layout("NCHW", (3, 4))),
        ((2, 4, 4, 4), lambda t: t.permute(0, 3, 1, 2), Layout("NHWC", (4, 4))),
        ((2, 5, 12), lambda t: t.unflatten(2, (3, 4)), Layout("NCL", (3, 4))),
    ],
)
def test_a_rearrangement_becomes_a_layout(shape, function, layout):
    found = ReshapeTransform(function).layout(shape, "layer")
    assert found == layout and type(found) is Layout
    given = torch.randn(shape)
    torch.testing.assert_close(found.view(given), function(given).flatten(2), rtol=0, atol=0)


@pytest.mark.parametrize(
    "function", [lambda t: t.abs(), lambda t: t.flip(2), lambda t: t[:, :, 1:], lambda t: t[:, [1, 0, 2, 3, 4]]]
)
def test_any_other_is_applied(function):
    found = ReshapeTransform(function).layout((2, 5, 3, 4), "layer")
    assert type(found) is Transformed
    given = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(found.view(given), function(given).flatten(2), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["GradCAM", "LayerCAM", "HiResCAM"])
def test_a_transform_that_computes(model, name):
    """Absolute values of the activations, and of the gradients, as pytorch-grad-cam has it."""
    images = torch.randn(2, 3, 20, 28, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = [getattr(library, name)(model, [model.second], torch.abs)(images, TARGETS) for library in (peer, compat)]
    assert found[0].std() > 0.05
    np.testing.assert_allclose(found[1], found[0], **CLOSE)


def test_a_transform_must_return_maps():
    with pytest.raises(LayerError, match="must return"):
        ReshapeTransform(lambda t: t.flatten(1)).layout((2, 5, 3, 4), "layer")
    with pytest.raises(LayerError, match=r"fails on the output of layer 'x'"):
        ReshapeTransform(lambda t: t[:, 9]).layout((2, 5, 3, 4), "x")
