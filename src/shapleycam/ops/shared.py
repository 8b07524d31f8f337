"""What every operator's file uses: names, dtypes, and the checks that they have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DerivativeError, InputError

# In the order of the enums of csrc/include/shapleycam.h, which the extension exports; a test compares them.
POOLINGS = ("mean", "elementwise", "elementwise_relu", "activation", "positive_gradient", "plusplus")
UTILITIES = ("logit", "probability", "log_probability", "rest")
#: Of a quadrature rule; SHAPLEYCAM_MOST_NODES of the header.
MOST_NODES = 32
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over activations of ``dtype`` are kept, and in which maps are returned."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_rows(matrix: Tensor) -> Tensor:
    """``matrix`` [N, K], copied where neighbours in a row are none in memory; one row that all share stays one."""
    if matrix.stride(1) == 1:
        return matrix
    return matrix[:1].contiguous().expand_as(matrix) if matrix.stride(0) == 0 else matrix.contiguous()


def check_floating(name: str, tensor: Tensor, operator: str) -> None:
    """Raise InputError unless ``tensor`` is a tensor of a dtype in DTYPES."""
    if not isinstance(tensor, Tensor):
        raise InputError(f"{operator}: {name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if tensor.dtype not in DTYPES:
        raise InputError(f"{operator}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}.")


def refuse_gradients(operator: str, *tensors: Tensor | None) -> None:
    """Raise DerivativeError where gradients are on and wanted of one of the tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                raise DerivativeError(
                    f"{operator} has no derivative: detach its inputs, call it under torch.no_grad(), or use "
                    f"shapleycam.ops.reference.{operator}, which is differentiable."
                )
