"""The C++ kernels for CPUs (csrc/cpu)."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from .base import BackendStatus
from .compiled import Compiled


class Native(Compiled):
    """C++ in the compiled extension, with the threads of PyTorch."""

    name = "native"
    suffix = "cpu"

    # Measured beside the library's product on two cores, with W [1000, 768 to 2048] out of cache. AVX-512: 1.5 to 3 times as
    # fast with halves, which the library takes widened, 1.1 to 1.8 with 2 to 4 rows of float32, no faster with one. AVX2: the
    # gain ends near 8 rows.
    few_rows: ClassVar[Mapping[torch.dtype, tuple[int, int]]] = {
        torch.float32: (2, 4),
        torch.float16: (1, 8),
        torch.bfloat16: (1, 8),
    }

    def status_of(self, module: ModuleType) -> BackendStatus:
        return BackendStatus(True, f"compiled C++ kernels ({module.cpu_variant()})", ("cpu",), tuple(module.cpu_operators))

    def queue(self, tensor: Tensor) -> int:
        return torch.get_num_threads()
