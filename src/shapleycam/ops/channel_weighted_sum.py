"""channel_weighted_sum: M maps per image from one read of its activations."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .operator import Operator
from .shared import accumulator, check_floating, refuse_gradients
from .tolerance import Expected, within


def check(activations: Tensor, alpha: Tensor) -> None:
    """Raise InputError unless activations are [N, C, S] and alpha [N, M, C] on one device."""
    operator = "channel_weighted_sum"
    check_floating("activations", activations, operator)
    check_floating("alpha", alpha, operator)
    if activations.ndim != 3 or activations.shape[1] == 0 or activations.shape[2] == 0:
        raise InputError(f"{operator}: activations must be [N, C, S] with C, S >= 1, got shape {tuple(activations.shape)}.")
    n, c, _ = activations.shape
    if alpha.ndim != 3 or alpha.shape[0] != n or alpha.shape[2] != c or alpha.device != activations.device:
        raise InputError(
            f"{operator}: alpha must be [{n}, M, {c}] on {activations.device}, got {tuple(alpha.shape)} on {alpha.device}."
        )


def reference(activations: Tensor, alpha: Tensor) -> Tensor:
    """``sum_c alpha[n, m, c] activations[n, c, s]``, [N, M, S]."""
    wide = accumulator(activations.dtype)
    return torch.matmul(alpha.to(wide), activations.to(wide))


def empty(activations: Tensor, alpha: Tensor) -> Tensor:
    """The result, not filled: [N, M, S]."""
    shape = (activations.shape[0], alpha.shape[1], activations.shape[2])
    return torch.empty(shape, dtype=accumulator(activations.dtype), device=activations.device)


def expect(arguments: tuple[Tensor, Tensor], results: tuple[Tensor, ...]) -> list[Expected]:
    """What the result should be; the terms of each sum are ``alpha A``."""
    a, alpha = (t.double() for t in arguments)
    return [within(reference(a, alpha), reference(a.abs(), alpha.abs()), results[0].dtype)]


OPERATOR = Operator(
    "channel_weighted_sum",
    "(Tensor activations, Tensor alpha, str backend) -> Tensor",
    reference=reference,
    empty=empty,
    expect=expect,
)


def channel_weighted_sum(activations: Tensor, alpha: Tensor, *, backend: str = "auto") -> Tensor:
    """``sum_c alpha[n, m, c] A[n, c, s]``: M maps per image from one read of the activations.

    Args:
        activations: [N, C, S], any float dtype and strides.
        alpha: [N, M, C] on the same device, any float dtype and strides.
        backend: as for :func:`weighted_reduce`.

    Returns:
        [N, M, S], float32 (float64 for float64 activations), contiguous.

    Raises:
        InputError, BackendError, DerivativeError: as for :func:`weighted_reduce`.
    """
    check(activations, alpha)
    refuse_gradients("channel_weighted_sum", activations, alpha)
    out: Tensor = OPERATOR(backend, activations, alpha)
    return out
