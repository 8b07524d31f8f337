"""Compiles every variant of every Triton kernel for GPUs that are not here; run by test_compile_offline.py, and by hand:

    python -m tests.kernels.compile_offline sm_80 | sm_90 | sm_100 | gfx942

The launchers of kernels/ run on meta tensors, with a stand-in driver that names the target, and every launch compiles to
machine code and stops there: the variants are those that the launchers ask for. Prints one line of JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: What a compiled kernel holds in the end.
BINARIES = {"cuda": "cubin", "hip": "hsaco"}

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
#: [N, C, S] and layout. Triton specialises on extents and strides that are 1, that 16 divides, and that need 64 bits, and on
#: pointers that are aligned to 16 bytes ("tokens" skips a first token of 74 bytes, so these are not).
VIEWS = {
    "first": ((2, 256, 784), "first"),
    "last": ((2, 256, 784), "last"),
    "dense": ((2, 2048, 49), "first"),
    "dense last": ((2, 2048, 49), "last"),
    "odd first": ((3, 33, 49), "first"),
    "odd last": ((3, 33, 49), "last"),
    "tokens": ((2, 37, 196), "tokens"),
    "one position": ((2, 64, 1), "first"),
    "one channel": ((2, 1, 49), "first"),
    "huge": ((2, 1 << 12, 1 << 20), "first"),
    "huge last": ((2, 1 << 12, 1 << 20), "last"),
}
#: One for each way of cutting the activations into tiles.
KINDS = ("first", "last", "dense", "dense last")


class Driver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def stand_in(view: str, dtype: torch.dtype) -> Tensor:
    """A meta tensor [N, C, S] of a view."""
    (n, c, s), layout = VIEWS[view]
    if layout == "first":
        return torch.empty(n, c, s, dtype=dtype, device="meta")
    skipped = 1 if layout == "tokens" else 0
    return torch.empty(n, s + skipped, c, dtype=dtype, device="meta")[:, skipped:].transpose(1, 2)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    """(operator, a call of its launcher), over what the launchers distinguish."""
    from shapleycam import kernels
    from shapleycam.ops.shared import POOLINGS, UTILITIES

    def reduce(view: str, dtype: torch.dtype, other: torch.dtype, pooling: str, second: bool) -> None:
        a, g = stand_in(view, dtype), stand_in(view, other)
        out = empty(a.shape[0], a.shape[2], dtype=accumulator(dtype))
        kernels.weighted_reduce(a, g, stand_in(view, other) if second else None, pooling, out)

    def weighted_sum(view: str, dtype: torch.dtype, classes: int) -> None:
        a = stand_in(view, dtype)
        (n, c, s), acc = a.shape, accumulator(dtype)
        kernels.channel_weighted_sum(a, empty(n, classes, c, dtype=acc), empty(n, classes, s, dtype=acc))

    def rows(dtype: torch.dtype, k: int, classes: int, biased: bool, utility: int, order: int) -> None:
        targets, out = empty(2, classes, dtype=torch.int64), empty(2, classes, k, dtype=accumulator(dtype))
        bias = empty(k, dtype=dtype) if biased else None
        kernels.utility_rows(empty(2, k, dtype=dtype), targets, bias, utility, order, 0.5, out)

    def integrals(dtype: torch.dtype, k: int, classes: int, start: str, utility: str, count: int) -> None:
        targets, out = empty(2, classes, dtype=torch.int64), empty(2, classes, k, dtype=accumulator(dtype))
        base = {"zero": None, "bias": empty(1, k, dtype=dtype).expand(2, k), "base": empty(2, k, dtype=dtype)}[start]
        rule, code = [1 / count] * count, UTILITIES.index(utility)
        kernels.quadrature_rows(empty(2, k, dtype=dtype), targets, base, code, 0.5, rule, rule, out)

    def maps(view: str, dtype: torch.dtype, out: torch.dtype | None, renormalize: bool, deep: bool, classes: int) -> None:
        a = stand_in(view, dtype)
        (n, c, s), acc = a.shape, accumulator(dtype)
        size = (8, 32, 32) if deep else (224, 224)
        raw, made = empty(n, classes, s, dtype=acc), empty(n, classes, *size, dtype=out or acc)
        grid = (1, 1, s) if deep else (1, s)
        kernels.class_maps(a, empty(n, classes, c, dtype=acc), grid, renormalize, raw, made)

    def display(
        dtype: torch.dtype, out: torch.dtype | None, renormalize: bool, grid: tuple[int, ...], size: tuple[int, ...]
    ) -> None:
        kernels.display_map(empty(2, *grid, dtype=dtype), renormalize, empty(2, *size, dtype=out or dtype))

    def overlay(dtype: torch.dtype, last: bool, side: int) -> None:
        images = empty(2, side, side, 3, dtype=dtype).permute(0, 3, 1, 2) if last else empty(2, 3, side, side, dtype=dtype)
        out = empty(2, side, side, 3, dtype=torch.uint8)
        kernels.overlay(images, empty(2, side, side), empty(256, 3, dtype=torch.uint8), 0.5, None, None, out)

    yes_no = (False, True)
    outs = (None, torch.float16, torch.uint8)
    for pooling, second, dtype, view in itertools.product(POOLINGS, yes_no, FLOATS, KINDS):
        yield "weighted_reduce", lambda: reduce(view, dtype, dtype, pooling, second)
    for view in VIEWS:
        yield "weighted_reduce", lambda: reduce(view, torch.bfloat16, torch.bfloat16, "plusplus", True)
    yield "weighted_reduce", lambda: reduce("last", torch.float16, torch.float32, "mean", True)
    for dtype, view in itertools.product(FLOATS, KINDS):
        yield "channel_weighted_sum", lambda: weighted_sum(view, dtype, 1)
    for view in VIEWS:
        yield "channel_weighted_sum", lambda: weighted_sum(view, torch.bfloat16, 5)
    for utility, order, biased in itertools.product(range(len(UTILITIES)), (1, 2), yes_no):
        yield "utility_rows", lambda: rows(torch.float32, 1000, 1, biased, utility, order)
    for dtype, (k, classes) in itertools.product(FLOATS, ((1000, 5), (1024, 16), (7, 1))):
        yield "utility_rows", lambda: rows(dtype, k, classes, True, UTILITIES.index("rest"), 2)
    for utility, start in itertools.product(UTILITIES, ("zero", "bias", "base")):
        yield "quadrature_rows", lambda: integrals(torch.float32, 1000, 1, start, utility, 4)
    for dtype, count in itertools.product(FLOATS, (1, 2, 4, 8, 16, 32)):
        yield "quadrature_rows", lambda: integrals(dtype, 1000, 1, "bias", "rest", count)
    for dtype, (k, classes) in itertools.product(FLOATS, ((1024, 16), (7, 1))):
        yield "quadrature_rows", lambda: integrals(dtype, k, classes, "base", "probability", 3)
    for dtype, view in itertools.product(FLOATS, ("odd first", "odd last")):
        yield "class_maps", lambda: maps(view, dtype, None, True, False, 1)
    for out, renormalize, deep in itertools.product(outs, yes_no, yes_no):
        yield "class_maps", lambda: maps("odd first", torch.float32, out, renormalize, deep, 5)
    for view in ("dense", "tokens", "one position", "one channel"):
        yield "class_maps", lambda: maps(view, torch.bfloat16, None, True, False, 1000)
    shapes = (((7, 7), (224, 224)), ((4, 7, 7), (16, 112, 112)))
    for dtype, out, renormalize, (grid, size) in itertools.product(FLOATS[:2], outs, yes_no, shapes):
        yield "display_map", lambda: display(dtype, out, renormalize, grid, size)
    yield "display_map", lambda: display(torch.float32, None, True, (9,), (31,))
    for dtype, last in itertools.product((*FLOATS, torch.uint8), yes_no):
        yield "overlay", lambda: overlay(dtype, last, 224)
    yield "overlay", lambda: overlay(torch.float32, False, 33)


def compile_for(name: str, every: int = 1) -> dict[str, object]:
    """Compile every variant for one target, or one call in so many; numbers of calls and of different binaries, by operator."""
    target = TARGETS[name]
    triton.runtime.driver.set_active(Driver(target))
    made: dict[str, str] = {}
    asked: Counter[str] = Counter()
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> object:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if not kernel.asm.get(BINARIES[target.backend]):
            raise AssertionError(f"{self.fn.__module__}: no {BINARIES[target.backend]} for {name}")
        made[kernel.hash] = self.fn.__module__.rpartition(".")[2]
        return kernel

    started = time.perf_counter()
    JITFunction.run = compile_only
    for operator, call in itertools.islice(calls(), 0, None, every):
        asked[operator] += 1
        call()
    seconds = round(time.perf_counter() - started, 1)
    return {"target": name, "calls": dict(asked), "variants": dict(Counter(made.values())), "seconds": seconds}


def main(names: list[str]) -> None:
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("TRITON_INTERPRET is set: the kernels would be interpreted, not compiled. Unset it.")
    # One target to a process: a kernel keeps the compiler of its first one.
    if not 1 <= len(names) <= 2 or names[0] not in TARGETS or not all(step.isdigit() and int(step) for step in names[1:]):
        sys.exit(f"One target is needed, of: {', '.join(TARGETS)}; and perhaps a number: only one call in so many.")
    print(json.dumps(compile_for(names[0], *map(int, names[1:]))))


if __name__ == "__main__":
    main(sys.argv[1:])
