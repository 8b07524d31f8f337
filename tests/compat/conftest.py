"""Small networks in float64, with curved heads, for comparisons with pytorch-grad-cam."""

import pytest
import torch
from torch import nn


class Curved(nn.Module):
    """Two target layers of different size and a head that is not linear."""

    def __init__(self, channels: int = 3, classes: int = 6) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, 8, 3, stride=2, padding=1), nn.SiLU())
        self.second = nn.Sequential(nn.Conv2d(8, 10, 3, stride=2, padding=1), nn.SiLU())
        self.head = nn.Sequential(
            nn.Conv2d(10, 7, 3, padding=1), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(28, classes)
        )

    def forward(self, x):
        return 20 * self.head(self.second(self.first(x)))


class Pooled(nn.Module):
    """A pool-and-linear head."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.SiLU())
        self.second = nn.Sequential(nn.Conv2d(8, 10, 3, stride=2, padding=1), nn.SiLU())
        self.fc = nn.Linear(10, classes)

    def forward(self, x):
        return 20 * self.fc(self.second(self.first(x)).mean((2, 3)))


@pytest.fixture(params=[Curved, Pooled])
def model(request):
    torch.manual_seed(3)
    return request.param().double().eval()


@pytest.fixture
def curved():
    torch.manual_seed(3)
    return Curved().double().eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 20, 28, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
