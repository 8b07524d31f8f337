"""The head alone equals the whole model on the same activations, and says when it cannot stand alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shapleycam.errors import InputError, LayerError
from shapleycam.model.head import Head


class Net(nn.Module):
    """trunk -> block -> curved classifier; ``side`` lets the images reach the classifier around the block."""

    def __init__(self, side: bool = False, saved_batch: bool = False, in_place: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Conv2d(3, 6, 3, stride=2)
        self.block = nn.Conv2d(6, 8, 3)
        self.relu = nn.ReLU(inplace=in_place)
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 5)
        self.side, self.saved_batch = side, saved_batch

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        pooled = self.relu(self.block(self.trunk(x))).mean((2, 3))
        if self.saved_batch:
            pooled = pooled.reshape(batch, 8)
        if self.side:
            pooled = pooled + x[:, 0, 0, :8] * 0.01
        out: Tensor = self.linear(self.norm(pooled))
        return out


@pytest.fixture(name="images")
def _images() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["plain", "in_place", "side", "saved_batch"])
def test_other_activations_give_what_a_spliced_model_gives(kind: str, images: Tensor) -> None:
    net = Net(**({kind: True} if kind != "plain" else {})).eval()  # type: ignore[arg-type]
    head = Head(net, ("block", net.block), images)
    assert head.bypassed == (kind in ("side", "saved_batch"))
    torch.testing.assert_close(head.outputs, net(images).detach())
    torch.testing.assert_close(head.activations, net.block(net.trunk(images)).detach())

    rows = torch.tensor([2, 0, 0, 1, 2, 1, 0])
    given = head.activations[rows] * torch.rand(7, 8, 1, 1, generator=torch.Generator().manual_seed(2))
    kept = given.clone()
    pooled = given.relu().mean((2, 3))
    if kind == "side":
        pooled = pooled + images[rows][:, 0, 0, :8] * 0.01
    expected = net.linear(net.norm(pooled))
    torch.testing.assert_close(head(given, rows), expected.detach())
    assert torch.equal(given, kept)
    assert not head(given, rows).requires_grad


def test_without_rows_each_row_is_its_image(images: Tensor) -> None:
    net = Net(side=True).eval()
    head = Head(net, ("block", net.block), images)
    torch.testing.assert_close(head(head.activations), net(images).detach())


def test_shapes_that_do_not_fit_are_refused(images: Tensor) -> None:
    net = Net().eval()
    head = Head(net, ("block", net.block), images)
    with pytest.raises(InputError, match=r"\[B, 8, 5, 5\]"):
        head(torch.zeros(2, 8, 4, 5), torch.tensor([0, 1]))
    with pytest.raises(InputError, match="rows names 3 images for 2"):
        head(head.activations[:2])
    with pytest.raises(LayerError, match="not reached"):
        Head(net, ("lost", nn.Conv2d(1, 1, 1)), images)
    assert not net.block._forward_hooks


def test_one_image_shows_that_the_head_counts_its_images(images: Tensor) -> None:
    net = Net(saved_batch=True).eval()
    head = Head(net, ("block", net.block), images[:1])
    assert head.bypassed
    expected = Head(net, ("block", net.block), images).outputs
    found = head(net.block(net.trunk(images)).detach(), torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(found, expected)
    plain = Net().eval()
    assert not Head(plain, ("block", plain.block), images[:1]).bypassed
