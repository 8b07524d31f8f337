"""Small models whose heads have curvature, and the helper that makes randomly initialised networks alive."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bench.alive import wake
from torch import Tensor, nn


class Split(nn.Module):
    """trunk, then ``target`` (whose output is explained), then head."""

    def __init__(self, target: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.target = target
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.target(images))


class Pick(nn.Module):
    """Fixed activations, whatever the images: for tests with literal values."""

    def __init__(self, activations: Tensor) -> None:
        super().__init__()
        self.register_buffer("activations", activations)

    def forward(self, images: Tensor) -> Tensor:
        return self.activations.clone()


class Tokens(nn.Module):
    """[N, C, H, W] to a class token and [N, H·W, C] patches."""

    def forward(self, a: Tensor) -> Tensor:
        patches = a.flatten(2).transpose(1, 2)
        return torch.cat((patches.mean(1, keepdim=True), patches), 1)


class Attend(nn.Module):
    """One fused-attention block that ends in the class token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, t: Tensor) -> Tensor:
        q, k, v = self.qkv(t).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)[:, 0]


def small_heads(channels: int = 6, classes: int = 5) -> dict[str, tuple[nn.Module, nn.Module]]:
    """name -> (target, head): every kind of curvature, all from [N, 3, 4, 4] images."""
    c = channels
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return {
        "pool-linear": (nn.Conv2d(3, c, 1), nn.Sequential(*pooled, nn.Linear(c, classes))),
        "relu-pool-linear": (nn.Conv2d(3, c, 1), nn.Sequential(nn.ReLU(inplace=True), *pooled, nn.Linear(c, classes))),
        "conv-bn-silu": (
            nn.Conv2d(3, c, 1),
            nn.Sequential(nn.Conv2d(c, 7, 3, padding=1), nn.BatchNorm2d(7), nn.SiLU(), *pooled, nn.Linear(7, classes)),
        ),
        "pool-norm-linear": (nn.Conv2d(3, c, 1), nn.Sequential(*pooled, nn.LayerNorm(c), nn.Linear(c, classes))),
        "flatten-mlp": (
            nn.Conv2d(3, c, 1),
            nn.Sequential(nn.Flatten(), nn.Linear(16 * c, 9), nn.GELU(), nn.Linear(9, classes)),
        ),
        "attention": (nn.Sequential(nn.Conv2d(3, c, 1), Tokens()), nn.Sequential(Attend(c), nn.Linear(c, classes))),
    }


@pytest.fixture
def wake_up() -> Callable[..., nn.Module]:
    return wake


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(3))


def toy(classes: int = 5, channels: int = 6) -> nn.Module:
    """A small network with a curved head that runs in a millisecond."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 9),
        nn.Tanh(),
        nn.Linear(9, classes),
    )
    return model.eval()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "core" and item.path.stem not in ("test_families", "test_parity"):
            item.add_marker("core")
