"""Convolutions with weights that are reordered once: the same small batch shape through a model, thousands of times, on a CPU.

Eager PyTorch lets oneDNN reorder a convolution's weight at every call, and takes a slower path altogether for small ones.
Inductor's frozen graphs call oneDNN with weights reordered ahead of time; so does this, for as long as its block lasts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class PackedConvolutions(TorchFunctionMode):
    """Within its block and thread, float32 convolutions of channels-last images on a CPU use packed weights.

    Everything else runs as it is: other dtypes and devices, images with the channels first, weights that are no parameters
    (a parametrisation makes new ones each time), autocast, gradients. The model is not touched; values agree to rounding.
    """

    def __init__(self) -> None:
        super().__init__()
        # The weight itself is kept beside its packed form, so that its id cannot come to mean another.
        self._packed: dict[tuple[Any, ...], tuple[nn.Parameter, Tensor]] = {}

    @staticmethod
    def available() -> bool:
        """Whether this build of PyTorch has oneDNN, switched on, and the operators for packed weights."""
        names = ("_convolution_pointwise", "_reorder_convolution_weight")
        switched_on = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
        return switched_on and all(hasattr(torch.ops.mkldnn, name) for name in names)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d and not kwargs and len(args) == 7 and self._can(*args):
            x, weight, bias, *geometry = args
            stride, padding, dilation = (list(part) for part in geometry[:3])
            packed = self._pack(x, weight, padding, stride, dilation, geometry[3])
            return torch.ops.mkldnn._convolution_pointwise(
                x, packed, bias, padding, stride, dilation, geometry[3], "none", [], ""
            )
        return func(*args, **(kwargs or {}))

    def _can(self, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any) -> bool:
        return (
            type(x) is Tensor
            and type(weight) is nn.Parameter
            and x.ndim == 4
            and x.dtype == weight.dtype == torch.float32
            and (bias is None or bias.dtype == torch.float32)
            and x.device.type == weight.device.type == "cpu"
            and all(isinstance(part, tuple) for part in (stride, padding, dilation))
            and x.shape[1] == weight.shape[1] * groups
            and x.numel() > 0
            and x.is_contiguous(memory_format=torch.channels_last)
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        )

    def _pack(self, x: Tensor, weight: nn.Parameter, padding: Any, stride: Any, dilation: Any, groups: int) -> Tensor:
        key = (id(weight), weight._version, tuple(x.shape), tuple(padding), tuple(stride), tuple(dilation), groups)
        if key not in self._packed:
            shape = list(x.shape)
            reordered = torch.ops.mkldnn._reorder_convolution_weight(weight.detach(), padding, stride, dilation, groups, shape)
            self._packed[key] = (weight, reordered)
        return self._packed[key][1]
