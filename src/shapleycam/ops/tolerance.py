"""How far a result may lie from the reference in float64: one table, for the tests and for checks at run time.

A sum that cancels cannot be expected to keep more than a part of its terms, so errors are compared with the sum of the
magnitudes of the terms, element by element, and not with the largest result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: By the dtype of the result: (part of the result, part of the magnitude), for inputs that are exact in their own dtype.
TOLERANCE = {torch.float64: (1e-11, 1e-11), torch.float32: (2e-5, 2e-5)}


class Expected(NamedTuple):
    """What one result should be.

    Attributes:
        value: the reference, in float64.
        allowed: how far each element may lie from it, beyond the rounding.
        rounding: how far the rounding to the dtype of the result may take it, where that is coarser than the arithmetic.
    """

    value: Tensor
    allowed: Tensor
    rounding: Tensor | float = 0.0


def within(value: Tensor, magnitude: Tensor, dtype: torch.dtype) -> Expected:
    """``value``, which may be missed by a part of itself and a part of ``magnitude``, as a result of ``dtype``."""
    of_value, of_magnitude = TOLERANCE[dtype]
    # Where a NaN or Inf entered some of the terms, the others are as large as the image says.
    typical = 5 * value.nan_to_num(0.0, 0.0, 0.0).abs().amax() if value.numel() else value.sum()
    magnitude = torch.where(magnitude.isfinite(), magnitude, typical)
    floor = 1e3 * torch.finfo(dtype).tiny  # below which numbers lose their digits
    return Expected(value, of_value * value.abs() + of_magnitude * magnitude + floor)


def deviation(result: Tensor, expected: Expected) -> Tensor:
    """The errors as parts of what is allowed: 1 is the limit. NaN and Inf differ from all but themselves, by Inf."""
    value, got = expected.value, result.double()
    if result.is_floating_point():
        cast = value.to(result.dtype).double()
        value = torch.where(cast.isinf(), cast, value)  # what overflows there is Inf in both
    same = (got == value) | (got.isnan() & value.isnan())
    excess = ((got - value).abs() - expected.rounding).clamp_min(0) / expected.allowed
    return torch.where(same, 0.0, excess.nan_to_num(float("inf"), float("inf")))
