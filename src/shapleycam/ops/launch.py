"""Hands checked tensors to the compiled extension or to the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError
from .contract import DTYPES, POOLINGS, UTILITIES
from .ladder import kernels_module, native_module
from .reference import accumulator

# Order of the enum shapleycam_dtype in csrc/include/shapleycam.h.
_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3, torch.uint8: 4}
assert set(_CODES) == {*DTYPES, torch.uint8}

Described = tuple[int, int, int, int, int]


def _describe(tensor: Tensor) -> Described:
    """(address, dtype, strides) of an [N, C, S] view."""
    n, c, s = tensor.stride()
    return tensor.data_ptr(), _CODES[tensor.dtype], n, c, s


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


def _device(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device)


def _raise(status: int, operator: str, *tensors: Tensor | None) -> None:
    if status:
        module = native_module()
        said = "unknown" if isinstance(module, ImportError) else module.status_text(status)
        shapes = [(tuple(t.shape), str(t.dtype)) for t in tensors if t is not None]
        raise BackendError(f"{operator} failed in the compiled extension: {said} (status {status}) for {shapes}.")


def weighted_reduce(served: str, activations: Tensor, gradient: Tensor, hvp: Tensor | None, pooling: str, out: Tensor) -> None:
    """Fill ``out`` [N, S]."""
    if served == "triton":
        kernels = kernels_module()
        assert not isinstance(kernels, ImportError)
        kernels.weighted_reduce(activations, gradient, hvp, pooling, out)
        return
    module = native_module()
    assert not isinstance(module, ImportError)
    described = (_describe(activations), _describe(gradient), None if hvp is None else _describe(hvp))
    row = POOLINGS.index(pooling)
    n, c, s = activations.shape
    if served == "cuda":
        with _device(activations):
            size = module.weighted_reduce_workspace_cuda(n, c, s, row)
            space = torch.empty(size, dtype=torch.uint8, device=activations.device)
            status = module.weighted_reduce_cuda(
                *described,
                n,
                c,
                s,
                row,
                out.data_ptr(),
                _CODES[out.dtype],
                space.data_ptr(),
                size,
                _stream(activations),
            )
    else:
        threads = torch.get_num_threads()
        size = module.weighted_reduce_workspace_cpu(n, c, s, row)
        space = torch.empty(size, dtype=torch.uint8)
        status = module.weighted_reduce_cpu(
            *described, n, c, s, row, out.data_ptr(), _CODES[out.dtype], space.data_ptr(), size, threads
        )
    _raise(status, f"weighted_reduce ({pooling})", activations, gradient, hvp)


def channel_weighted_sum(served: str, activations: Tensor, alpha: Tensor, out: Tensor) -> None:
    """Fill ``out`` [N, M, S]."""
    if served == "triton":
        kernels = kernels_module()
        assert not isinstance(kernels, ImportError)
        kernels.channel_weighted_sum(activations, alpha, out)
        return
    module = native_module()
    assert not isinstance(module, ImportError)
    n, c, s = activations.shape
    m = alpha.shape[1]
    alpha = alpha.to(out.dtype).contiguous()
    if served == "cuda":
        with _device(activations):
            size = module.channel_weighted_sum_workspace_cuda(n, c, s, m)
            space = torch.empty(size, dtype=torch.uint8, device=activations.device)
            status = module.channel_weighted_sum_cuda(
                _describe(activations), alpha.data_ptr(), n, c, s, m, out.data_ptr(), _CODES[out.dtype], space.data_ptr(),
                size, _stream(activations),
            )  # fmt: skip
    else:
        threads = torch.get_num_threads()
        size = module.channel_weighted_sum_workspace_cpu(n, c, s, m)
        space = torch.empty(size, dtype=torch.uint8)
        status = module.channel_weighted_sum_cpu(
            _describe(activations), alpha.data_ptr(), n, c, s, m, out.data_ptr(), _CODES[out.dtype], space.data_ptr(), size,
            threads,
        )  # fmt: skip
    _raise(status, "channel_weighted_sum", activations, alpha)


def utility_rows(
    served: str, logits: Tensor, targets: Tensor, bias: Tensor | None, utility: str, order: int, scale: float, out: Tensor
) -> None:
    """Fill ``out`` [N, M, K]."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    targets = targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    if served == "triton":
        kernels = kernels_module()
        assert not isinstance(kernels, ImportError)
        kernels.utility_rows(logits, targets, bias, UTILITIES.index(utility), order, scale, out)
        return
    module = native_module()
    assert not isinstance(module, ImportError)
    (n, k), m = logits.shape, targets.shape[1]
    arguments = (
        logits.data_ptr(), _CODES[logits.dtype], logits.stride(0), 0 if bias is None else bias.data_ptr(),
        0 if bias is None else _CODES[bias.dtype], targets.data_ptr(), n, m, k, UTILITIES.index(utility), order, scale,
        out.data_ptr(), _CODES[out.dtype],
    )  # fmt: skip
    if served == "cuda":
        with _device(logits):
            status = module.utility_rows_cuda(*arguments, _stream(logits))
    else:
        status = module.utility_rows_cpu(*arguments, torch.get_num_threads())
    _raise(status, f"utility_rows ({utility})", logits, targets, bias)


def class_maps(
    served: str, activations: Tensor, alpha: Tensor, grid: Sequence[int], renormalize: bool, raw: Tensor, maps: Tensor
) -> None:
    """Fill ``raw`` [N, M, S] and ``maps`` [N, M, *size]."""
    if served == "triton":
        kernels = kernels_module()
        assert not isinstance(kernels, ImportError)
        kernels.class_maps(activations, alpha, grid, renormalize, raw, maps)
        return
    module = native_module()
    assert not isinstance(module, ImportError)
    n, c, s = activations.shape
    m = alpha.shape[1]
    alpha = alpha.to(raw.dtype).contiguous()
    on_cuda = served == "cuda"
    query = module.channel_weighted_sum_workspace_cuda if on_cuda else module.channel_weighted_sum_workspace_cpu
    size = query(n, c, s, m)
    space = torch.empty(size, dtype=torch.uint8, device=activations.device)
    arguments = (
        _describe(activations), alpha.data_ptr(), n, c, m, _three(grid), _three(maps.shape[2:]), renormalize, raw.data_ptr(),
        _CODES[raw.dtype], maps.data_ptr(), _CODES[maps.dtype], space.data_ptr(), size,
    )  # fmt: skip
    if on_cuda:
        with _device(activations):
            status = module.class_maps_cuda(*arguments, _stream(activations))
    else:
        status = module.class_maps_cpu(*arguments, torch.get_num_threads())
    _raise(status, "class_maps", activations, alpha)


def _three(extents: Sequence[int]) -> tuple[int, int, int]:
    d, h, w = (1,) * (3 - len(extents)) + tuple(extents)
    return d, h, w


def display_map(served: str, raw: Tensor, renormalize: bool, out: Tensor) -> None:
    """Fill ``out`` [N, *size]."""
    raw = raw.to(accumulator(raw.dtype)).contiguous()  # small: the layer's own resolution
    if served == "triton":
        kernels = kernels_module()
        assert not isinstance(kernels, ImportError)
        kernels.display_map(raw, renormalize, out)
        return
    module = native_module()
    assert not isinstance(module, ImportError)
    arguments = (
        raw.data_ptr(), _CODES[raw.dtype], raw.shape[0], _three(raw.shape[1:]), _three(out.shape[1:]), renormalize,
        out.data_ptr(), _CODES[out.dtype],
    )  # fmt: skip
    if served == "cuda":
        with _device(raw):
            status = module.display_map_cuda(*arguments, _stream(raw))
    else:
        status = module.display_map_cpu(*arguments, torch.get_num_threads())
    _raise(status, "display_map", raw, out)


def overlay(
    served: str,
    images: Tensor,
    heatmaps: Tensor,
    table: Tensor,
    alpha: float,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    out: Tensor,
) -> None:
    """Fill ``out`` uint8 [N, H, W, 3]."""
    heatmaps = heatmaps.to(torch.float32).contiguous()
    if served == "triton":
        kernels = kernels_module()
        assert not isinstance(kernels, ImportError)
        kernels.overlay(images, heatmaps, table, alpha, mean, std, out)
        return
    module = native_module()
    assert not isinstance(module, ImportError)
    n, _, height, width = images.shape
    arguments = (
        images.data_ptr(), _CODES[images.dtype], n, height, width, images.stride(), heatmaps.data_ptr(), table.data_ptr(),
        alpha, mean, std, out.data_ptr(),
    )  # fmt: skip
    if served == "cuda":
        with _device(images):
            status = module.overlay_cuda(*arguments, _stream(images))
    else:
        status = module.overlay_cpu(*arguments, torch.get_num_threads())
    _raise(status, "overlay", images, heatmaps)
