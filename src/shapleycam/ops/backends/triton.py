"""The Triton kernels (kernels/, installed as shapleycam.kernels)."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..colormaps import table_of
from ..shared import UTILITIES, accumulator, unit_rows
from .base import Backend, BackendStatus, Call
from .cuda import cuda_device_present


@functools.cache
def kernels_module() -> ModuleType | ImportError:
    """The Triton kernels, or the error that importing them gave."""
    try:
        return importlib.import_module("shapleycam.kernels")
    except ImportError as error:
        return error


def interpreting() -> bool:
    """Whether Triton was told to interpret its kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


class Triton(Backend):
    """Triton, compiled on a GPU, or interpreted on the CPU for tests."""

    name = "triton"

    def status(self) -> BackendStatus:
        module = kernels_module()
        if isinstance(module, ImportError):
            return BackendStatus(False, f"Triton cannot be imported ({module})")
        if interpreting():
            return BackendStatus(True, "Triton kernels, interpreted (slow, for tests)", ("cpu", "cuda"), module.OPERATORS)
        if not cuda_device_present():
            return BackendStatus(False, "torch sees no CUDA device, and TRITON_INTERPRET is not set")
        return BackendStatus(True, "Triton kernels", ("cuda",), module.OPERATORS)

    def can(self, call: Call) -> str | None:
        refusal = super().can(call)
        if refusal is None and call.pooling is not None and call.pooling not in self._kernels.POOLINGS:
            return f"it does not implement the pooling {call.pooling!r}"
        return refusal

    def volunteers(self, call: Call) -> bool:
        # The interpreter is a test tool: it serves only where it is named.
        return call.device != "cpu"

    @functools.cached_property
    def _kernels(self) -> ModuleType:
        module = kernels_module()
        assert not isinstance(module, ImportError)  # can() said so
        return module

    def weighted_reduce(self, activations: Tensor, gradient: Tensor, hvp: Tensor | None, pooling: str, out: Tensor) -> None:
        """Fill ``out`` [N, S]."""
        self._kernels.weighted_reduce(activations, gradient, hvp, pooling, out)

    def channel_weighted_sum(self, activations: Tensor, alpha: Tensor, out: Tensor) -> None:
        """Fill ``out`` [N, M, S]."""
        self._kernels.channel_weighted_sum(activations, alpha, out)

    def utility_rows(
        self,
        logits: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        utility: str,
        order: int,
        scale: float,
        out: Tensor,
    ) -> None:
        """Fill ``out`` [N, M, K]."""
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        bias = None if bias is None else bias.contiguous()
        self._kernels.utility_rows(logits, targets.contiguous(), bias, UTILITIES.index(utility), order, scale, out)

    def quadrature_rows(
        self,
        logits: Tensor,
        targets: Tensor,
        start: Tensor | None,
        utility: str,
        scale: float,
        nodes: Sequence[float],
        weights: Sequence[float],
        out: Tensor,
    ) -> None:
        """Fill ``out`` [N, M, K]."""
        logits, start = unit_rows(logits), None if start is None else unit_rows(start)
        self._kernels.quadrature_rows(logits, targets.contiguous(), start, UTILITIES.index(utility), scale, nodes, weights, out)

    def class_maps(
        self,
        activations: Tensor,
        alpha: Tensor,
        grid: Sequence[int],
        size: Sequence[int],
        renormalize: bool,
        dtype: torch.dtype | None,
        raw: Tensor,
        maps: Tensor,
    ) -> None:
        """Fill ``raw`` [N, M, S] and ``maps`` [N, M, *size]."""
        self._kernels.class_maps(activations, alpha, grid, renormalize, raw, maps)

    def display_map(self, raw: Tensor, size: Sequence[int], renormalize: bool, dtype: torch.dtype | None, out: Tensor) -> None:
        """Fill ``out`` [N, *size]."""
        self._kernels.display_map(raw.to(accumulator(raw.dtype)).contiguous(), renormalize, out)

    def overlay(
        self,
        images: Tensor,
        heatmaps: Tensor,
        colormap: str,
        alpha: float,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        out: Tensor,
    ) -> None:
        """Fill ``out`` uint8 [N, H, W, 3]."""
        table = table_of(colormap, images.device)
        self._kernels.overlay(images, heatmaps.to(torch.float32).contiguous(), table, alpha, mean, std, out)
