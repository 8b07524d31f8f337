"""The fused operators, their reference twins, and the ladder of backends that serve them.

All take strided views (any strides; one unit stride is fast), mixed float dtypes, any number of positions and channels from 1
up, and an empty batch. They accumulate in float32 (float64 for float64 activations), keep NaN, and are deterministic. They
have no derivatives: an input that requires gradients is refused while gradients are on.
"""

from __future__ import annotations

from typing import Any

from . import reference
from .backends import LADDER, BackendStatus, backends
from .channel_weighted_sum import channel_weighted_sum
from .checking import OnMismatch, checking
from .class_maps import class_maps
from .colormaps import table_of
from .display_map import display_map
from .head import head_weights, shapley_head
from .operator import select
from .overlay import overlay
from .utility_rows import utility_rows
from .weighted_reduce import weighted_reduce

__all__ = [
    "ORDER",
    "BackendStatus",
    "OnMismatch",
    "backends",
    "channel_weighted_sum",
    "checking",
    "class_maps",
    "display_map",
    "head_weights",
    "overlay",
    "reference",
    "select",
    "shapley_head",
    "table_of",
    "utility_rows",
    "weighted_reduce",
]


def __getattr__(name: str) -> Any:
    if name == "ORDER":  # the names of the ladder's rungs, as it stands
        return LADDER.names
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
