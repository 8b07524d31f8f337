"""What the operator benchmarks run: shapes, layouts and dtypes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: [N, C, S] of the activations: batch, channels, positions.
SHAPES = [(1, 2048, 49), (64, 2048, 49), (256, 2048, 49), (64, 256, 3136), (256, 768, 196), (32, 512, 784)]
#: On a small CPU: out of the last-level cache, and still quick.
CPU_SHAPES = [(1, 2048, 49), (64, 2048, 49), (16, 256, 3136), (64, 768, 196), (32, 512, 784)]
DTYPES = [torch.float32, torch.bfloat16]
LAYOUTS = ["first", "last"]


@dataclass(frozen=True, slots=True)
class Case:
    """One operator on one shape.

    Attributes:
        operator: "weighted_reduce" or "channel_weighted_sum".
        pooling: the row of weighted_reduce; "" for the other operator.
        shape: [N, C, S].
        dtype: of every input.
        layout: "first" ([N, C, h, w]), "last" ([N, h, w, C]), or "tokens" ([N, 1 + S, C], the first one skipped).
    """

    operator: str
    pooling: str
    shape: tuple[int, int, int]
    dtype: torch.dtype
    layout: str

    @property
    def name(self) -> str:
        row = self.pooling or self.operator
        return f"{row} {'x'.join(map(str, self.shape))} {str(self.dtype)[6:]} {self.layout}"

    def tensors(self, device: torch.device) -> list[Tensor]:
        """Activations, gradient and Hessian-vector product (activations and alpha for channel_weighted_sum)."""
        generator = torch.Generator(device=device).manual_seed(0)
        n, c, _ = self.shape
        count = 3 if self.operator == "weighted_reduce" else 1
        # Positive activations, as after a ReLU: rows that divide by their sum are ill-conditioned otherwise.
        made = [self._one(device, generator, positive=i == 0) for i in range(count)]
        if self.operator == "channel_weighted_sum":
            made.append(torch.randn((n, 1, c), generator=generator, device=device))
        return made

    def _one(self, device: torch.device, generator: torch.Generator, positive: bool) -> Tensor:
        n, c, s = self.shape
        prefix = 1 if self.layout == "tokens" else 0
        shape = (n, c, s) if self.layout == "first" else (n, s + prefix, c)
        stored = torch.randn(shape, generator=generator, device=device)
        stored = (stored.abs_() if positive else stored).to(self.dtype)
        return stored if self.layout == "first" else stored[:, prefix:].transpose(1, 2)

    def bytes(self) -> int:
        """Bytes that must cross the memory bus: each input once, and the map."""
        n, c, s = self.shape
        inputs = 3 if self.operator == "weighted_reduce" else 1
        return inputs * n * c * s * self.dtype.itemsize + n * s * 4 + (0 if inputs == 3 else n * c * 4)


def cases(device: str) -> list[Case]:
    """All cases for a device type: the first-order cost is in "mean" and "elementwise"; the other rows run on one shape."""
    shapes = SHAPES if device == "cuda" else CPU_SHAPES
    found = []
    for shape in shapes:
        layouts = ["first", "tokens"] if shape[2] == 196 else LAYOUTS
        for dtype in DTYPES:
            for layout in layouts:
                found += [Case("weighted_reduce", row, shape, dtype, layout) for row in ("mean", "elementwise")]
                found.append(Case("channel_weighted_sum", "", shape, dtype, layout))
    for row in ("elementwise_relu", "activation", "positive_gradient", "plusplus"):
        found += [Case("weighted_reduce", row, shapes[1], torch.float32, layout) for layout in LAYOUTS]
    return found
