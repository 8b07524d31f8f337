"""shapleycam: Shapley-value-based class activation maps at the price of a prediction (arXiv 2501.06261)."""

from ._version import __version__
from .errors import (
    BackendError,
    DerivativeError,
    InputError,
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
from .model.layouts import Layout
from .ops import BackendStatus, backends
from .utilities.named import UTILITIES, Utility

__all__ = [
    "METHODS",
    "UTILITIES",
    "BackendError",
    "BackendStatus",
    "DerivativeError",
    "Diagnostics",
    "Explainer",
    "Explanation",
    "InputError",
    "KernelMismatch",
    "LayerError",
    "Layout",
    "Method",
    "ModelStateError",
    "ShapleyCamError",
    "ShapleyCamWarning",
    "TargetError",
    "Utility",
    "__version__",
    "backends",
]
