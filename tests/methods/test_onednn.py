"""Packed convolutions give what the model gives, whatever its convolutions look like."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from shapleycam.methods.onednn import PackedConvolutions

pytestmark = pytest.mark.skipif(not PackedConvolutions.available(), reason="this PyTorch is built without oneDNN")


class Zoo(nn.Module):
    """One convolution of every kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False)
        self.layers = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 1),
            nn.Conv2d(32, 32, (3, 1), padding=(2, 0), dilation=2, groups=4),
            nn.Conv2d(32, 32, 3, padding="same", padding_mode="reflect"),
            nn.Conv2d(32, 8, 2, padding="valid"),
            parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),
            nn.ConvTranspose2d(8, 8, 2, stride=2),
        )
        self.pool, self.squeeze = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.squeeze(self.pool(self.layers(self.stem(x)))).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_kind_of_convolution(dtype):
    model = Zoo().to(dtype).eval()
    mode = PackedConvolutions()
    with torch.no_grad():
        for seed, batch in enumerate((4, 1, 4, 3)):
            images = torch.randn(batch, 3, 40, 36, generator=torch.Generator().manual_seed(seed)).to(dtype)
            for form in (torch.channels_last, torch.contiguous_format):
                given = images.contiguous(memory_format=form)
                expected = model(given)
                with mode:
                    found = model(given)
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert bool(mode._packed) == (dtype == torch.float32)


def test_a_weight_that_changes_is_packed_again():
    conv = nn.Conv2d(3, 8, 3)
    images = torch.randn(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), PackedConvolutions() as mode:
        first = conv(images)
        conv.weight.mul_(2)
        second = conv(images)
    assert len(mode._packed) == 2
    torch.testing.assert_close(second - conv.bias[:, None, None], 2 * (first - conv.bias[:, None, None]), rtol=1e-5, atol=1e-6)


def test_gradients_and_autocast_run_as_they_are():
    conv = nn.Conv2d(3, 8, 3)
    images = torch.randn(2, 3, 9, 9).contiguous(memory_format=torch.channels_last).requires_grad_(True)
    with PackedConvolutions() as mode:
        conv(images).sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert conv(images).dtype == torch.bfloat16
        with torch.no_grad(), pytest.raises(RuntimeError, match="channels"):
            conv(images[:, :2].contiguous(memory_format=torch.channels_last))
    assert not mode._packed and images.grad is not None
