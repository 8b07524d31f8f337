"""RoIAlign that can be differentiated twice.

torchvision's operator has a first derivative only, so the Hessian of a Faster or Mask R-CNN's scores would stop there. With the
regions given, RoIAlign is linear in the features: the derivative of its derivative is RoIAlign itself. The regions carry no
gradient, as in torchvision (which detaches the proposals).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

NAME = "torchvision::roi_align"


def roi_align(
    features: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """``torch.ops.torchvision.roi_align``, with all derivatives in ``features``; torchvision must have been imported."""
    options = (spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned)
    out: Tensor = _RoiAlign.apply(features, rois.detach(), options)
    return out


class _RoiAlign(Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, rois: Tensor, options: tuple[Any, ...]) -> Any:
        ctx.save_for_backward(rois)
        ctx.options, ctx.shape = options, tuple(features.shape)
        return torch.ops.torchvision.roi_align(features, rois, *options)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (rois,) = ctx.saved_tensors
        return _RoiAlignGradient.apply(gradients[0], rois, ctx.options, ctx.shape), None, None


class _RoiAlignGradient(Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, rois: Tensor, options: tuple[Any, ...], shape: tuple[int, ...]) -> Any:
        ctx.save_for_backward(rois)
        ctx.options = options
        scale, height, width, sampling, aligned = options
        return torch.ops.torchvision._roi_align_backward(
            gradient.contiguous(), rois, scale, height, width, *shape, sampling, aligned
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (rois,) = ctx.saved_tensors
        return _RoiAlign.apply(gradients[0].contiguous(), rois, ctx.options), None, None, None
