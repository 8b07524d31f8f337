"""The first principal component of activations: EigenCAM and EigenGradCAM (Muhammad and Yeasin, IJCNN 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

# Bytes of the float64 copy that one batch of Gram matrices is made from.
_BYTES = 256 << 20


def principal_map(weighted: Tensor) -> Tensor:
    """Each image's positions, centred over the positions per channel, projected on their first principal component.

    The component is an eigenvector of the Gram matrix over the channels or over the positions, whichever is smaller, in
    float64. An eigenvector has no sign of its own (LAPACK's is chance, and so is that of pytorch-grad-cam's EigenCAM). Here
    the entry of largest magnitude is positive (Chung and Ying, Applied Sciences 15(13), 7562, 2025, equation 13).

    Args:
        weighted: [N, C, S], any float dtype and strides: activations, or activations times a weight.

    Returns:
        [N, S], float32 (float64 for float64 input), on the device. NaN for an image with NaN or Inf in it, 0 for one that is
        the same at every position. Waits for the device, as every eigenvalue routine does.
    """
    _, c, s = weighted.shape
    per_image = max(1, 8 * c * s)
    parts = [_project(part) for part in weighted.split(max(1, _BYTES // per_image))]
    wide = torch.promote_types(weighted.dtype, torch.float32)
    return torch.cat(parts).to(wide) if parts else weighted.new_zeros((0, s), dtype=wide)


def _project(weighted: Tensor) -> Tensor:
    x = weighted.double()
    finite = torch.isfinite(x).flatten(1).all(1)[:, None]
    # The eigenvalue routine refuses NaN, and one image must not take the others with it.
    x = torch.where(finite[:, :, None], x, 0.0)
    x = x - x.mean(2, keepdim=True)  # [N, C, S]
    if x.shape[1] <= x.shape[2]:
        vectors = torch.linalg.eigh(x @ x.mT)[1][:, :, -1]  # [N, C]
        projected = (x * vectors[:, :, None]).sum(1)
    else:
        values, found = torch.linalg.eigh(x.mT @ x)
        projected = found[:, :, -1] * values[:, -1:].clamp_min(0).sqrt()  # [N, S]
    low, high = projected.amin(1, keepdim=True), projected.amax(1, keepdim=True)
    projected = torch.where(-low > high, -projected, projected)
    return torch.where(finite, projected, float("nan"))
