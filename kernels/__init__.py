"""Triton kernels, installed as ``shapleycam.kernels``; one file per operator. Importing this imports Triton."""

from .channel_weighted_sum import channel_weighted_sum
from .display_map import display_map
from .overlay import overlay
from .weighted_reduce import weighted_reduce

#: What is implemented here, as the ladder of backends reads it.
OPERATORS = ("weighted_reduce", "channel_weighted_sum", "display_map", "overlay")

__all__ = ["OPERATORS", "channel_weighted_sum", "display_map", "overlay", "weighted_reduce"]
