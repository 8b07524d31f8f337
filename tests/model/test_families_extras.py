"""layer="auto", the layout and all engines on the torchvision and timm families, with live seeded weights."""

import pytest
import torch

from shapleycam import Explainer, Layout

from ..helpers import build, narrow_vgg11, wake

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

#: Small, and no square: a transposed grid is seen.
SIZE = (96, 64)

# name -> layer that auto must find, layout, whether the head is pool-and-linear
FAMILIES = {
    "tv:resnet18": ("layer4", Layout("NCHW", (3, 2)), True),
    "tv:resnext50_32x4d": ("layer4", Layout("NCHW", (3, 2)), True),
    "tv:vgg11": ("features", Layout("NCHW", (3, 2)), False),
    "tv:densenet121": ("features", Layout("NCHW", (3, 2)), False),
    "tv:mobilenet_v2": ("features", Layout("NCHW", (3, 2)), True),
    "tv:efficientnet_b0": ("features", Layout("NCHW", (3, 2)), True),
    "tv:convnext_tiny": ("features", Layout("NCHW", (3, 2)), False),
    "tv:regnet_y_400mf": ("trunk_output", Layout("NCHW", (3, 2)), True),
    "tv:swin_t": ("norm", Layout("NHWC", (3, 2)), True),
    "tv:vit_b_32": ("encoder.layers.encoder_layer_11.ln_1", Layout("NTC", (3, 3), 1), False),
    "timm:resnet18": ("layer4", Layout("NCHW", (3, 2)), True),
    "timm:resnext50_32x4d": ("layer4", Layout("NCHW", (3, 2)), True),
    "timm:vgg11": ("features", Layout("NCHW", (3, 2)), False),
    "timm:densenet121": ("features", Layout("NCHW", (3, 2)), True),
    "timm:mobilenetv2_100": ("bn2", Layout("NCHW", (3, 2)), True),
    "timm:efficientnet_b0": ("bn2", Layout("NCHW", (3, 2)), True),
    "timm:convnext_atto": ("stages", Layout("NCHW", (3, 2)), False),
    "timm:regnety_002": ("s4", Layout("NCHW", (3, 2)), True),
    "timm:swin_tiny_patch4_window7_224": ("norm", Layout("NHWC", (3, 2)), True),
    "timm:vit_tiny_patch16_224": ("blocks.11.norm1", Layout("NTC", (6, 4), 1), False),
    "timm:deit_tiny_distilled_patch16_224": ("blocks.11.norm1", Layout("NTC", (6, 4), 2), False),
    "timm:vit_small_patch16_dinov3": ("norm", Layout("NTC", (6, 4), 5), True),
}


def images_for(name, count=2):
    size = (96, 96) if name == "tv:vit_b_32" else SIZE  # which takes squares alone
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(5))


def made(name):
    """The network of that name; what is wide in it, and no matter to the question, is narrow."""
    size = tuple(images_for(name, 1).shape[2:])
    if name == "tv:vgg11":
        return narrow_vgg11(size)
    if name == "tv:vit_b_32":
        torch.manual_seed(0)
        model = torchvision.models.VisionTransformer(size[0], 32, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=384)
        return wake(model, size)
    sized = {"img_size": size} if "patch" in name else {}
    return build(name, size, **sized)


def close(one, other, bound):
    assert (one - other).norm() <= bound * other.norm()


#: Whose logits are piecewise linear in the activations.
STRAIGHT = ("tv:vgg11", "timm:vgg11", "tv:densenet121")
#: Whose like is in the short form.
SECONDS = ("timm:vgg11", "timm:resnext50_32x4d", "timm:swin_tiny_patch4_window7_224")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * (n in SECONDS)) for n in FAMILIES])
def test_family(name):
    layer, layout, pooled = FAMILIES[name]
    model, images = made(name), images_for(name)
    result = Explainer(model)(images, with_norms=True)
    assert result.diagnostics.layers == (layer,)
    assert result.diagnostics.layouts == (layout,)
    assert result.diagnostics.engine == ("closed_form" if pooled else "reverse_over_reverse")
    assert (result.hvp_ratio > 1e-3).all(), "curvature, or the comparison below proves nothing"
    assert result.raw.shape == (2, *layout.grid) and (result.raw.flatten(1).std(1) > 0).all()
    engines = ["forward_over_reverse"] + ["reverse_over_reverse"] * pooled + ["gauss_newton"] * (name in STRAIGHT)
    for engine in engines:
        other = Explainer(model, layer, engine=engine)(images, with_norms=True)
        close(result.raw, other.raw, 1e-5)
        close(result.hvp_ratio, other.hvp_ratio, 1e-4)
    if pooled:
        # The weight is constant over the positions: the paper's identity between the mean and the elementwise method.
        close(Explainer(model, layer, "shapleycam-h")(images).raw, result.raw, 1e-5)


@pytest.mark.parametrize("size", [(256, 192), (160, 320)])
@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "tv:resnet18", "timm:convnext_atto"])
def test_any_grid(name, size):
    options = {"img_size": size} if "vit" in name else {}
    torch.manual_seed(0)
    library, _, model_name = name.partition(":")
    model = (
        torchvision.models.get_model(model_name, weights=None)
        if library == "tv"
        else timm.create_model(model_name, pretrained=False, **options)
    ).eval()
    result = Explainer(model)(torch.randn(1, 3, *size))
    stride = 16 if "vit" in name else 32
    assert result.raw.shape == (1, size[0] // stride, size[1] // stride)
    assert result.heatmaps().shape == (1, *size)


@pytest.mark.parametrize("name", ["tv:resnet18", "tv:swin_t", "timm:vit_tiny_patch16_224"])
def test_channels_last_and_half_precision(name):
    model, images = made(name), images_for(name)
    reference = Explainer(model)(images)
    last = Explainer(model.to(memory_format=torch.channels_last))(images.to(memory_format=torch.channels_last))
    close(last.raw, reference.raw, 1e-4)
    half = Explainer(model.to(torch.bfloat16), reference.diagnostics.layers[0])(images.to(torch.bfloat16), reference.targets)
    assert half.raw.dtype == torch.float32
    assert half.diagnostics.engine == reference.diagnostics.engine
    close(half.raw, reference.raw, 0.15)  # what bfloat16 activations leave of a map
