"""Insertion and deletion (Petsiuk et al., RISE, BMVC 2018): the probability while pixels appear or vanish by relevance.

The pixels of an image are ranked by its map, the most relevant first; of equals, the first in reading order. After step k of
K, ``round(k · pixels / K)`` of them are taken. ``deletion`` starts at the image and replaces the pixels taken by the
baseline; ``insertion`` starts at the baseline and puts them in. The area is that of the trapezoids under the K + 1 points.

The original takes 224 pixels a step on 224 × 224 images (``steps=224``), zeros of the normalised input for deletion and a
Gaussian blur (11 × 11, deviation 5) for insertion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...model.inputs import Inputs, as_inputs
from ...utilities.outputs import Output
from .functional import probabilities


def deletion(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: Tensor,
    *,
    steps: int = 50,
    baseline: str | Tensor = "zero",
    chunk: int = 64,
    output: Output = "auto",
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    images_as: str | None = None,
) -> Tensor:
    """Probability of the class while the most relevant pixels vanish, float64 [N, steps + 1], lower is better.

    Args:
        model: returns logits [N, K]; in evaluation mode.
        images: normalised, [N, channels, H, W].
        maps: [N, H, W].
        targets: classes, int64 [N].
        steps: number of steps, at least 1.
        baseline: "zero" (the data set's mean), "blur", or a tensor that broadcasts to the images.
        chunk: images that go through the model at once.
        output: where the logits are in what the model returns, as for :class:`shapleycam.Explainer`.
        args, kwargs: what the model takes besides the images, as for :meth:`shapleycam.Explainer.__call__`.
        images_as: the keyword under which the model takes the images, where they are not its first argument.

    Raises:
        InputError: shapes that do not belong together, an unknown baseline, no steps.
    """
    return _curve(
        model,
        as_inputs(images, args, kwargs, images_as),
        _baseline(images, baseline),
        True,
        maps,
        targets,
        steps,
        chunk,
        output,
    )


def insertion(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    targets: Tensor,
    *,
    steps: int = 50,
    baseline: str | Tensor = "blur",
    chunk: int = 64,
    output: Output = "auto",
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    images_as: str | None = None,
) -> Tensor:
    """Probability of the class while the most relevant pixels appear, float64 [N, steps + 1], higher is better.

    Arguments and errors as for :func:`deletion`.
    """
    return _curve(
        model,
        as_inputs(images, args, kwargs, images_as),
        _baseline(images, baseline),
        False,
        maps,
        targets,
        steps,
        chunk,
        output,
    )


def area(curve: Tensor) -> Tensor:
    """Area under curves [N, steps + 1] over the unit interval, [N], by trapezoids."""
    return torch.trapezoid(curve.double(), dim=1) / (curve.shape[1] - 1)


def blur(images: Tensor, size: int = 11, deviation: float = 5.0) -> Tensor:
    """Gaussian blur of [N, channels, H, W] with zeros beyond the border, as RISE's reference code does it."""
    x = torch.arange(size, device=images.device, dtype=torch.float64) - size // 2
    kernel = torch.exp(-(x**2) / (2 * deviation**2))
    kernel = (kernel / kernel.sum()).to(images.dtype)
    channels = images.shape[1]
    rows = kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    once = nn.functional.conv2d(images, rows, padding=(size // 2, 0), groups=channels)
    return nn.functional.conv2d(once, rows.transpose(2, 3), padding=(0, size // 2), groups=channels)


def _baseline(images: Tensor, baseline: str | Tensor) -> Tensor:
    if isinstance(baseline, Tensor):
        try:
            return baseline.to(images).expand_as(images)
        except RuntimeError as error:
            raise InputError(
                f"The baseline {tuple(baseline.shape)} does not broadcast to the images {tuple(images.shape)}."
            ) from error
    if baseline == "zero":
        return torch.zeros_like(images)
    if baseline == "blur":
        return blur(images)
    raise InputError(f"Unknown baseline {baseline!r}: expected 'zero', 'blur' or a tensor.")


def check(images: Tensor, maps: Tensor, targets: Tensor) -> None:
    """Refuse images, maps and targets that do not belong together.

    Raises:
        InputError: names the shapes.
    """
    if images.ndim != 4 or maps.shape != (images.shape[0], *images.shape[2:]) or targets.shape != images.shape[:1]:
        raise InputError(
            "Expected images [N, channels, H, W], maps [N, H, W] and targets [N]; got "
            f"{tuple(images.shape)}, {tuple(maps.shape)} and {tuple(targets.shape)}."
        )


@torch.no_grad()
def _curve(
    model: nn.Module,
    inputs: Inputs,
    baseline: Tensor,
    vanishing: bool,
    maps: Tensor,
    targets: Tensor,
    steps: int,
    chunk: int,
    output: Output,
) -> Tensor:
    images = inputs.images
    check(images, maps, targets)
    if steps < 1 or chunk < 1:
        raise InputError(f"steps and chunk must be at least 1, got {steps} and {chunk}.")
    n, pixels = maps.shape[0], maps[0].numel()
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(pixels, device=maps.device).expand(n, -1))
    ranks = ranks.view(n, 1, *maps.shape[1:])
    taken = torch.tensor([round(k * pixels / steps) for k in range(steps + 1)], device=maps.device)
    start, end = (images, baseline) if vanishing else (baseline, images)
    # (step, image) pairs, a chunk at a time
    step, row = torch.arange((steps + 1) * n, device=maps.device).view(steps + 1, n), torch.arange(n, device=maps.device)
    step, row = (step // n).flatten(), row.expand(steps + 1, n).flatten()
    found = []
    for k, r in zip(step.split(chunk), row.split(chunk), strict=True):
        altered = torch.where(ranks[r] < taken[k].view(-1, 1, 1, 1), end[r], start[r])
        found.append(probabilities(model, inputs.beside(altered, r), targets[r], output))
    return torch.cat(found).double().view(steps + 1, n).T
