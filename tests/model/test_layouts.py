"""Which dimension holds the channels, and the view that every layout gives."""

import pytest
import torch
from torch import nn

from shapleycam import Explainer, LayerError, Layout
from shapleycam.model.layouts import resolve_layout


@pytest.mark.parametrize(
    ("shape", "image", "facts", "expected"),
    [
        ((2, 512, 7, 7), (2, 3, 224, 224), {}, Layout("NCHW", (7, 7))),
        ((2, 7, 7, 768), (2, 3, 224, 224), {}, Layout("NHWC", (7, 7))),
        ((2, 512, 7, 10), (2, 3, 224, 320), {}, Layout("NCHW", (7, 10))),
        ((2, 7, 10, 768), (2, 3, 224, 320), {}, Layout("NHWC", (7, 10))),
        ((2, 64, 1, 1), (2, 3, 32, 32), {"module": nn.Conv2d(3, 64, 1)}, Layout("NCHW", (1, 1))),
        ((2, 197, 192), (2, 3, 224, 224), {"prefix": 1, "patch": (16, 16)}, Layout("NTC", (14, 14), 1)),
        ((2, 201, 192), (2, 3, 224, 224), {"prefix": 5, "patch": (16, 16)}, Layout("NTC", (14, 14), 5)),
        ((2, 198, 192), (2, 3, 224, 224), {"patch": (16, 16)}, Layout("NTC", (14, 14), 2)),
        ((2, 281, 192), (2, 3, 224, 320), {"prefix": 1, "patch": (16, 16)}, Layout("NTC", (14, 20), 1)),
        ((2, 197, 192), (2, 3, 224, 224), {}, Layout("NTC", (14, 14), 1)),
        ((2, 32, 4, 8, 8), (2, 1, 32, 64, 64), {}, Layout("NCDHW", (4, 8, 8))),
        ((2, 8, 8, 8), (2, 3, 64, 64), {"module": nn.Conv2d(3, 8, 1)}, Layout("NCHW", (8, 8))),
        # strides that differ by dimension: the convolution's channel count decides
        ((2, 24, 16, 4), (2, 1, 16, 256), {"module": nn.Conv2d(1, 24, 1)}, Layout("NCHW", (16, 4))),
    ],
)
def test_auto(shape, image, facts, expected):
    assert resolve_layout(shape, image, name="x", **facts) == expected


def test_ambiguity_is_an_error_that_names_the_choices():
    with pytest.raises(LayerError, match="layout=.*'NCHW', 'NHWC'"):
        resolve_layout((2, 8, 8, 8), (2, 3, 64, 64), name="features")
    with pytest.raises(LayerError, match="prefix"):
        resolve_layout((2, 203, 64), (2, 3, 224, 224), name="features")
    with pytest.raises(LayerError, match="no positions"):
        resolve_layout((2, 8), (2, 3, 64, 64), name="fc")


def test_wishes():
    assert resolve_layout((2, 8, 8, 8), (2, 3, 64, 64), name="x", wanted="NHWC") == Layout("NHWC", (8, 8))
    full = Layout("NTC", (4, 50), 3)
    assert resolve_layout((2, 203, 64), (2, 3, 224, 224), name="x", wanted=full) is full
    with pytest.raises(LayerError, match="200 positions"):
        resolve_layout((2, 204, 64), (2, 3, 224, 224), name="x", wanted=full)
    with pytest.raises(LayerError, match="needs 3 dimensions"):
        resolve_layout((2, 8, 8, 8), (2, 3, 64, 64), name="x", wanted="NTC")
    with pytest.raises(LayerError, match="Unknown layout"):
        resolve_layout((2, 8, 8, 8), (2, 3, 64, 64), name="x", wanted="WHCN")


@pytest.mark.parametrize("kind", ["NCHW", "channels_last", "NHWC", "NTC", "NCDHW"])
def test_the_view_is_no_copy_and_holds_the_same_values(kind):
    spatial = (2, 3, 4) if kind == "NCDHW" else (3, 4)
    canonical = torch.arange(2 * 5 * torch.Size(spatial).numel(), dtype=torch.float32).reshape(2, 5, *spatial)
    expected = canonical.flatten(2)
    if kind == "NTC":
        stored = torch.cat((torch.full((2, 1, 5), -1.0), expected.transpose(1, 2)), 1).contiguous()
        layout = Layout("NTC", spatial, 1)
    elif kind == "NHWC":
        stored, layout = canonical.permute(0, 2, 3, 1).contiguous(), Layout("NHWC", spatial)
    elif kind == "channels_last":
        stored, layout = canonical.contiguous(memory_format=torch.channels_last), Layout("NCHW", spatial)
    else:
        stored, layout = canonical, Layout(kind, spatial)
    view = layout.view(stored)
    assert torch.equal(view, expected)
    assert view.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("shape", "length", "module", "expected"),
    [
        ((2, 32, 32), 64, nn.LayerNorm(32), Layout("NTC", (32,))),
        ((2, 32, 32), 64, nn.Conv1d(2, 32, 1), Layout("NCL", (32,))),
        ((2, 50, 32), 100, nn.LSTM(8, 16, bidirectional=True), Layout("NTC", (50,))),
        ((2, 32, 50), 100, nn.Sequential(nn.Conv1d(2, 32, 1), nn.ReLU()), Layout("NCL", (50,))),
        ((2, 128, 50), 100, None, Layout("NCL", (50,))),  # more channels than there are places
        ((2, 32, 50), 100, nn.MaxPool1d(2), Layout("NCL", (50,))),
    ],
)
def test_one_dimension_goes_by_evidence(shape, length, module, expected):
    assert resolve_layout(shape, (2, 2, length), name="x", module=module) == expected


def test_one_dimension_without_evidence_is_refused():
    with pytest.raises(LayerError, match=r"\(N, 32, 32\) for images of \(64,\).*layout="):
        resolve_layout((2, 32, 32), (2, 2, 64), name="x", module=nn.ReLU())


def test_clips_with_time_first_and_tokens_behind_the_patches():
    found = resolve_layout((2, 64, 8), (2, 8, 3, 64, 64), name="x", patch=(2, 16, 16))
    assert found == Layout("NTC", (4, 4, 4), time_axis=1) and found.space((2, 8, 3, 64, 64)) == (8, 64, 64)
    found = resolve_layout((2, 1 + 24 + 100, 8), (2, 3, 64, 96), name="x", patch=(16, 16), suffix=100)
    assert found == Layout("NTC", (4, 6), 1, 100)
    tokens = torch.arange(2 * 125 * 8.0).reshape(2, 125, 8)
    assert torch.equal(found.view(tokens), tokens[:, 1:25].transpose(1, 2))


def test_a_layer_has_no_more_positions_than_the_images():
    # The last block of an Inception network for video: what it ends in is one branch of four, with 128 channels.
    block = nn.Sequential(nn.Conv3d(1024, 384, 1), nn.Conv3d(384, 128, 1))
    assert resolve_layout((1, 1024, 2, 7, 7), (1, 3, 16, 224, 224), name="x", module=block) == Layout("NCDHW", (2, 7, 7))


@pytest.mark.parametrize("layer", ["target", "auto"])
def test_many_channels_before_few_slices_are_channels(layer):
    """Shapes alone would take twelve channels of four slices for twelve frames of four channels."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, part in {
        "target": nn.Conv3d(12, 6, 3, padding=1),
        "pool": nn.AdaptiveAvgPool3d(1),
        "flat": nn.Flatten(),
        "classifier": nn.Linear(6, 5),
    }.items():
        model.add_module(name, part)
    found = Explainer(model.eval(), layer)(torch.randn(2, 12, 4, 10, 8))
    assert found.raw.shape == (2, 4, 10, 8)
    assert found.heatmaps().shape == (2, 4, 10, 8)
