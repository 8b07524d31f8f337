"""shapleycam: Shapley-value-based class activation maps at the price of a prediction (arXiv 2501.06261)."""

from .errors import (
    BackendError,
    DerivativeError,
    InputError,
    LayerError,
    ModelStateError,
    ShapleyCamError,
    ShapleyCamWarning,
    TargetError,
)
from .explainer import Explainer
from .explanation import Diagnostics, Explanation
from .layouts import Layout
from .methods import METHODS, Method
from .ops import BackendStatus, backends
from .utilities import UTILITIES, Utility

__version__ = "0.1.0"

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
