"""Small networks for the metrics: curved heads, maps that are alive, seconds to run."""

import pytest
import torch
from torch import Tensor, nn

from ..helpers import network


@pytest.fixture
def model() -> nn.Module:
    return network()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 20, 24, generator=torch.Generator().manual_seed(3))
