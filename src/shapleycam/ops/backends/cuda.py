"""The CUDA kernels of the compiled extension (csrc/cuda)."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import BackendStatus
from .compiled import Compiled

if TYPE_CHECKING:
    from ..operator import Operator


@functools.cache
def cuda_device_present() -> bool:
    """Whether torch sees a CUDA device: the driver's own count, no context is created."""
    return torch.cuda.is_available()


class Cuda(Compiled):
    """CUDA in the compiled extension, on PyTorch's current stream."""

    name = "cuda"
    suffix = "cuda"

    def status_of(self, module: ModuleType) -> BackendStatus:
        if not module.has_cuda:
            return BackendStatus(False, "the extension was built without CUDA: no nvcc was found, or SHAPLEYCAM_BUILD=cpu")
        if not cuda_device_present():
            return BackendStatus(False, "torch sees no CUDA device on this machine")
        return BackendStatus(True, "compiled CUDA kernels", ("cuda",), tuple(module.cuda_operators))

    def queue(self, tensor: Tensor) -> int:
        return torch.cuda.current_stream(tensor.device).cuda_stream

    def run(self, operator: Operator, arguments: tuple[Any, ...]) -> Any:
        with torch.cuda.device(arguments[0].device):
            return super().run(operator, arguments)
