"""Randomly initialised networks whose maps are alive."""

from __future__ import annotations

import torch
from torch import nn


def wake(model: nn.Module, size: int = 224, spread: float = 3.0, images: int = 2) -> nn.Module:
    """Random statistics and a last layer scaled so that the softmax is neither flat nor saturated; eval mode."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    model.eval()
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        if not last.weight.any():
            last.weight.normal_(0, 0.1, generator=generator)
        noise = torch.randn(images, 3, size, size, generator=generator, dtype=last.weight.dtype)
        last.weight.mul_(spread / model(noise).std())
    return model
