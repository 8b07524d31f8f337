"""shapleycam: Shapley-value-based class activation maps at the price of a prediction (arXiv 2501.06261).

The names below are imported when they are first asked for, so that ``shapleycam --help`` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:  # for type checkers and editors; a test compares it with _HOMES
    from .errors import (
        BackendError,
        DerivativeError,
        ExportError,
        InputError,
        JobError,
        KernelMismatch,
        LayerError,
        ModelStateError,
        ShapleyCamError,
        ShapleyCamWarning,
        TargetError,
    )
    from .explainer import Explainer
    from .explanation import Diagnostics, Explanation
    from .methods.table import METHODS, Method
    from .model.layouts import Layout, ReshapeTransform
    from .ops import BackendStatus, backends
    from .program import Explained, Program
    from .utilities.named import UTILITIES, Utility

_HOMES = {
    "METHODS": "methods.table",
    "UTILITIES": "utilities.named",
    "BackendError": "errors",
    "BackendStatus": "ops",
    "DerivativeError": "errors",
    "Diagnostics": "explanation",
    "Explained": "program",
    "Explainer": "explainer",
    "Explanation": "explanation",
    "ExportError": "errors",
    "InputError": "errors",
    "JobError": "errors",
    "KernelMismatch": "errors",
    "LayerError": "errors",
    "Layout": "model.layouts",
    "Method": "methods.table",
    "ModelStateError": "errors",
    "Program": "program",
    "ReshapeTransform": "model.layouts",
    "ShapleyCamError": "errors",
    "ShapleyCamWarning": "errors",
    "TargetError": "errors",
    "Utility": "utilities.named",
    "backends": "ops",
}
#: Reached as attributes too: ``import shapleycam; shapleycam.ops.weighted_reduce``. They need torch alone.
_MODULES = ("derivatives", "errors", "explainer", "explanation", "export", "methods", "model", "ops", "plan", "utilities")

__all__ = [
    "METHODS",
    "UTILITIES",
    "BackendError",
    "BackendStatus",
    "DerivativeError",
    "Diagnostics",
    "Explained",
    "Explainer",
    "Explanation",
    "ExportError",
    "InputError",
    "JobError",
    "KernelMismatch",
    "LayerError",
    "Layout",
    "Method",
    "ModelStateError",
    "Program",
    "ReshapeTransform",
    "ShapleyCamError",
    "ShapleyCamWarning",
    "TargetError",
    "Utility",
    "__version__",
    "backends",
]

if not TYPE_CHECKING:  # or no checker would find a misspelt name

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f".{name}", __name__)
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = found  # asked for once
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
