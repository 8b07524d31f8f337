"""How good maps are: the public name of :mod:`shapleycam.evaluate.metrics`."""

from typing import Any

from ..evaluate import metrics as _metrics
from ..evaluate.metrics import __all__ as __all__


def __getattr__(name: str) -> Any:
    return getattr(_metrics, name)
