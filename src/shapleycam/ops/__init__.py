"""The fused operators, their reference twins, and the ladder of backends that serve them.

All take strided views (any strides; one unit stride is fast), mixed float dtypes, any number of positions and channels from 1
up, and an empty batch. They accumulate in float32 (float64 for float64 activations), keep NaN, and are deterministic. They
have no derivatives: an input that requires gradients is refused while gradients are on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DerivativeError
from . import contract, library, reference
from .colormaps import check_name, table_of
from .ladder import ORDER, BackendStatus, backends, select

__all__ = [
    "ORDER",
    "BackendStatus",
    "backends",
    "channel_weighted_sum",
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


#: How many rows :func:`head_weights` gives to channel_weighted_sum on a CPU, at least and at most. Measured beside the
#: library's product on two cores, with W [1000, 768 to 2048] out of cache. AVX-512: 1.5 to 3 times as fast with halves,
#: which the library takes widened, 1.1 to 1.8 with 2 to 4 rows of float32, no faster with one. AVX2: the gain ends near 8 rows.
_FEW_ROWS = {torch.float32: (2, 4), torch.float16: (1, 8), torch.bfloat16: (1, 8)}


def _call(operator: Any, *arguments: Any) -> Any:
    # A registered operator costs its dispatch: skip it where nothing is compiling or tracing.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return operator(*arguments)
    return operator._init_fn(*arguments)


def _no_gradients(operator: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise DerivativeError(
            f"{operator} has no derivative: detach its inputs, call it under torch.no_grad(), or use "
            f"shapleycam.ops.reference.{operator}, which is differentiable."
        )


def weighted_reduce(
    activations: Tensor, gradient: Tensor, hvp: Tensor | None = None, pooling: str = "mean", *, backend: str = "auto"
) -> Tensor:
    """The signed map of one method row, before the final ReLU (arXiv 2501.06261, section 4.3).

    With ``w = gradient - hvp / 2``, or ``w = gradient`` without an hvp:

    ====================  ==================================================================================
    "mean"                ``sum_c mean_s(w) A``
    "elementwise"         ``sum_c w A``
    "elementwise_relu"    ``sum_c max(w A, 0)``
    "activation"          ``alpha_c = sum_s w A / (sum_s A + 1e-7)``, then ``sum_c alpha_c A``
    "positive_gradient"   ``sum_c max(w, 0) A``
    "plusplus"            ``alpha_c = sum_s max(w, 0) w² / (2 w² + w³ sum_s A + 1e-6)``, 0 where w = 0
    ====================  ==================================================================================

    Reads: "elementwise", "elementwise_relu" and "positive_gradient" read every input once. "mean" reads w once for the spatial
    sum and A once for the channel sum. "activation" and "plusplus" need a spatial sum over A first and read A again, from
    cache while an image's share of the channels fits there.

    Args:
        activations, gradient, hvp: [N, C, S] on one device, any float dtypes and strides; gradient and hvp may be expanded.
        pooling: the row.
        backend: "auto", or "cuda", "triton", "native", "torch".

    Returns:
        [N, S], float32 (float64 for float64 activations), contiguous.

    Raises:
        InputError: shapes, dtypes or devices do not fit, or the pooling is unknown.
        BackendError: the backend named cannot serve.
        DerivativeError: an input requires gradients.
    """
    contract.check_weighted_reduce(activations, gradient, hvp, pooling)
    _no_gradients("weighted_reduce", activations, gradient, hvp)
    out: Tensor = _call(library.weighted_reduce, activations, gradient, hvp, pooling, backend)
    return out


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
    contract.check_channel_weighted_sum(activations, alpha)
    _no_gradients("channel_weighted_sum", activations, alpha)
    out: Tensor = _call(library.channel_weighted_sum, activations, alpha, backend)
    return out


def utility_rows(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    utility: str = "rest",
    order: int = 2,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """The weights of the logits, ``scale (U' - U'' z0 / 2)`` with ``z0 = logits - bias`` (arXiv 2501.06261, section 4.2).

    For a head that is ``z = W mean_s(A) + b``, their product with ``W``, over S, is the Shapley weight of every channel.

    Args:
        logits: [N, K], any float dtype.
        targets: the classes to explain, int64 [N, M] on the same device; a row whose target is not in 0 … K-1 is NaN.
        bias: [K], any float dtype, or None.
        utility: "logit", "probability", "log_probability" or "rest".
        order: 2, or 1 for the gradient ``scale U'`` alone.
        backend: as for :func:`weighted_reduce`.

    Returns:
        [N, M, K], float32 (float64 for float64 logits), contiguous.

    Raises:
        InputError, BackendError, DerivativeError: as for :func:`weighted_reduce`.
    """
    contract.check_utility_rows(logits, targets, bias, utility, order)
    _no_gradients("utility_rows", logits, bias)
    out: Tensor = _call(library.utility_rows, logits, targets, bias, utility, order, scale, backend)
    return out


def class_maps(
    activations: Tensor,
    alpha: Tensor,
    grid: Sequence[int],
    size: Sequence[int],
    *,
    renormalize: bool = True,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`channel_weighted_sum` and the :func:`display_map` of its maps; on a GPU, one launch for small activations.

    Args:
        activations: [N, C, S], any float dtype and strides.
        alpha: [N, M, C] on the same device, any float dtype and strides.
        grid: how the S positions lie: (h, w), or (l,), or (d, h, w).
        size, renormalize, dtype: as for :func:`display_map`.
        backend: as for :func:`weighted_reduce`.

    Returns:
        The signed maps [N, M, S] and the display form [N, M, *size], both contiguous.

    Raises:
        InputError, BackendError, DerivativeError: as for :func:`weighted_reduce`.
    """
    contract.check_class_maps(activations, alpha, grid, size, dtype)
    _no_gradients("class_maps", activations, alpha)
    raw, maps = _call(library.class_maps, activations, alpha, list(grid), list(size), renormalize, dtype, backend)
    return raw, maps


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
    least, most = _FEW_ROWS.get(weight.dtype, (1, 0))
    plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.device.type == "cpu" and rows.dtype == torch.float32
    plain = plain and not (torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad))
    if plain and backend in ("auto", "native") and least <= n * m <= most:
        return channel_weighted_sum(weight[None], rows.reshape(1, n * m, k), backend=backend).view(n, m, -1)
    return torch.matmul(rows, weight.to(rows.dtype))


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
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The whole explanation behind a pool-and-linear head ``z = W mean_s(A) + b``, in closed form.

    :func:`utility_rows`, their product with ``W`` (the library's), and :func:`class_maps`: three launches on a GPU where the
    activations are small. ShapleyCAM for order 2, GradCAM for order 1.

    Args:
        activations: [N, C, S], any float dtype and strides.
        logits: [N, K], what the head made of these activations.
        weight, bias: [K, C] and [K] (or None) of the head.
        targets: the classes to explain, int64 [N, M].
        grid, size, dtype: as for :func:`class_maps`.
        utility, order: as for :func:`utility_rows`.
        backend: as for :func:`weighted_reduce`.

    Returns:
        The signed maps [N, M, S] and the display form [N, M, *size], both contiguous.

    Raises:
        InputError, BackendError, DerivativeError: as for :func:`weighted_reduce`.
    """
    rows = utility_rows(
        logits, targets, bias, utility=utility, order=order, scale=1.0 / max(activations.shape[2], 1), backend=backend
    )
    contract.check_head_weight(weight, rows, activations)
    _no_gradients("shapley_head", weight)
    alpha = head_weights(rows, weight, backend=backend)
    return class_maps(activations, alpha, grid, size, dtype=dtype, backend=backend)


def display_map(
    raw: Tensor,
    size: Sequence[int],
    *,
    renormalize: bool = True,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """The display form of signed maps: max(·, 0), min-max, linear resize with half-pixel centres, min-max.

    Min-max is ``(m - min) / (1e-7 + max)`` per image, the maximum taken after the subtraction.

    Args:
        raw: [N, h, w], or [N, l], or [N, d, h, w]; any float dtype.
        size: the spatial size of the result.
        renormalize: whether to do the second min-max (left out before several layers' maps are averaged).
        dtype: of the result: None for float32 (float64 for float64 maps), or float16, or uint8 (0 to 255; NaN becomes 0).
        backend: as for :func:`weighted_reduce`.

    Returns:
        [N, *size], contiguous; an image with NaN is NaN.

    Raises:
        InputError, BackendError, DerivativeError: as for :func:`weighted_reduce`.
    """
    contract.check_display_map(raw, size, dtype)
    _no_gradients("display_map", raw)
    out: Tensor = _call(library.display_map, raw, list(size), renormalize, dtype, backend)
    return out


def overlay(
    images: Tensor,
    heatmaps: Tensor,
    *,
    colormap: str = "jet",
    alpha: float = 0.5,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Heatmaps in colour over images.

    Args:
        images: [N, 3, H, W]: uint8, or floating in [0, 1], or normalised by ``mean`` and ``std`` (three numbers each).
        heatmaps: [N, H, W] in [0, 1] on the same device.
        colormap: "jet", "turbo", "viridis" or "magma".
        alpha: weight of the colours, in [0, 1].
        backend: as for :func:`weighted_reduce`.

    Returns:
        uint8 [N, H, W, 3]; positions where the heatmap is NaN or Inf are magenta.

    Raises:
        InputError: an argument does not fit.
        BackendError: the backend named cannot serve.
    """
    contract.check_overlay(images, heatmaps, alpha, mean, std)
    check_name(colormap)
    shift = None if mean is None else [float(x) for x in mean]
    scale = None if std is None else [float(x) for x in std]
    out: Tensor = _call(library.overlay, images.detach(), heatmaps.detach(), colormap, alpha, shift, scale, backend)
    return out
