"""Derivatives of the utility in the activations; see :mod:`shapleycam.derivatives.engines`."""

from .engines import (
    ENGINES,
    Derived,
    HeadChanged,
    Request,
    Terms,
    closed_form,
    forward_over_reverse,
    midpoint,
    probe,
    reverse_over_reverse,
)

__all__ = [
    "ENGINES",
    "Derived",
    "HeadChanged",
    "Request",
    "Terms",
    "closed_form",
    "forward_over_reverse",
    "midpoint",
    "probe",
    "reverse_over_reverse",
]
