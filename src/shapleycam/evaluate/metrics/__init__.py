"""How good maps are: the ADCC evaluation, insertion and deletion, ROAD.

The metrics are ``torchmetrics.Metric`` classes (``pip install 'shapleycam[metrics]'``), so that they work in Lightning and
across processes; what they compute per image stands in :mod:`shapleycam.metrics.functional`,
:mod:`shapleycam.metrics.curves` and :mod:`shapleycam.metrics.road`, which need torch alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .functional import Measurement, adcc, coherency, complexity, drop, increase, measure

if TYPE_CHECKING:
    from .aggregate import (
        ADCC,
        ROAD,
        AverageDrop,
        AverageDropInDeletion,
        Coherency,
        Complexity,
        DeletionAUC,
        IncreaseInConfidence,
        InsertionAUC,
    )

__all__ = [
    "ADCC",
    "ROAD",
    "AverageDrop",
    "AverageDropInDeletion",
    "Coherency",
    "Complexity",
    "DeletionAUC",
    "IncreaseInConfidence",
    "InsertionAUC",
    "Measurement",
    "adcc",
    "coherency",
    "complexity",
    "drop",
    "increase",
    "measure",
]


def __getattr__(name: str) -> Any:
    # torchmetrics is loaded when a metric is asked for, not with the functions.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ...optional import need

    need("torchmetrics", "metrics")
    from . import aggregate

    return getattr(aggregate, name)
