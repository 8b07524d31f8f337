"""layer="auto", layouts and outputs of Hugging Face's transformers: small networks from configurations, with seeded weights."""

import pytest
import torch

from shapleycam import Explainer, Layout
from shapleycam.utilities.tasks import SegmentationScore

transformers = pytest.importorskip("transformers")

VIT = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "patch_size": 16}
STAGES = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "image_size": 224}

# architecture -> (configuration, image size, layer that auto must find, layout, whether the head is pool-and-linear)
ARCHITECTURES = {
    "ViT": (VIT | {"image_size": (96, 128)}, (96, 128), "vit.layers.2.layernorm_before", Layout("NTC", (6, 8), 1), False),
    "DeiT": (VIT | {"image_size": (96, 128)}, (96, 128), "deit.layers.2.layernorm_before", Layout("NTC", (6, 8), 2), False),
    "Dinov2WithRegisters": (
        VIT | {"image_size": 96},
        (96, 96),
        "dinov2_with_registers.layernorm",
        Layout("NTC", (6, 6), 5),
        False,
    ),
    "Swin": (SWIN, (224, 224), "swin.layernorm", Layout("NTC", (7, 7)), True),
    "ConvNext": (STAGES, (96, 128), "convnext.encoder.stages.3", Layout("NCHW", (3, 4)), False),
    "ResNet": (
        STAGES | {"embedding_size": 16, "layer_type": "basic"},
        (96, 128),
        "resnet.encoder.stages.3",
        Layout("NCHW", (3, 4)),
        True,
    ),
}


def seeded(name, task, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(num_labels=7, **options)
    return getattr(transformers, f"{name}For{task}")(config).eval()


def noise(*size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name):
    options, size, layer, layout, pooled = ARCHITECTURES[name]
    model, images = seeded(name, "ImageClassification", **options), noise(*size)
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(3 / model(images).logits.std())  # initialised for a softmax that is flat
    result = Explainer(model)(images, with_norms=True)
    assert result.diagnostics.layers == (layer,)
    assert result.diagnostics.layouts == (layout,)
    assert result.diagnostics.engine == ("closed_form" if pooled else "reverse_over_reverse")
    torch.testing.assert_close(result.logits, model(images).logits)
    assert (result.hvp_ratio > 1e-3).all(), "curvature, or the comparison below proves nothing"
    assert result.raw.shape == (2, *layout.grid) and (result.raw.flatten(1).std(1) > 0).all()
    other = Explainer(model, layer, engine="forward_over_reverse")(images, with_norms=True)
    assert (result.raw - other.raw).norm() <= 1e-5 * other.raw.norm()
    assert (result.hvp_ratio - other.hvp_ratio).norm() <= 1e-4 * other.hvp_ratio.norm()


def test_segmentation_logits():
    model, images = seeded("Segformer", "SemanticSegmentation"), noise(64, 96)
    found = model(images).logits.argmax(1).flatten(1).mode(1)[0]  # a class that each image has
    result = Explainer(model, "decode_head.linear_fuse", utility=SegmentationScore())(images, targets=found)
    assert result.raw.shape == (2, 16, 24) and (result.raw.flatten(1).std(1) > 0).all()
    assert result.heatmaps().shape == (2, 64, 96)


def test_clips_with_time_first():
    clip = {"image_size": 64, "num_frames": 8, "tubelet_size": 2}
    model = seeded("VideoMAE", "VideoClassification", **VIT, **clip)
    result = Explainer(model)(torch.randn(2, 8, 3, 64, 64, generator=torch.Generator().manual_seed(5)))
    assert result.diagnostics.layouts == (Layout("NTC", (4, 4, 4), time_axis=1),)
    assert result.heatmaps().shape == (2, 8, 64, 64)


def found(outputs, targets):
    return outputs.logits.softmax(-1)[:, :, :-1].amax((1, 2))


def test_detection_tokens_behind_the_patches():
    model = seeded("Yolos", "ObjectDetection", **VIT, image_size=[64, 96], num_detection_tokens=10)
    result = Explainer(model, utility=found)(noise(64, 96))
    assert result.diagnostics.layouts == (Layout("NTC", (4, 6), 1, 10),) and (result.raw.flatten(1).std(1) > 0).all()


def test_a_position_embedding_is_no_layer():
    stages = transformers.ResNetConfig(**STAGES, embedding_size=16, layer_type="basic", out_features=["stage4"])
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2))}
    options = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": stages}
    model = seeded("Detr", "ObjectDetection", **options, **sizes, d_model=32, num_queries=5)
    result = Explainer(model, utility=found)(noise(64, 96))
    assert result.diagnostics.layers == ("model.encoder.layers.0",) and result.raw.shape == (2, 2, 3)
