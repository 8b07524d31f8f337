"""Convolutions whose gradients are convolutions again, to every order and for any number of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
#: A size, which is symbolic where images of any size are traced.
Size = int | torch.SymInt


def constant_pad(x: Tensor, pad: Sequence[int], value: float = 0.0) -> Tensor:
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


@dataclass(frozen=True, slots=True)
class _Kernel:
    """A convolution without its bias, which is linear in its input; or its adjoint.

    Attributes:
        weight: [out, in / groups, *kernel], of the convolution.
        size: of its input's positions.
        adjoint: the map from outputs to inputs.
        count: of its outputs' positions, where it has fewer than fit: a transposed convolution may leave out its last ones.
    """

    weight: Tensor
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    size: list[Size]
    adjoint: bool = False
    count: tuple[Size, ...] = ()

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rank, weight = x.ndim - 2, self.weight
        if not self.adjoint:
            out: Tensor = aten.convolution(
                x, weight, bias, self.stride, self.padding, self.dilation, False, [0] * rank, self.groups
            )
            for dim, number in enumerate(self.count, 2):
                out = out.narrow(dim, 0, number)
            return out
        reach = [d * (int(k) - 1) for d, k in zip(self.dilation, weight.shape[2:], strict=True)]
        around = [r - p for r, p in zip(reach, self.padding, strict=True)]
        left = [
            known(size - ((n - 1) * s - 2 * p + r + 1))
            for size, n, s, p, r in zip(self.size, x.shape[2:], self.stride, self.padding, reach, strict=True)
        ]
        exact = all(isinstance(width, int) for width in left)
        if exact and not any(left) and all(s == 1 for s in self.stride) and all(width >= 0 for width in around):
            # With the kernel flipped it is a convolution again, for which every runtime has its best code.
            flipped = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1).flip(tuple(range(2, 2 + rank)))
            return aten.convolution(x, flipped, bias, self.stride, around, self.dilation, False, [0] * rank, self.groups)  # type: ignore[no-any-return]
        if exact:
            return aten.convolution(x, weight, bias, self.stride, self.padding, self.dilation, True, left, self.groups)  # type: ignore[no-any-return]
        # How far the last windows reach depends on the size, and is an attribute in ONNX: all of it, of which a part is kept.
        most = [s - 1 for s in self.stride]
        full: Tensor = aten.convolution(x, weight, bias, self.stride, [0] * rank, self.dilation, True, most, self.groups)
        for dim, (first, size) in enumerate(zip(self.padding, self.size, strict=True), 2):
            # As a gather: that a slice ends inside, the tracer would have to prove of every size, and cannot.
            full = full.index_select(dim, torch.arange(first, first + size, device=full.device))
        return full


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


def known(size: Any) -> Any:
    """A size as a number where it is one for images of every size; otherwise as it is."""
    number = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else None
    return size if number is None else number


def _each(value: int | Sequence[int], rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def conv(
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
            x = constant_pad(x, [n for t in reversed(total) for n in (0, t % 2)])
    size = [known(n) for n in x.shape[2:]]
    return _Linear.apply(x, bias, _Kernel(weight, _each(stride, rank), _each(padding, rank), dilation, groups, size))


def conv_transpose(
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
        (known(n) - 1) * s - 2 * p + d * (int(k) - 1) + 1 + o
        for n, s, p, d, k, o in zip(
            x.shape[2:], stride, padding, dilation, weight.shape[2:], _each(output_padding, rank), strict=True
        )
    ]
    fewer = any(o >= s for o, s in zip(_each(output_padding, rank), stride, strict=True))
    count = tuple(known(n) for n in x.shape[2:]) if fewer else ()
    return _Linear.apply(x, bias, _Kernel(weight, stride, padding, dilation, groups, size, True, count))
