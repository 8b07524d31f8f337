"""Reshape transforms: a layer's output as [N, C, h, w].

None is needed here: without a ``reshape_transform`` the layout is found from the model. These exist for code that passes them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def vit_reshape_transform(tensor: Tensor, height: int = 14, width: int = 14) -> Tensor:
    """[N, 1 + height·width, C] with one class token to [N, C, height, width]."""
    patches: Tensor = tensor[:, 1:].unflatten(1, (height, width))
    return patches.movedim(-1, 1)


def swinT_reshape_transform(tensor: Tensor, height: int = 7, width: int = 7) -> Tensor:
    """[N, height·width, C], or [N, height, width, C] as timm and torchvision return it now, to [N, C, height, width].

    pytorch-grad-cam's own takes the former only and fails on today's Swin.
    """
    if tensor.ndim == 3:
        tensor = tensor.unflatten(1, (height, width))
    return tensor.movedim(-1, 1)


def fasterrcnn_reshape_transform(x: Mapping[str, Tensor]) -> Tensor:
    """The levels of a feature pyramid, their absolute values resized to the level called "pool", as one [N, C, h, w]."""
    size = x["pool"].shape[-2:]
    return torch.cat([F.interpolate(level.abs(), size, mode="bilinear") for level in x.values()], 1)
