"""The one family of errors that shapleycam raises on purpose.

Every message names the value that was wrong, what was expected, and what to do. The subclasses also inherit from the
built-in error a Python user would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations


class ShapleyCamError(Exception):
    """Base class of every error that shapleycam raises on purpose."""


class InputError(ShapleyCamError, ValueError):
    """Images or operator arguments have the wrong rank, shape, dtype or device."""


class TargetError(ShapleyCamError, ValueError):
    """The explained class is out of range, or the targets have the wrong length, rank or dtype."""


class LayerError(ShapleyCamError, ValueError):
    """The target layer cannot be found, is not reached, is reached twice, or has an unknown layout."""


class ModelStateError(ShapleyCamError, RuntimeError):
    """The model is in a state in which an explanation would be wrong (training mode, compiled, …)."""


class DerivativeError(ShapleyCamError, RuntimeError):
    """The requested derivatives cannot be computed: no path from the layer to the target, missing operator, …"""


class BackendError(ShapleyCamError, RuntimeError):
    """An operator backend that was named explicitly cannot serve the call."""


class ExportError(ShapleyCamError, RuntimeError):
    """The explanation cannot be made into a program or a file: an unsupported head, method or engine, or a wrong result."""


class JobError(ShapleyCamError, RuntimeError):
    """A data-set job cannot go on (a full disk, workers that keep dying). What is done is kept; the same call resumes it."""


class KernelMismatch(ShapleyCamError, RuntimeError):
    """A fused operator's result differs from the reference's by more than the tolerance (:class:`shapleycam.ops.checking`).

    Attributes:
        operator, backend: which kernel.
        index: of the worst element of the result.
        got, expected: its value, and the reference's in float64.
    """

    operator: str = ""
    backend: str = ""
    index: tuple[int, ...] = ()
    got: float = float("nan")
    expected: float = float("nan")


class ShapleyCamWarning(UserWarning):
    """Category of every warning that shapleycam gives."""
