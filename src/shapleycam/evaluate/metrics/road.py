"""ROAD, remove and debias (Rong et al., arXiv 2202.00449): what the probability loses when pixels are imputed away.

A removed pixel becomes the weighted mean of its eight neighbours (1/6 for the four nearest, 1/12 for the diagonal ones, scaled
up at the border), which is a sparse linear system over all removed pixels, plus a little Gaussian noise. The reference
implementations solve it per image by a sparse LU factorisation on the host. Its matrix is symmetric and, as soon as one pixel
of the image is known, positive definite; here all images and channels are solved at once by conjugate gradients, in float64,
on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...model.inputs import as_inputs
from ...utilities.outputs import Output
from .curves import check
from .functional import probabilities

#: Those of pytorch-grad-cam's ROADCombined.
PERCENTILES = (10, 20, 30, 40, 50, 60, 70, 80, 90)


def impute(
    images: Tensor,
    known: Tensor,
    *,
    noise: float = 0.01,
    generator: torch.Generator | None = None,
    tolerance: float = 1e-9,
    iterations: int = 5000,
) -> Tensor:
    """Noisy linear imputation.

    Args:
        images: [N, channels, H, W].
        known: bool [N, H, W]; the other pixels are replaced. An image without a known pixel becomes zero (plus noise).
        noise: standard deviation of the Gaussian noise on the imputed pixels.
        generator: of the noise, on the images' device.
        tolerance: the residual's norm relative to the right-hand side's at which an image is done.
        iterations: of the solver, at the most.

    Returns:
        the images with their unknown pixels replaced, in their own dtype. An image with NaN or Inf in a known pixel is NaN.

    Raises:
        InputError: shapes that do not belong together.
    """
    if images.ndim != 4 or known.shape != (images.shape[0], *images.shape[2:]):
        raise InputError(
            f"Expected images [N, channels, H, W] and known [N, H, W]; got {tuple(images.shape)} and {tuple(known.shape)}."
        )
    unknown = ~known.bool()[:, None]
    wide = images.double()
    mark = torch.where(unknown, 0.0, wide).flatten(1).sum(1) * 0  # NaN where a known pixel is not finite
    given = torch.where(unknown, 0.0, wide).nan_to_num(0.0, 0.0, 0.0)
    # At the border the weights of the neighbours that are there are scaled up: 1 - the weights of those that are not.
    diagonal = _neighbours(torch.ones_like(wide[:1, :1]))

    def system(x: Tensor) -> Tensor:
        return torch.where(unknown, diagonal * x - _neighbours(x), 0.0)

    right = torch.where(unknown, _neighbours(given), 0.0)
    solved = _conjugate_gradients(system, right, diagonal, tolerance, iterations)
    if noise:
        solved = (
            solved + noise * torch.randn(solved.shape, generator=generator, device=solved.device, dtype=torch.float32).double()
        )
    return torch.where(unknown, solved, wide).add(mark.view(-1, 1, 1, 1)).to(images.dtype)


@torch.no_grad()
def road(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: Tensor,
    *,
    percentiles: Sequence[float] = PERCENTILES,
    noise: float = 0.01,
    generator: torch.Generator | None = None,
    output: Output = "auto",
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    images_as: str | None = None,
) -> Tensor:
    """(mean p without the least relevant pixels - mean p without the most relevant) / 2, float64 [N]; higher is better.

    For every percentile q, "most relevant first" keeps the pixels below the map's q-th percentile, and "least relevant
    first" those of 1 - M below its own: ROADCombined of pytorch-grad-cam with softmax probabilities as scores.

    Args:
        model: returns logits [N, K]; in evaluation mode.
        images: normalised, [N, channels, H, W].
        maps: [N, H, W]. targets: classes, int64 [N].
        percentiles: each in (0, 100).
        noise, generator: as for :func:`impute`.
        output, args, kwargs, images_as: as for :func:`shapleycam.metrics.curves.deletion`.

    Raises:
        InputError: shapes that do not belong together, or percentiles out of range.
    """
    check(images, maps, targets)
    if not percentiles or not all(0 < q < 100 for q in percentiles):
        raise InputError(f"percentiles must lie between 0 and 100, got {tuple(percentiles)}.")
    inputs = as_inputs(images, args, kwargs, images_as)
    total = torch.zeros(images.shape[0], dtype=torch.float64, device=images.device)
    # A map of NaN keeps nothing and removes nothing in particular: its score is NaN.
    total = total + maps.flatten(1).sum(1, dtype=torch.float64) * 0
    for sign, relevance in ((-1, maps), (1, 1 - maps)):
        ordered = relevance.flatten(1).sort(1).values
        for q in percentiles:
            known = relevance < _percentile(ordered, q)[:, None, None]
            filled = impute(images, known, noise=noise, generator=generator)
            total = total + sign * probabilities(model, inputs.with_images(filled), targets, output)
    return total / (2 * len(percentiles))


def _percentile(ordered: Tensor, q: float) -> Tensor:
    """numpy.percentile (linear) of sorted rows, [N] in their dtype."""
    place = q / 100 * (ordered.shape[1] - 1)
    low = int(place)
    high = min(low + 1, ordered.shape[1] - 1)
    a, b = ordered[:, low].double(), ordered[:, high].double()
    return (a + (b - a) * (place - low)).to(ordered.dtype)


def _neighbours(x: Tensor) -> Tensor:
    """Σ of the eight neighbours, 1/6 for the nearest and 1/12 for the diagonal ones, zero beyond the border."""
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    # [1 2 1]ᵀ[1 2 1] / 12 without its centre
    tall = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    return (tall[..., :-2] + 2 * tall[..., 1:-1] + tall[..., 2:] - 4 * x) / 12


def _conjugate_gradients(system, right: Tensor, diagonal: Tensor, tolerance: float, iterations: int) -> Tensor:  # type: ignore[no-untyped-def]
    """Solve ``system(x) = right``, every [N, channels] plane on its own, preconditioned by the diagonal."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((2, 3), keepdim=True)

    x, residual = torch.zeros_like(right), right
    goal = dot(right, right) * tolerance**2
    z = residual / diagonal
    direction, rho = z, dot(residual, z)
    for step in range(iterations):
        if step % 25 == 0 and bool((dot(residual, residual) <= goal).all()):
            break
        image = system(direction)
        curvature = dot(direction, image)
        alpha = torch.where(curvature > 0, rho / curvature, 0.0)  # a plane that is solved exactly stands still
        x = x + alpha * direction
        residual = residual - alpha * image
        z = residual / diagonal
        following = dot(residual, z)
        direction = z + torch.where(rho > 0, following / rho, 0.0) * direction
        rho = following
    return x
