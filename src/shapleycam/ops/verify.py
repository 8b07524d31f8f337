"""The operators' contract on this machine: every operator, dtype and layout of its backends against the reference in float64.

The package alone is needed. The fixed shapes have odd sizes, single channels and positions, empty batches and more than one
block of every kernel; more are drawn by a seeded generator, and one image has a NaN.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError, InputError, KernelMismatch
from .backends import LADDER, Backend, Call
from .channel_weighted_sum import OPERATOR as CHANNEL_WEIGHTED_SUM
from .checking import compare
from .class_maps import OPERATOR as CLASS_MAPS
from .colormaps import NAMES as COLORMAPS
from .display_map import OPERATOR as DISPLAY_MAP
from .operator import Operator
from .overlay import OPERATOR as OVERLAY
from .quadrature_rows import OPERATOR as QUADRATURE_ROWS
from .shared import DTYPES, POOLINGS, UTILITIES
from .utility_rows import OPERATOR as UTILITY_ROWS
from .weighted_reduce import OPERATOR as WEIGHTED_REDUCE

LAYOUTS = ("first", "last", "tokens", "misaligned", "strided")

Shape = tuple[int, int, int]
#: [N, C, S]; the interpreter of Triton has the first three alone.
QUICK: tuple[Shape, ...] = ((2, 37, 49), (3, 8, 1), (0, 3, 4), (2, 64, 16))
SHAPES: tuple[Shape, ...] = (*QUICK, (1, 1, 7), (9, 130, 3), (1, 5, 2500), (1, 1500, 5), (2, 96, 49), (1, 2048, 49))
#: What is timed.
TIMED: Shape = (8, 512, 196)

Arguments = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one operator did in one dtype on one backend.

    Attributes:
        device, backend: where.
        operator: its name, with the pooling of weighted_reduce.
        dtype: of the inputs.
        calls: how many were compared.
        worst: the largest error, as a part of what the contract allows; Inf for a NaN or Inf in the wrong place.
        where: the layout and shape of that error.
        seconds, reference: of one call, and of the reference in plain PyTorch; None where it was not timed.
        mistake: None, or what to say: the first result that was wrong, or that was not the same twice.
    """

    device: str
    backend: str
    operator: str
    dtype: torch.dtype
    calls: int
    worst: float
    where: str
    seconds: float | None
    reference: float | None
    mistake: str | None


def places(device: str = "auto", backend: str = "auto") -> list[tuple[torch.device, Backend]]:
    """The devices and backends to verify: all that have kernels here, or those that are named.

    Raises:
        InputError: the device is unknown or not there.
        BackendError: the backend is unknown or cannot serve, or nothing but the reference serves the devices.
    """
    if device == "auto":
        devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    else:
        try:
            devices = [torch.device(device)]
            torch.empty(1, device=devices[0])
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"The device {device!r} cannot be used: {error}") from error
    if backend != "auto" and backend not in LADDER.names:
        raise BackendError(f"{backend!r} is no backend: expected 'auto', {', '.join(map(repr, LADDER.names))}.")
    found, refusals = [], []
    for place in devices:
        for rung in LADDER:
            if rung.name != backend and (backend != "auto" or not rung.fused):
                continue
            refusal = rung.can(Call("weighted_reduce", place.type, torch.float32, "mean"))
            if refusal is None:
                found.append((place, rung))
            else:
                refusals.append(f"{rung.name} on {place}: {refusal}")
    if not found:
        raise BackendError(f"There are no kernels to verify ({'; '.join(refusals)}).")
    return found


def verify(device: torch.device, backend: Backend, quick: bool = False, seed: int = 0) -> Iterator[Finding]:
    """Verify one backend on one device; yields a finding per operator (and pooling) and dtype."""
    # The one backend that is here for tests needs seconds for a call.
    slow = not backend.volunteers(Call("weighted_reduce", device.type, torch.float32, "mean"))
    generator = torch.Generator().manual_seed(seed)
    drawn = [tuple(torch.randint(1, 70, (3,), generator=generator).tolist()) for _ in range(1 if quick else 6)]
    shapes = QUICK[:3] if slow else (*(QUICK if quick else SHAPES), *drawn)
    layouts = (LAYOUTS[:2] if slow else LAYOUTS[::2]) if quick or slow else LAYOUTS
    for name, operator, make in _operators():
        if backend.can(Call(operator.name, device.type, torch.float32, name if name in POOLINGS else None)):
            continue  # what a backend lacks, another serves
        for dtype in DTYPES:
            yield _one(device, backend, name, operator, make, dtype, shapes, layouts, generator, None if slow else quick)


def _one(
    device: torch.device,
    backend: Backend,
    name: str,
    operator: Operator,
    make: Callable[[_Draw, Shape], Iterator[Arguments]],
    dtype: torch.dtype,
    shapes: tuple[Any, ...],
    layouts: tuple[str, ...],
    generator: torch.Generator,
    quick: bool | None,
) -> Finding:
    calls, worst, where, mistake = 0, 0.0, "", None
    for index, shape in enumerate(shapes):
        for layout in layouts:
            draw = _Draw(device, dtype, layout, generator, with_nan=index == 0)
            for arguments in make(draw, shape):
                try:
                    out = backend.run(operator, arguments)
                    again = backend.run(operator, arguments)
                    error, said = compare(operator, backend.name, arguments, out)
                    if said is None and not _same(out, again):
                        said = KernelMismatch(f"{operator.name} on {backend.name!r} gave two results for one call, {shape}.")
                except BackendError as failure:  # a kernel that says that it failed
                    error, said = math.inf, KernelMismatch(str(failure))
                calls += 1
                if error > worst or said is not None:
                    worst, where = max(worst, error), f"{layout} {'×'.join(map(str, shape))}"
                if said is not None and mistake is None:
                    mistake = str(said)
    seconds = reference = None
    if quick is not None:
        draw = _Draw(device, dtype, "first", generator, with_nan=False)
        timed = next(make(draw, TIMED))
        rounds = 3 if quick else 7
        seconds = _time(lambda: backend.run(operator, timed), device, rounds)
        reference = _time(lambda: operator.reference(*timed), device, rounds)
    label = operator.name if name == operator.name else f"{operator.name} {name}"
    return Finding(str(device), backend.name, label, dtype, calls, worst, where, seconds, reference, mistake)


def _same(one: Any, other: Any) -> bool:
    pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and torch.equal(a.isnan(), b.isnan()) for a, b in pairs)


def _time(call: Callable[[], Any], device: torch.device, rounds: int) -> float:
    taken = []
    for _ in range(rounds + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])  # the first one warms up


class _Draw:
    """Random tensors of one dtype and layout."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, layout: str, generator: torch.Generator, with_nan: bool
    ) -> None:
        self.device, self.dtype, self.layout, self.generator, self.with_nan = device, dtype, layout, generator, with_nan

    def __call__(self, *shape: int, positive: bool = False, nan: bool = False, plain: bool = False) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float32)
        # Rows that divide by a sum of activations are ill-conditioned where it vanishes; ReLU features do not.
        values = (values.abs() + 0.1 if positive else values).to(self.dtype)
        if nan and self.with_nan and values.numel():
            values.view(-1)[-1] = float("nan")
        values = values.to(self.device)
        return values if plain else place(values, self.layout)


def place(values: Tensor, layout: str) -> Tensor:
    """``values`` [N, C, …] with the same values and shape in another layout of LAYOUTS; the memory between them is NaN."""
    if layout == "first":
        return values.contiguous()
    if layout == "last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    gap = 255 if values.dtype == torch.uint8 else float("nan")
    if layout == "tokens":  # two prefix tokens, skipped by stride arithmetic
        last = values.movedim(1, -1)
        stored = last.new_full((last.shape[0], last.shape[1] + 2, *last.shape[2:]), gap)
        stored[:, 2:] = last
        return stored[:, 2:].movedim(-1, 1)
    if layout == "misaligned":
        stored = values.new_full((values.numel() + 1,), gap)
        stored[1:] = values.flatten()
        return stored[1:].view(values.shape)
    back = values.permute(*reversed(range(values.ndim)))  # no unit stride at all
    stored = back.new_full((*back.shape, 2), gap)
    stored[..., 0] = back
    return stored[..., 0].permute(*reversed(range(values.ndim)))


def _operators() -> Iterator[tuple[str, Operator, Callable[[_Draw, Shape], Iterator[Arguments]]]]:
    """(name, operator, arguments for a shape) of everything that is verified."""
    for pooling in POOLINGS:
        yield pooling, WEIGHTED_REDUCE, _reduce_of(pooling)
    yield "channel_weighted_sum", CHANNEL_WEIGHTED_SUM, _sums
    yield "utility_rows", UTILITY_ROWS, _rows
    yield "quadrature_rows", QUADRATURE_ROWS, _integrals
    yield "class_maps", CLASS_MAPS, _maps
    yield "display_map", DISPLAY_MAP, _displays
    yield "overlay", OVERLAY, _overlays


def _reduce_of(pooling: str) -> Callable[[_Draw, Shape], Iterator[Arguments]]:
    def make(draw: _Draw, shape: Shape) -> Iterator[Arguments]:
        a, g, h = draw(*shape, positive=True, nan=True), draw(*shape), draw(*shape)
        yield a, g, h, pooling
        yield a, g[:, :, :1].expand_as(a), None, pooling

    return make


def _sums(draw: _Draw, shape: Shape) -> Iterator[Arguments]:
    n, c, s = shape
    for rows in (1, 3):
        yield draw(n, c, s, nan=True), draw(n, rows, c, plain=True)


def _rows(draw: _Draw, shape: Shape) -> Iterator[Arguments]:
    n, c, s = shape
    classes = c + s
    targets = torch.randint(-1, classes + 1, (n, 3), generator=draw.generator).to(draw.device)
    for order in (1, 2):
        for utility in UTILITIES:
            yield draw(n, classes, nan=True) * 3, targets, draw(1, classes, plain=True)[0], utility, order, 0.25


def _integrals(draw: _Draw, shape: Shape) -> Iterator[Arguments]:
    n, c, s = shape
    classes = c + s
    targets = torch.randint(-1, classes + 1, (n, 3), generator=draw.generator).to(draw.device)
    for utility, count in itertools.product(UTILITIES, (1, 4, 5)):
        nodes = torch.rand(count, generator=draw.generator).tolist()
        starts = (None, draw(1, classes, plain=True).expand(n, classes), draw(n, classes))
        yield draw(n, classes, nan=True) * 3, targets, starts[count % 3], utility, 0.25, nodes, [1 / count] * count


def _grid(positions: int) -> tuple[int, int]:
    height = next(h for h in range(math.isqrt(positions), 0, -1) if positions % h == 0)
    return height, positions // height


def _maps(draw: _Draw, shape: Shape) -> Iterator[Arguments]:
    n, c, s = shape
    grid = list(_grid(s))
    for dtype in (None, torch.float16, torch.uint8):
        yield draw(n, c, s, nan=True), draw(n, 2, c, plain=True), grid, [2 * grid[0] + 1, grid[1] + 3], True, dtype


def _displays(draw: _Draw, shape: Shape) -> Iterator[Arguments]:
    n, c, s = shape
    for renormalize, dtype in ((True, None), (False, None), (True, torch.float16), (True, torch.uint8)):
        yield draw(n, *_grid(s), nan=True), [c + 4, 33], renormalize, dtype
    yield draw(n, 2, *_grid(s)), [3, 7, 9], True, None


def _overlays(draw: _Draw, shape: Shape) -> Iterator[Arguments]:
    n, c, s = shape
    heat = draw(n, c, s, plain=True, nan=True).abs().float()
    images = draw(n, 3, c, s).abs()
    for i, colormap in enumerate(COLORMAPS):
        mean, std = (None, None) if i % 2 else ([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
        yield images, heat, colormap, 0.3, mean, std
    yield place((images.float().clamp(0, 1) * 255).to(torch.uint8), draw.layout), heat, "jet", 0.5, None, None
