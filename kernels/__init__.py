"""Triton kernels, installed as ``shapleycam.kernels``; one file per operator. Importing this imports Triton."""

from .channel_weighted_sum import channel_weighted_sum
from .class_maps import class_maps
from .display_map import display_map
from .overlay import overlay
from .quadrature_rows import quadrature_rows
from .utility_rows import utility_rows
from .weighted_reduce import weighted_reduce

#: What is implemented here, as the ladder of backends reads it.
OPERATORS = (
    "weighted_reduce",
    "channel_weighted_sum",
    "utility_rows",
    "quadrature_rows",
    "class_maps",
    "display_map",
    "overlay",
)

#: The rows of weighted_reduce that are.
POOLINGS = ("mean", "elementwise", "elementwise_relu", "activation", "positive_gradient", "plusplus")

__all__ = [
    "OPERATORS",
    "POOLINGS",
    "channel_weighted_sum",
    "class_maps",
    "display_map",
    "overlay",
    "quadrature_rows",
    "utility_rows",
    "weighted_reduce",
]
