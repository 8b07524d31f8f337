"""Operators of a head that would not survive differentiation or export, and what runs in their place.

They act before autograd sees an operator: torch's own derivatives of these (convolutions, normalisations, pads, pools, resizes,
fused attention, …) are missing to the second order, or fix the number of images, or have no translation to ONNX. The
substitutes compute the same values, from primitives whose derivatives have none of these faults.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import _disable_current_modes

from ..model.double_backward import hardsigmoid, math_attention
from .convolutions import constant_pad, conv, conv_transpose, known

aten = torch.ops.aten


class Smooth(fx.Interpreter):
    """Runs a graph with the substitutes in the place of their operators.

    Args:
        module: the graph.
        running: is told every operator of it that is about to run.
    """

    def __init__(self, module: fx.GraphModule, running: Callable[[Any], None]) -> None:
        super().__init__(module)
        self._running = running

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        self._running(target)
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


def _instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    own: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
) -> Tensor:
    if not own and mean is not None and variance is not None:
        return _batch_norm(x, weight, bias, mean, variance, momentum, eps)[0]
    normed, shape = _standard(_wide(x), tuple(range(2, x.ndim)), eps), (-1, *[1] * (x.ndim - 2))
    return _affine(normed, None if weight is None else weight.view(shape), None if bias is None else bias.view(shape)).to(
        x.dtype
    )


def _variance(x: Tensor, dims: Sequence[int] | None, correction: float, keepdim: bool) -> Any:
    dims = [dim % x.ndim for dim in (dims or range(x.ndim))]
    if 0 in dims:  # over the images
        return NotImplemented
    count = known(prod(x.shape[dim] for dim in dims))
    left = max(count - correction, 0.0) if isinstance(count, int) else count - correction
    centred = x - x.mean(dims, keepdim=True)
    return (centred * centred).sum(dims, keepdim=keepdim) / left


def _var(
    x: Tensor,
    dims: Sequence[int] | None = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> Any:
    return _variance(x, dims, float(unbiased) if correction is None else correction, keepdim)


def _std(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    variance = _var(x, *args, **kwargs)
    if variance is NotImplemented:
        return NotImplemented
    flat = variance == 0  # where torch's first derivative is 0 and its second is NaN, as those of this power
    return torch.where(flat, variance.pow(1.5), torch.where(flat, 1.0, variance).sqrt())


# --------------------------------------------------------------------------------------------------------------- resizes


def _resize(operator: Any, rank: int) -> Callable[..., Tensor]:
    """A resize as one product with a matrix for each dimension, which the operator itself tells."""

    def run(x: Tensor, size: Sequence[int] | None, *rest: Any) -> Tensor:
        *corners, factors = rest
        for i in range(rank):
            count, dim = int(x.shape[2 + i]), 2 + i - x.ndim
            with _disable_current_modes():
                # Always along the last dimension: torch 2.14 resizes pictures of width 1 wrongly with antialiasing.
                ones = [1] * (rank - 1)
                unit = torch.eye(count, dtype=torch.float64).view(1, count, *ones, count)
                to = None if size is None else [*ones, int(size[i])]
                by = None if factors is None else [*map(float, ones), factors[i]]
                matrix = operator(unit, to, *corners, by).view(count, -1).tolist()
            x = torch.matmul(x.movedim(dim, -1), x.new_tensor(matrix)).movedim(-1, dim)
        return x

    return run


_RESIZES = {
    "upsample_linear1d": 1,
    "upsample_nearest1d": 1,
    "_upsample_nearest_exact1d": 1,
    "upsample_bilinear2d": 2,
    "upsample_bicubic2d": 2,
    "_upsample_bilinear2d_aa": 2,
    "_upsample_bicubic2d_aa": 2,
    "upsample_nearest2d": 2,
    "_upsample_nearest_exact2d": 2,
    "upsample_trilinear3d": 3,
    "upsample_nearest3d": 3,
    "_upsample_nearest_exact3d": 3,
}


def _unfold(x: Tensor, kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]) -> Any:
    if x.ndim != 4:
        return NotImplemented
    height, width = kernel
    pick = torch.eye(height * width, dtype=x.dtype, device=x.device).view(-1, 1, height, width)
    channels = int(x.shape[1])
    return conv(x, pick.repeat(channels, 1, 1, 1), None, stride, padding, dilation, channels).flatten(2)


# ----------------------------------------------------------------------------------------------------------------- pools


def _adaptive_avg_pool(x: Tensor, out: Sequence[int]) -> Tensor:
    if all(size == 1 for size in out):
        return x.mean(tuple(range(-len(out), 0)), keepdim=True)
    for dim, size in zip(range(-len(out), 0), out, strict=True):
        x = _adaptive_mean(x, dim, size)
    return x


def _adaptive_mean(x: Tensor, dim: int, out: int) -> Tensor:
    size = known(x.shape[dim])
    if not isinstance(size, int):
        return torch.matmul(x.movedim(dim, -1), _windows(size, out, x)).movedim(-1, dim)
    if out == size:
        return x
    if size % out == 0:
        parts: Tensor = x.unflatten(dim, (out, size // out))
        return parts.mean(dim)
    ends = [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]
    return torch.cat([x.narrow(dim, start, end - start).mean(dim, keepdim=True) for start, end in ends], dim)


def _windows(size: Any, out: int, like: Tensor) -> Tensor:
    """The means over the windows of an adaptive pool as a matrix [size, out], for a size that is free."""
    first, position = torch.arange(out, device=like.device), torch.arange(size, device=like.device)[:, None]
    start, end = first * size // out, ((first + 1) * size + (out - 1)) // out
    inside = (position >= start) & (position < end)
    shares: Tensor = inside.to(like.dtype) / (end - start).to(like.dtype)
    return shares


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
    return conv(x, weight, None, list(stride) or kernel, list(padding), 1, channels)


def _pad(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    if mode != "constant":
        return NotImplemented
    return constant_pad(x, pad, value or 0.0)


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    value, gate = x.chunk(2, dim)
    return value * gate.sigmoid()


def _abs(x: Tensor) -> Tensor:
    return x * x.detach().sign()


def _step(operator: Any) -> Callable[[Tensor], Tensor]:
    """Of no slope: torch's zeros for it fix the number of images."""
    return lambda x: operator(x.detach())


def _bilinear(one: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _affine(torch.einsum("...i,oij,...j->...o", one, weight, other), None, bias)


def _dropout(x: Tensor, p: float, train: bool) -> Any:
    return NotImplemented if train else x


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """As one matrix product: of rows that lie in memory in another order torch makes many, each of which reads the weight."""
    if x.ndim < 3:
        return NotImplemented
    flat = x.reshape(prod(x.shape[:-1]), x.shape[-1])  # a -1 would be a number that compilers do not take
    rows: Tensor = aten.linear(flat, weight, bias)
    return rows.reshape(*x.shape[:-1], weight.shape[0])


def _matmul(x: Tensor, other: Tensor) -> Any:
    return _linear(x, other.t()) if other.ndim == 2 else NotImplemented


def _view(x: Tensor, shape: Sequence[Any]) -> Tensor:
    return x.reshape(shape)  # a substitute's result may lie in memory in another order


def _size(x: Tensor, dim: int) -> Any:
    return x.shape[dim]  # the operator fixes the number of images


SUBSTITUTES: dict[Any, Callable[..., Any]] = {
    aten.sym_size.int: _size,
    aten.view.default: _view,
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
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
    aten.constant_pad_nd.default: constant_pad,
    aten.scaled_dot_product_attention.default: math_attention,
    aten.hardsigmoid.default: hardsigmoid,
    aten.instance_norm.default: _instance_norm,
    **dict.fromkeys((aten.var.default, aten.var.dim, aten.var.correction), _var),
    **dict.fromkeys((aten.std.default, aten.std.dim, aten.std.correction), _std),
    **{op.vec: _resize(op.vec, rank) for name, rank in _RESIZES.items() for op in [getattr(aten, name)]},
    **{op.default: _step(op.default) for op in (aten.sign, aten.sgn, aten.floor, aten.ceil, aten.round, aten.trunc)},
    aten.abs.default: _abs,
    aten.im2col.default: _unfold,
    aten.glu.default: _glu,
    aten.bilinear.default: _bilinear,
    # Recurrent networks, unrolled.
    **get_decompositions([aten.gru.input, aten.lstm.input, aten.rnn_tanh.input, aten.rnn_relu.input]),
    aten.dropout.default: _dropout,
    aten.conv1d.default: conv,
    aten.conv2d.default: conv,
    aten.conv3d.default: conv,
    aten.conv1d.padding: conv,
    aten.conv2d.padding: conv,
    aten.conv3d.padding: conv,
    aten.conv_transpose1d.default: conv_transpose,
    aten.conv_transpose2d.input: conv_transpose,
    aten.conv_transpose3d.input: conv_transpose,
}
