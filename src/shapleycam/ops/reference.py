"""The operators in plain PyTorch: the oracle of the tests, the last rung of the ladder, and what exports trace.

Every function here takes checked arguments, in the order of the operator's file, where it stands, and computes in float32
(float64 for float64 activations).
"""

from .channel_weighted_sum import reference as channel_weighted_sum
from .class_maps import reference as class_maps
from .display_map import EPS_DISPLAY
from .display_map import reference as display_map
from .overlay import reference as overlay
from .quadrature_rows import reference as quadrature_rows
from .shared import accumulator
from .utility_rows import reference as utility_rows
from .weighted_reduce import EPS_ACTIVATION, EPS_PLUSPLUS
from .weighted_reduce import reference as weighted_reduce

__all__ = [
    "EPS_ACTIVATION",
    "EPS_DISPLAY",
    "EPS_PLUSPLUS",
    "accumulator",
    "channel_weighted_sum",
    "class_maps",
    "display_map",
    "overlay",
    "quadrature_rows",
    "utility_rows",
    "weighted_reduce",
]
