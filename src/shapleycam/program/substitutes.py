"""Operators of a head that would not survive differentiation or export, and what runs in their place.

They act before autograd sees an operator: torch's own derivatives of these (convolutions, normalisations, pads, pools, fused
attention) are missing to the second order, or fix the number of images, or have no translation to ONNX. The substitutes compute
the same values, from primitives whose derivatives have none of these faults.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..model.double_backward import hardsigmoid, math_attention

aten = torch.ops.aten


class Smooth(fx.Interpreter):
    """Runs a graph with the substitutes in the place of their operators."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        substitute = SUBSTITUTES.get(target)
        result = NotImplemented if substitute is None else substitute(*args, **kwargs)
        return super().call_function(target, args, kwargs) if result is NotImplemented else result


# ------------------------------------------------------------------------------------------------------- normalisations


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _standard(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    spread: Tensor = (centred * centred).mean(dims, keepdim=True)
    return centred * torch.rsqrt(spread + eps)


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """In evaluation mode: one multiplication and one addition by channel."""
    shape = (-1, *[1] * (x.ndim - 2))
    scale = torch.rsqrt(_wide(variance) + eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    nothing = x.new_empty((0,))
    return (_wide(x) * scale.view(shape) + shift.view(shape)).to(x.dtype), nothing, nothing


def _layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn: bool = True,
) -> Tensor:
    return _affine(_standard(_wide(x), tuple(range(-len(shape), 0)), eps), weight, bias).to(x.dtype)


def _native_layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    nothing = x.new_empty((0,))
    return _layer_norm(x, shape, weight, bias, eps), nothing, nothing


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    wide = _wide(x)
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    normed = wide * torch.rsqrt((wide * wide).mean(tuple(range(-len(shape), 0)), keepdim=True) + eps)
    return _affine(normed, weight, None).to(x.dtype)


def _group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, cudnn: bool = True
) -> Tensor:
    parts = _wide(x).unflatten(1, (groups, -1))
    normed = _standard(parts, tuple(range(2, parts.ndim)), eps).flatten(1, 2)
    shape = (-1, *[1] * (x.ndim - 2))
    return _affine(normed, None if weight is None else weight.view(shape), None if bias is None else bias.view(shape)).to(
        x.dtype
    )


# ----------------------------------------------------------------------------------------------------------------- pools


def _adaptive_avg_pool(x: Tensor, out: Sequence[int]) -> Tensor:
    if all(size == 1 for size in out):
        return x.mean(tuple(range(-len(out), 0)), keepdim=True)
    for dim, size in zip(range(-len(out), 0), out, strict=True):
        x = _adaptive_mean(x, dim, size)
    return x


def _adaptive_mean(x: Tensor, dim: int, out: int) -> Tensor:
    size = int(x.shape[dim])
    if out == size:
        return x
    if size % out == 0:
        parts: Tensor = x.unflatten(dim, (out, size // out))
        return parts.mean(dim)
    ends = [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]
    return torch.cat([x.narrow(dim, start, end - start).mean(dim, keepdim=True) for start, end in ends], dim)


def _avg_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Any:
    """As a convolution of every channel by itself, whose derivatives are convolutions."""
    if x.ndim != 4 or ceil_mode or (any(padding) and not count_include_pad):
        return NotImplemented
    kernel = [*kernel, *kernel][:2]
    channels = int(x.shape[1])
    weight = x.new_full((channels, 1, *kernel), 1 / (divisor or kernel[0] * kernel[1]))
    return _conv(x, weight, None, list(stride) or kernel, list(padding), 1, channels)


def _pad(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    if mode != "constant":
        return NotImplemented
    return _constant_pad(x, pad, value or 0.0)


def _constant_pad(x: Tensor, pad: Sequence[int], value: float = 0.0) -> Tensor:
    for i in range(0, len(pad), 2):
        dim = x.ndim - 1 - i // 2
        low, high = int(pad[i]), int(pad[i + 1])
        if low < 0 or high < 0:
            first, last = max(-low, 0), max(-high, 0)
            x = x.narrow(dim, first, x.shape[dim] - first - last)
        sides = [[*x.shape[:dim], max(width, 0), *x.shape[dim + 1 :]] for width in (low, high)]
        parts = [x.new_full(sides[0], value)] if low > 0 else []
        parts.append(x)
        parts += [x.new_full(sides[1], value)] if high > 0 else []
        x = torch.cat(parts, dim) if len(parts) > 1 else x
    return x


def _dropout(x: Tensor, p: float, train: bool) -> Any:
    return NotImplemented if train else x


def _view(x: Tensor, shape: Sequence[Any]) -> Tensor:
    return x.reshape(shape)  # a substitute's result may lie in memory in another order


def _size(x: Tensor, dim: int) -> Any:
    return x.shape[dim]  # the operator fixes the number of images


# ---------------------------------------------------------------------------------------------------------- convolutions


@dataclass(frozen=True, slots=True)
class _Kernel:
    """A convolution without its bias, which is linear in its input; or its adjoint.

    Attributes:
        weight: [out, in / groups, *kernel], of the convolution.
        size: of its input's positions.
        adjoint: the map from outputs to inputs.
    """

    weight: Tensor
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    size: list[int]
    adjoint: bool = False

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rank, weight = x.ndim - 2, self.weight
        if not self.adjoint:
            return aten.convolution(x, weight, bias, self.stride, self.padding, self.dilation, False, [0] * rank, self.groups)  # type: ignore[no-any-return]
        reach = [d * (int(k) - 1) for d, k in zip(self.dilation, weight.shape[2:], strict=True)]
        around = [r - p for r, p in zip(reach, self.padding, strict=True)]
        if all(s == 1 for s in self.stride) and all(width >= 0 for width in around):
            # With the kernel flipped it is a convolution again, for which every runtime has its best code.
            flipped = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1).flip(tuple(range(2, 2 + rank)))
            return aten.convolution(x, flipped, bias, self.stride, around, self.dilation, False, [0] * rank, self.groups)  # type: ignore[no-any-return]
        left = [
            size - ((int(n) - 1) * s - 2 * p + r + 1)
            for size, n, s, p, r in zip(self.size, x.shape[2:], self.stride, self.padding, reach, strict=True)
        ]
        return aten.convolution(x, weight, bias, self.stride, self.padding, self.dilation, True, left, self.groups)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """A linear map whose gradient is its adjoint, whose gradient is the map: torch's own double backward fixes the batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, kernel: _Kernel) -> Tensor:  # type: ignore[override]
        ctx.kernel = kernel
        return kernel(x, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        kernel: _Kernel = ctx.kernel
        return _Linear.apply(gradient, None, replace(kernel, adjoint=not kernel.adjoint)), None, None


def _each(value: int | Sequence[int], rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Any:
    rank = weight.ndim - 2
    if x.ndim != weight.ndim:
        return NotImplemented
    dilation = _each(dilation, rank)
    if isinstance(padding, str):
        total = [d * (int(k) - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        padding = [t // 2 for t in total]
        if any(t % 2 for t in total):
            x = _constant_pad(x, [n for t in reversed(total) for n in (0, t % 2)])
    size = [int(n) for n in x.shape[2:]]
    return _Linear.apply(x, bias, _Kernel(weight, _each(stride, rank), _each(padding, rank), dilation, groups, size))


def _conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Any:
    rank = weight.ndim - 2
    if x.ndim != weight.ndim:
        return NotImplemented
    stride, padding, dilation = _each(stride, rank), _each(padding, rank), _each(dilation, rank)
    size = [
        (int(n) - 1) * s - 2 * p + d * (int(k) - 1) + 1 + o
        for n, s, p, d, k, o in zip(
            x.shape[2:], stride, padding, dilation, weight.shape[2:], _each(output_padding, rank), strict=True
        )
    ]
    return _Linear.apply(x, bias, _Kernel(weight, stride, padding, dilation, groups, size, adjoint=True))


SUBSTITUTES: dict[Any, Callable[..., Any]] = {
    aten.sym_size.int: _size,
    aten.view.default: _view,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.layer_norm.default: _layer_norm,
    aten.native_layer_norm.default: _native_layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten.adaptive_avg_pool1d.default: _adaptive_avg_pool,
    aten.adaptive_avg_pool2d.default: _adaptive_avg_pool,
    aten.adaptive_avg_pool3d.default: _adaptive_avg_pool,
    aten.avg_pool2d.default: _avg_pool2d,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _constant_pad,
    aten.scaled_dot_product_attention.default: math_attention,
    aten.hardsigmoid.default: hardsigmoid,
    aten.dropout.default: _dropout,
    aten.conv1d.default: _conv,
    aten.conv2d.default: _conv,
    aten.conv3d.default: _conv,
    aten.conv1d.padding: _conv,
    aten.conv2d.padding: _conv,
    aten.conv3d.padding: _conv,
    aten.conv_transpose1d.default: _conv_transpose,
    aten.conv_transpose2d.input: _conv_transpose,
    aten.conv_transpose3d.input: _conv_transpose,
}
