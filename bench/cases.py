"""What the operator benchmarks run: operators, shapes, layouts and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shapleycam import ops
from shapleycam.ops import reference

#: [N, C, S] of the activations: batch, channels, positions.
SHAPES = [(1, 2048, 49), (64, 2048, 49), (256, 2048, 49), (64, 256, 3136), (256, 768, 196), (32, 512, 784)]
#: The batches of the larger maps are cut: out of the last-level cache all the same, and eager PyTorch takes its time.
CPU_SHAPES = [(1, 2048, 49), (64, 2048, 49), (256, 2048, 49), (16, 256, 3136), (64, 768, 196), (32, 512, 784)]
#: Of the head that shapley_head explains: ImageNet's classes, and the two batches that a service and a data set have.
HEADS = [(1, 2048, 49), (64, 2048, 49), (1, 1280, 49), (64, 1280, 49)]
CLASSES = 1000
#: Four nodes of Gauss and Legendre, and their weights.
NODES = (
    [0.06943184420297371, 0.33000947820757187, 0.6699905217924281, 0.9305681557970262],
    [0.17392742256872692, 0.32607257743127305, 0.32607257743127305, 0.17392742256872692],
)
DTYPES = [torch.float32, torch.bfloat16]
LAYOUTS = ["first", "last"]


@dataclass(frozen=True, slots=True)
class Case:
    """One operator on one shape.

    Attributes:
        operator: "weighted_reduce", "channel_weighted_sum" or "shapley_head".
        pooling: the row of weighted_reduce; "nodes_4" for a shapley_head with four nodes of quadrature; else "".
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
        if self.pooling and self.operator == "shapley_head":
            row = f"shapley_head_{self.pooling}"
        return f"{row} {'x'.join(map(str, self.shape))} {str(self.dtype)[6:]} {self.layout}"

    def tensors(self, device: torch.device, seed: int = 0) -> list[Tensor]:
        """The tensor arguments of :meth:`ours` and :meth:`eager`."""
        generator = torch.Generator(device=device).manual_seed(seed)
        n, c, _ = self.shape
        count = 3 if self.operator == "weighted_reduce" else 1
        # Positive activations, as after a ReLU: rows that divide by their sum are ill-conditioned otherwise.
        made = [self._one(device, generator, positive=i == 0) for i in range(count)]
        draw = partial(torch.randn, generator=generator, device=device)
        if self.operator == "channel_weighted_sum":
            made.append(draw((n, 1, c)))
        if self.operator == "shapley_head":
            logits, weight, bias = draw((n, CLASSES)), draw((CLASSES, c)) / c**0.5, draw((CLASSES,)) * 0.1
            made += [t.to(self.dtype) for t in (logits, weight, bias)] + [logits.argmax(1, keepdim=True)]
        return made

    def ours(self, backend: str) -> Callable[..., Any]:
        """The operator, for :meth:`tensors`."""
        if self.operator == "weighted_reduce":
            return lambda a, g, h: ops.weighted_reduce(a, g, h, self.pooling, backend=backend)
        if self.operator == "channel_weighted_sum":
            return lambda a, alpha: ops.channel_weighted_sum(a, alpha, backend=backend)
        side = int(self.shape[2] ** 0.5)
        rule = {"nodes": NODES[0], "weights": NODES[1]} if self.pooling else {}
        return lambda a, z, w, b, c: ops.shapley_head(a, z, w, b, c, (side, side), (224, 224), backend=backend, **rule)[1]

    def eager(self) -> Callable[..., Tensor]:
        """The same in plain PyTorch."""
        if self.operator == "weighted_reduce":
            return partial(reference.weighted_reduce, pooling=self.pooling)
        if self.operator == "channel_weighted_sum":
            return reference.channel_weighted_sum
        side, positions = int(self.shape[2] ** 0.5), self.shape[2]

        def head(a: Tensor, z: Tensor, w: Tensor, b: Tensor, c: Tensor) -> Tensor:
            if self.pooling:
                rows = reference.quadrature_rows(z, c, b.expand_as(z), "rest", 1 / positions, *NODES)
            else:
                rows = reference.utility_rows(z, c, b, "rest", 2, 1 / positions)
            return reference.class_maps(a, rows @ w.to(rows.dtype), (side, side), (224, 224), True, None)[1]

        return head

    def _one(self, device: torch.device, generator: torch.Generator, positive: bool) -> Tensor:
        n, c, s = self.shape
        prefix = 1 if self.layout == "tokens" else 0
        shape = (n, c, s) if self.layout == "first" else (n, s + prefix, c)
        stored = torch.randn(shape, generator=generator, device=device)
        stored = (stored.abs_() if positive else stored).to(self.dtype)
        return stored if self.layout == "first" else stored[:, prefix:].transpose(1, 2)

    def bytes(self) -> int:
        """Bytes that must cross the memory bus: each input once, and the result."""
        n, c, s = self.shape
        inputs = 3 if self.operator == "weighted_reduce" else 1
        moved = inputs * n * c * s * self.dtype.itemsize + n * s * 4
        if self.operator == "channel_weighted_sum":
            moved += n * c * 4
        if self.operator == "shapley_head":
            moved += (CLASSES * c + n * CLASSES + CLASSES) * self.dtype.itemsize + n * 224 * 224 * 4
        return moved


def cases(device: str) -> list[Case]:
    """All cases for a device type: the cost is in "mean" and "elementwise"; the other rows run on one shape."""
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
    found += [Case("shapley_head", "", shape, dtype, "first") for shape in HEADS for dtype in DTYPES]
    found += [Case("shapley_head", "nodes_4", shape, torch.float32, "first") for shape in HEADS]
    return found
