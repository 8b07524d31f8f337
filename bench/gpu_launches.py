"""Which CUDA kernels a call launches, and how: asked of the launchers themselves (csrc/cuda), not computed a second time.

The launchers are compiled by the C++ compiler against the emulator of tests/ops/cuda_on_cpu, in which a launch is only written
down. Needs g++ (or $CXX) and nm; no GPU, no nvcc, no memory for the arguments.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .cases import CLASSES, NODES, Case
from .resources import ROOT, SOURCES, readable

#: shapleycam_dtype of csrc/include/shapleycam.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
#: shapleycam_pooling.
POOLINGS = ("mean", "elementwise", "elementwise_relu", "activation", "positive_gradient", "plusplus")
SIDE = 224


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel by its readable name, the blocks of its grid, threads of a block, and bytes of dynamic shared memory."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int

    @property
    def blocks(self) -> int:
        x, y, z = self.grid
        return x * y * z


class _View(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("stride_n", ctypes.c_int64),
        ("stride_c", ctypes.c_int64),
        ("stride_s", ctypes.c_int64),
    )


def _kernels(library: Path) -> dict[int, str]:
    """Where the code of every kernel is in the library, by readable names."""
    listed = subprocess.run(["nm", str(library)], capture_output=True, text=True, check=True).stdout
    found = {parts[2]: int(parts[0], 16) for line in listed.splitlines() if len(parts := line.split()) == 3}
    names = readable(list(found))
    return {at: names[symbol] for symbol, at in found.items()}


class Launchers:
    """The launchers of csrc/cuda in a library at ``path``; see :func:`launchers`."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._kernels = _kernels(path)
        self._places = 0
        for name in ("weighted_reduce_workspace", "channel_weighted_sum_workspace"):
            getattr(self._library, f"shapleycam_{name}_cuda").restype = ctypes.c_size_t

    def of(self, case: Case) -> list[list[Launch]]:
        """The launches of every operator that the case calls, in order; the library's matrix product is not among them."""
        n, _, s = case.shape
        if case.operator == "weighted_reduce":
            return [self._reduce(case)]
        if case.operator == "channel_weighted_sum":
            return [self._sum(case)]
        if case.pooling:
            return [self._quadrature(case), self._maps(case)]
        rows = self._logged(
            "utility_rows", self._place(), DTYPES[case.dtype], i64(CLASSES), self._place(), DTYPES[case.dtype], self._place(),
            i64(n), i64(1), i64(CLASSES), 3, 2, ctypes.c_double(1 / s), self._place(), 0, None,
        )  # fmt: skip
        return [rows, self._maps(case)]

    def _reduce(self, case: Case) -> list[Launch]:
        n, c, s = case.shape
        views = [ctypes.byref(self._view(case)) for _ in range(3)]
        extents, pooling = (i64(n), i64(c), i64(s)), POOLINGS.index(case.pooling)
        size = self._library.shapleycam_weighted_reduce_workspace_cuda(*extents, pooling)
        return self._logged(
            "weighted_reduce", *views, *extents, pooling, self._place(), 0, self._place(), ctypes.c_size_t(size), None
        )

    def _quadrature(self, case: Case) -> list[Launch]:
        n, _, s = case.shape
        nodes, weights = ((ctypes.c_double * len(part))(*part) for part in NODES)
        return self._logged(
            "quadrature_rows", self._place(), DTYPES[case.dtype], i64(CLASSES), self._place(), DTYPES[case.dtype], i64(0),
            self._place(), i64(n), i64(1), i64(CLASSES), 3, nodes, weights, len(NODES[0]), ctypes.c_double(1 / s),
            self._place(), 0, None,
        )  # fmt: skip

    def _sum(self, case: Case) -> list[Launch]:
        extents = (*map(i64, case.shape), i64(1))
        size = self._library.shapleycam_channel_weighted_sum_workspace_cuda(*extents)
        return self._logged(
            "channel_weighted_sum", ctypes.byref(self._view(case)), self._place(), *extents, self._place(), 0, self._place(),
            ctypes.c_size_t(size), None,
        )  # fmt: skip

    def _maps(self, case: Case) -> list[Launch]:
        n, c, s = case.shape
        side = int(s**0.5)
        three = ctypes.c_int64 * 3
        size = self._library.shapleycam_channel_weighted_sum_workspace_cuda(i64(n), i64(c), i64(s), i64(1))
        return self._logged(
            "class_maps", ctypes.byref(self._view(case)), self._place(), i64(n), i64(c), i64(1), three(1, side, side),
            three(1, SIDE, SIDE), 1, self._place(), 0, self._place(), 0, self._place(), ctypes.c_size_t(size), None,
        )  # fmt: skip

    def _place(self) -> ctypes.c_void_p:
        """An address as an allocator would give it, with nothing there."""
        self._places += 1
        return ctypes.c_void_p(self._places << 40)

    def _view(self, case: Case) -> _View:
        _, c, s = case.shape
        at = self._place().value or 0
        if case.layout == "first":
            return _View(at, DTYPES[case.dtype], c * s, s, 1)
        skipped = 1 if case.layout == "tokens" else 0
        return _View(at + skipped * c * case.dtype.itemsize, DTYPES[case.dtype], (s + skipped) * c, 1, c)

    def _logged(self, operator: str, *arguments: object) -> list[Launch]:
        self.dry(True)
        status = getattr(self._library, f"shapleycam_{operator}_cuda")(*arguments)
        launches = self.logged()
        if status:
            raise RuntimeError(f"{operator} refuses the call with status {status}.")
        return launches

    def dry(self, dry: bool) -> None:
        """Whether launches are only logged; empties the log."""
        self._library.cuda_on_cpu_dry(int(dry))

    def logged(self) -> list[Launch]:
        """What has been launched since the log was emptied."""
        rows = (ctypes.c_int64 * (6 * 64))()
        count = int(self._library.cuda_on_cpu_launches(rows, i64(64)))
        found = [rows[6 * i : 6 * i + 6] for i in range(count)]
        return [Launch(self._kernels[at], (x, y, z), threads, shared) for at, x, y, z, threads, shared in found]


def i64(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


@contextmanager
def launchers() -> Iterator[Launchers]:
    """The launchers as they are in csrc/cuda now, compiled into a temporary folder."""
    emulator = ROOT / "tests" / "ops" / "cuda_on_cpu"
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "launchers.so"
        command = [compiler, "-std=c++17", "-O0", "-shared", "-fPIC", "-w", f"-I{emulator}", f"-I{ROOT / 'csrc' / 'include'}"]
        sources = [*(ROOT / "csrc" / "cuda" / name for name in SOURCES), emulator / "launches.cpp"]
        done = subprocess.run([*command, "-o", str(library), "-xc++", *map(str, sources)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"The launchers do not compile with {compiler}:\n{done.stderr}")
        yield Launchers(library)
