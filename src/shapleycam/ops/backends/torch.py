"""The reference in plain PyTorch: the last rung, which serves every device and every call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .base import Backend, BackendStatus, Call

if TYPE_CHECKING:
    from ..operator import Operator


class Torch(Backend):
    """Every operator's reference twin."""

    name = "torch"
    fused = False

    def status(self) -> BackendStatus:
        return BackendStatus(True, f"PyTorch {torch.__version__}", ("cpu", "cuda", "any"))

    def can(self, call: Call) -> str | None:
        return None

    def run(self, operator: Operator, arguments: tuple[Any, ...]) -> Any:
        return operator.reference(*arguments)
