"""What a backend is: whether it is there, whether it can take a call, and the call itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

if TYPE_CHECKING:
    from ..operator import Operator


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """What is known of one backend.

    Attributes:
        available: whether it can serve at least one device of this machine.
        reason: what it is, or why it is missing.
        devices: the device types it serves.
        operators: the operators that it implements; empty means all.
    """

    available: bool
    reason: str
    devices: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()


class Call(NamedTuple):
    """What a backend may decide by: everything but the values and the extents.

    Attributes:
        operator: such as "weighted_reduce".
        device: the type of the device, such as "cuda".
        dtype: of the first tensor, the activations.
        pooling: the row of weighted_reduce; None for the other operators.
    """

    operator: str
    device: str
    dtype: torch.dtype
    pooling: str | None = None


class Backend(ABC):
    """A rung of the ladder. A fused backend has one method per operator, ``operator(*arguments, out)``, which fills ``out``."""

    name: ClassVar[str]

    #: Whether its results come from kernels of its own, so that there is something to check against the reference.
    fused: ClassVar[bool] = True

    #: By the weight's dtype: from how many to how many rows channel_weighted_sum beats the library's product on a CPU.
    few_rows: ClassVar[Mapping[torch.dtype, tuple[int, int]]] = {}

    @abstractmethod
    def status(self) -> BackendStatus:
        """Whether it is there, what it is, or why it is missing."""

    def can(self, call: Call) -> str | None:
        """None, or why it cannot take the call. The answer is kept: it depends on the call and on this machine alone."""
        known = self.status()
        if not known.available:
            return known.reason
        if call.device not in known.devices:
            return f"it serves {', '.join(known.devices)} tensors only"
        if not hasattr(self, call.operator) or (known.operators and call.operator not in known.operators):
            return "it does not implement this operator"
        return None

    def volunteers(self, call: Call) -> bool:
        """Whether ``backend="auto"`` may choose it for a call that it can take."""
        return True

    def run(self, operator: Operator, arguments: tuple[Any, ...]) -> Any:
        """The result of the operator for checked arguments."""
        out = operator.empty(*arguments)
        parts = out if isinstance(out, tuple) else (out,)
        if parts[0].numel():
            getattr(self, operator.name)(*arguments, *parts)
        return out
