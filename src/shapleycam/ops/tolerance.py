"""How far a result may lie from the reference in float64: one table, for the tests and for checks at run time.

A sum that cancels cannot be expected to keep more than a part of its terms, so errors are compared with the sum of the
magnitudes of the terms, element by element, and not with the largest result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: By the dtype of the result: (part of the result, part of the magnitude), for inputs that are exact in their own dtype.
TOLERANCE = {torch.float64: (1e-11, 1e-11), torch.float32: (2e-5, 2e-5), torch.float16: (1e-3, 1e-3)}


class Expected(NamedTuple):
    """What one result should be.

    Attributes:
        value: the reference, in float64.
        allowed: how far each element may lie from it.
    """

    value: Tensor
    allowed: Tensor


class Deviation(NamedTuple):
    """How a result compares with what was expected.

    Attributes:
        wrong: bool, the elements that differ by more than is allowed; NaN and Inf differ from all but themselves.
        excess: the errors as parts of what is allowed (1 is the limit), Inf where a NaN or Inf is wrong.
    """

    wrong: Tensor
    excess: Tensor


def within(value: Tensor, magnitude: Tensor, dtype: torch.dtype) -> Expected:
    """``value``, which may be missed by a part of itself and a part of ``magnitude``, as a result of ``dtype``."""
    of_value, of_magnitude = TOLERANCE[dtype]
    # Where a NaN or Inf entered some of the terms, the others are as large as the image says.
    typical = 5 * value.nan_to_num(0.0, 0.0, 0.0).abs().amax() if value.numel() else value.sum()
    magnitude = torch.where(magnitude.isfinite(), magnitude, typical)
    floor = 1e3 * torch.finfo(dtype).tiny  # below which numbers lose their digits
    return Expected(value, of_value * value.abs() + of_magnitude * magnitude + floor)


def deviation(result: Tensor, expected: Expected) -> Deviation:
    """Compare a result with what was expected of it."""
    value = expected.value
    if result.is_floating_point():
        value = value.to(result.dtype)  # what overflows there is Inf in both
    got, value = result.double(), value.double()
    same = (got == value) | (got.isnan() & value.isnan())
    excess = (got - value).abs() / expected.allowed
    excess = torch.where(same, 0.0, excess.nan_to_num(float("inf"), float("inf")))
    return Deviation(excess > 1, excess)
