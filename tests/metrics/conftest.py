"""Small networks for the metrics: curved heads, maps that are alive, seconds to run."""

import pytest
import torch
from torch import Tensor, nn


def network(curved: bool = True, classes: int = 7) -> nn.Module:
    torch.manual_seed(4)
    head = [nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, classes)] if curved else [nn.Linear(12, classes)]
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        *head,
    )
    with torch.no_grad():
        model[-1].weight *= 8
    return model.eval()


@pytest.fixture
def model() -> nn.Module:
    return network()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 20, 24, generator=torch.Generator().manual_seed(3))
