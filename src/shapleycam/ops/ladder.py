"""The ladder of backends: cuda, triton, native, torch; the first that can serve a call does.

An explicit choice (``backend=`` or the environment variable SHAPLEYCAM_BACKEND) never falls back: it serves or raises.
Nothing here is imported before it is needed, and asking what is available does not initialise CUDA.
"""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..errors import BackendError

ORDER = ("cuda", "triton", "native", "torch")
VARIABLE = "SHAPLEYCAM_BACKEND"


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """What is known of one backend.

    Attributes:
        available: whether it can serve at least one device of this machine.
        reason: what it is, or why it is missing.
        devices: the device types it serves.
        operators: "operator" or "operator:pooling" that it implements; empty means all.
    """

    available: bool
    reason: str
    devices: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()

    def implements(self, operator: str, pooling: str | None) -> bool:
        return not self.operators or operator in self.operators or f"{operator}:{pooling}" in self.operators


@functools.cache
def native_module() -> ModuleType | ImportError:
    """The compiled extension, or the error that importing it gave."""
    try:
        return importlib.import_module("shapleycam._native")
    except ImportError as error:
        return error


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


@functools.cache
def _cuda_device_present() -> bool:
    # The driver's own count: no context is created.
    return torch.cuda.is_available()


def _cuda_status() -> BackendStatus:
    module = native_module()
    if isinstance(module, ImportError):
        return BackendStatus(False, f"the compiled extension is missing ({module})")
    if not module.has_cuda:
        return BackendStatus(False, "the extension was built without CUDA: no nvcc was found, or SHAPLEYCAM_BUILD=cpu")
    if not _cuda_device_present():
        return BackendStatus(False, "torch sees no CUDA device on this machine")
    return BackendStatus(True, "compiled CUDA kernels", ("cuda",), tuple(module.cuda_operators))


def _triton_status() -> BackendStatus:
    module = kernels_module()
    if isinstance(module, ImportError):
        return BackendStatus(False, f"Triton cannot be imported ({module})")
    if interpreting():
        return BackendStatus(True, "Triton kernels, interpreted (slow, for tests)", ("cpu", "cuda"), module.OPERATORS)
    if not _cuda_device_present():
        return BackendStatus(False, "torch sees no CUDA device, and TRITON_INTERPRET is not set")
    return BackendStatus(True, "Triton kernels", ("cuda",), module.OPERATORS)


def _native_status() -> BackendStatus:
    module = native_module()
    if isinstance(module, ImportError):
        return BackendStatus(False, f"the compiled extension is missing ({module})")
    return BackendStatus(True, f"compiled C++ kernels ({module.cpu_variant()})", ("cpu",), tuple(module.cpu_operators))


def status(name: str) -> BackendStatus:
    """What is known of the backend ``name``."""
    if name == "cuda":
        return _cuda_status()
    if name == "triton":
        return _triton_status()
    if name == "native":
        return _native_status()
    return BackendStatus(True, f"PyTorch {torch.__version__}", ("cpu", "cuda", "any"))


def backends() -> dict[str, BackendStatus]:
    """Every backend in the order of the ladder: whether it is available here, and why not."""
    return {name: status(name) for name in ORDER}


def select(operator: str, *tensors: Tensor | None, pooling: str | None = None, backend: str = "auto") -> str:
    """The name of the backend that would serve ``operator`` for these tensors.

    Args:
        operator: "weighted_reduce", "channel_weighted_sum", "display_map" or "overlay".
        tensors: the arguments; the first decides the device.
        pooling: the row of ``weighted_reduce``.
        backend: "auto" (the environment variable SHAPLEYCAM_BACKEND, else the ladder), or a name.

    Raises:
        BackendError: an explicit choice is unknown or cannot serve the call; the message says why.
    """
    explicit, source = backend, "backend="
    if backend == "auto":
        explicit, source = os.environ.get(VARIABLE, "auto") or "auto", f"{VARIABLE}="
    first = tensors[0]
    assert first is not None
    device = first.device.type
    if explicit != "auto":
        if explicit not in ORDER:
            raise BackendError(f"{source}{explicit!r} is no backend: expected 'auto', {', '.join(map(repr, ORDER))}.")
        refusal = _refusal(explicit, operator, device, pooling)
        if refusal:
            raise BackendError(
                f"{source}{explicit!r} cannot serve {operator}{f' ({pooling})' if pooling else ''} on {device}: {refusal}. "
                "Use backend='auto', or see `shapleycam info`."
            )
        return explicit
    for name in _candidates(device):
        if _refusal(name, operator, device, pooling) is None:
            return name
    return "torch"


def _candidates(device: str) -> tuple[str, ...]:
    if device == "cuda":
        return ("cuda", "triton")
    # The interpreter is a test tool: it serves only where it is named.
    return ("native",) if device == "cpu" else ()


def _refusal(name: str, operator: str, device: str, pooling: str | None) -> str | None:
    if name == "torch":
        return None
    known = status(name)
    if not known.available:
        return known.reason
    if device not in known.devices:
        return f"it serves {', '.join(known.devices)} tensors only"
    if not known.implements(operator, pooling):
        return "it does not implement this row"
    return None
