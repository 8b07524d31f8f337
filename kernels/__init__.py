"""Triton kernels, installed as ``shapleycam.kernels``; one file per operator. Importing this imports Triton."""

from .channel_weighted_sum import channel_weighted_sum
from .weighted_reduce import weighted_reduce

#: What is implemented here, as the ladder of backends reads it.
OPERATORS = ("weighted_reduce", "channel_weighted_sum")

__all__ = ["OPERATORS", "channel_weighted_sum", "weighted_reduce"]
