"""The closed form of a pool-and-linear head from its operators: head_weights and shapley_head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .backends import LADDER
from .backends.native import Native
from .channel_weighted_sum import channel_weighted_sum
from .class_maps import class_maps
from .operator import traced
from .shared import check_floating, refuse_gradients
from .utility_rows import utility_rows


def check_head_weight(weight: Tensor, rows: Tensor, activations: Tensor) -> None:
    """Raise InputError unless weight is [K, C] on the device of the logits' rows and the activations."""
    check_floating("weight", weight, "shapley_head")
    wanted = (rows.shape[2], activations.shape[1])
    if weight.shape != wanted or weight.device != rows.device:
        raise InputError(
            f"shapley_head: weight must be {wanted} on {rows.device}, got {tuple(weight.shape)} on {weight.device}."
        )


def head_weights(rows: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """``rows @ W``: the channel weights behind a linear layer, from those of its logits (:func:`utility_rows`).

    The product is the library's, and differentiable. On a CPU, with few rows and no gradients, it is
    :func:`channel_weighted_sum` with the classes as channels: that reads W once, in the dtype it has.

    Args:
        rows: [N, M, K], float32 or float64.
        weight: [K, C] on the same device, any dtype that converts to theirs.
        backend: as for :func:`weighted_reduce`.

    Returns:
        [N, M, C] of the dtype of ``rows``.
    """
    n, m, k = rows.shape
    plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.device.type == "cpu" and rows.dtype == torch.float32
    if plain and not (torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad)):
        least, most = Native.few_rows.get(weight.dtype, (1, 0))  # no other backend is quicker than the library
        # The compiler sees no ladder: there the operator serves, by whatever backend it then finds.
        if least <= n * m <= most and (
            traced() or LADDER.choose("channel_weighted_sum", "cpu", weight.dtype, None, backend).few_rows is Native.few_rows
        ):
            return channel_weighted_sum(weight[None], rows.reshape(1, n * m, k), backend=backend).view(n, m, -1)
    return torch.matmul(rows, weight if weight.dtype == rows.dtype else weight.to(rows.dtype))


def shapley_head(
    activations: Tensor,
    logits: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    grid: Sequence[int],
    size: Sequence[int],
    *,
    utility: str = "rest",
    order: int = 2,
    nodes: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The whole explanation behind a pool-and-linear head ``z = W mean_s(A) + b``, in closed form.

    :func:`utility_rows`, their product with ``W`` (the library's), and :func:`class_maps`: four launches on a GPU.
    ShapleyCAM for order 2, GradCAM for order 1, the integral from zero with ``nodes`` and ``weights``.

    Args:
        activations: [N, C, S], any float dtype and strides.
        logits: [N, K], what the head made of these activations.
        weight, bias: [K, C] and [K] (or None) of the head.
        targets: the classes to explain, int64 [N, M].
        grid, size, dtype: as for :func:`class_maps`.
        utility, order, nodes, weights: as for :func:`utility_rows`.
        backend: as for :func:`weighted_reduce`.

    Returns:
        The signed maps [N, M, S] and the display form [N, M, *size], both contiguous.

    Raises:
        InputError, BackendError, DerivativeError: as for :func:`weighted_reduce`.
    """
    rows = utility_rows(
        logits,
        targets,
        bias,
        utility=utility,
        order=order,
        scale=1.0 / max(activations.shape[2], 1),
        nodes=nodes,
        weights=weights,
        backend=backend,
    )
    check_head_weight(weight, rows, activations)
    refuse_gradients("shapley_head", weight)
    alpha = head_weights(rows, weight, backend=backend)
    return class_maps(activations, alpha, grid, size, dtype=dtype, backend=backend)
