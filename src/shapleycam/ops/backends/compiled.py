"""What the two halves of the compiled extension share: tensors become addresses, strides and codes."""

from __future__ import annotations

import functools
import importlib
from abc import abstractmethod
from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import BackendError
from ..colormaps import table_of
from ..shared import DTYPES, accumulator, unit_rows
from .base import Backend, BackendStatus, Call

Described = tuple[int, int, int, int, int]


@functools.cache
def native_module() -> ModuleType | ImportError:
    """The compiled extension, or the error that importing it gave."""
    try:
        module = importlib.import_module("shapleycam._native")
    except ImportError as error:
        return error
    if not hasattr(module, "poolings"):
        return ImportError(f"{module.__file__} belongs to an earlier version; install shapleycam again")
    return module


class Compiled(Backend):
    """A half of the extension: its functions end in ``suffix``."""

    suffix: ClassVar[str]

    def status(self) -> BackendStatus:
        module = native_module()
        if isinstance(module, ImportError):
            return BackendStatus(False, f"the compiled extension is missing ({module})")
        return self.status_of(module)

    @abstractmethod
    def status_of(self, module: ModuleType) -> BackendStatus:
        """The status where the extension is there."""

    def can(self, call: Call) -> str | None:
        refusal = super().can(call)
        if refusal is None and call.pooling is not None and call.pooling not in self._module.poolings:
            return f"it does not implement the pooling {call.pooling!r}"
        return refusal

    @abstractmethod
    def queue(self, tensor: Tensor) -> int:
        """The last argument of every function: how many threads, or which stream."""

    @functools.cached_property
    def _module(self) -> ModuleType:
        module = native_module()
        assert not isinstance(module, ImportError)  # can() said so
        return module

    @functools.cached_property
    def _functions(self) -> dict[str, Any]:
        ending = f"_{self.suffix}"
        return {name.removesuffix(ending): f for name, f in vars(self._module).items() if name.endswith(ending)}

    @functools.cached_property
    def _codes(self) -> dict[torch.dtype, int]:
        return {dtype: self._module.dtypes[str(dtype).removeprefix("torch.")] for dtype in (*DTYPES, torch.uint8)}

    def _describe(self, tensor: Tensor) -> Described:
        """(address, dtype, strides) of an [N, C, S] view."""
        n, c, s = tensor.stride()
        return tensor.data_ptr(), self._codes[tensor.dtype], n, c, s

    def _workspace(self, query: str, tensor: Tensor, *extents: int) -> tuple[Tensor | None, int]:
        """A workspace and its size in bytes; none where small extents need none."""
        size = self._functions[query](*extents)
        return torch.empty(size, dtype=torch.uint8, device=tensor.device) if size else None, size

    def _error(self, status: int, operator: str, *tensors: Tensor | None) -> BackendError:
        said = self._module.status_text(status)
        shapes = [(tuple(t.shape), str(t.dtype)) for t in tensors if t is not None]
        return BackendError(f"{operator} failed in the compiled extension: {said} (status {status}) for {shapes}.")

    def weighted_reduce(self, activations: Tensor, gradient: Tensor, hvp: Tensor | None, pooling: str, out: Tensor) -> None:
        """Fill ``out`` [N, S]."""
        n, c, s = activations.shape
        code = self._module.poolings[pooling]
        space, size = self._workspace("weighted_reduce_workspace", activations, n, c, s, code)
        status = self._functions["weighted_reduce"](
            self._describe(activations), self._describe(gradient), None if hvp is None else self._describe(hvp),
            n, c, s, code, out.data_ptr(), self._codes[out.dtype], 0 if space is None else space.data_ptr(), size,
            self.queue(activations),
        )  # fmt: skip
        if status:
            raise self._error(status, f"weighted_reduce ({pooling})", activations, gradient, hvp)

    def channel_weighted_sum(self, activations: Tensor, alpha: Tensor, out: Tensor) -> None:
        """Fill ``out`` [N, M, S]."""
        n, c, s = activations.shape
        m = alpha.shape[1]
        if alpha.dtype != out.dtype or not alpha.is_contiguous():  # asking is cheaper than a conversion to the same
            alpha = alpha.to(out.dtype).contiguous()
        space, size = self._workspace("channel_weighted_sum_workspace", activations, n, c, s, m)
        status = self._functions["channel_weighted_sum"](
            self._describe(activations), alpha.data_ptr(), n, c, s, m, out.data_ptr(), self._codes[out.dtype],
            0 if space is None else space.data_ptr(), size, self.queue(activations),
        )  # fmt: skip
        if status:
            raise self._error(status, "channel_weighted_sum", activations, alpha)

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
        targets = targets if targets.is_contiguous() else targets.contiguous()
        bias = bias if bias is None or bias.is_contiguous() else bias.contiguous()
        (n, k), m = logits.shape, targets.shape[1]
        at, code = (0, 0) if bias is None else (bias.data_ptr(), self._codes[bias.dtype])
        status = self._functions["utility_rows"](
            logits.data_ptr(), self._codes[logits.dtype], logits.stride(0), at, code, targets.data_ptr(), n, m, k,
            self._module.utilities[utility], order, scale, out.data_ptr(), self._codes[out.dtype], self.queue(logits),
        )  # fmt: skip
        if status:
            raise self._error(status, f"utility_rows ({utility})", logits, targets, bias)

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
        logits, start, targets = unit_rows(logits), None if start is None else unit_rows(start), targets.contiguous()
        (n, k), m = logits.shape, targets.shape[1]
        at, code, step = (0, 0, 0) if start is None else (start.data_ptr(), self._codes[start.dtype], start.stride(0))
        status = self._functions["quadrature_rows"](
            logits.data_ptr(), self._codes[logits.dtype], logits.stride(0), at, code, step, targets.data_ptr(), n, m, k,
            self._module.utilities[utility], nodes, weights, scale, out.data_ptr(), self._codes[out.dtype], self.queue(logits),
        )  # fmt: skip
        if status:
            raise self._error(status, f"quadrature_rows ({utility})", logits, targets, start)

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
        n, c, s = activations.shape
        m = alpha.shape[1]
        alpha = alpha.to(raw.dtype).contiguous()
        space, bytes_ = self._workspace("channel_weighted_sum_workspace", activations, n, c, s, m)
        status = self._functions["class_maps"](
            self._describe(activations), alpha.data_ptr(), n, c, m, _three(grid), _three(size), renormalize, raw.data_ptr(),
            self._codes[raw.dtype], maps.data_ptr(), self._codes[maps.dtype], 0 if space is None else space.data_ptr(), bytes_,
            self.queue(activations),
        )  # fmt: skip
        if status:
            raise self._error(status, "class_maps", activations, alpha)

    def display_map(self, raw: Tensor, size: Sequence[int], renormalize: bool, dtype: torch.dtype | None, out: Tensor) -> None:
        """Fill ``out`` [N, *size]."""
        raw = raw.to(accumulator(raw.dtype)).contiguous()  # small: the layer's own resolution
        status = self._functions["display_map"](
            raw.data_ptr(), self._codes[raw.dtype], raw.shape[0], _three(raw.shape[1:]), _three(size), renormalize,
            out.data_ptr(), self._codes[out.dtype], self.queue(raw),
        )  # fmt: skip
        if status:
            raise self._error(status, "display_map", raw, out)

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
        heatmaps = heatmaps.to(torch.float32).contiguous()
        table = table_of(colormap, images.device)
        n, _, height, width = images.shape
        status = self._functions["overlay"](
            images.data_ptr(), self._codes[images.dtype], n, height, width, images.stride(), heatmaps.data_ptr(),
            table.data_ptr(), alpha, mean, std, out.data_ptr(), self.queue(images),
        )  # fmt: skip
        if status:
            raise self._error(status, "overlay", images, heatmaps)


def _three(extents: Sequence[int]) -> tuple[int, int, int]:
    d, h, w = (1,) * (3 - len(extents)) + tuple(extents)
    return d, h, w
