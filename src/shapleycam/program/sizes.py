"""Programs for images of any height and width: which models have one, and at which sizes that is tried.

A program for one size may rely on it unseen: a pool of fixed width, a linear layer over the positions. So the explainer itself
is asked at other sizes first, which also says in the model's own words why it takes no others.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ExportError, ShapleyCamWarning
from ..plan import Plan, Settings
from .graph import TRACING, said


def resized(images: Tensor, size: tuple[int, ...]) -> Tensor:
    """Images [N, channels, H, W] at another height and width, as they might have been."""
    wide = images.detach().to(torch.promote_types(images.dtype, torch.float32))
    return F.interpolate(wide, size, mode="bilinear", align_corners=False).to(images.dtype)


def other_sizes(size: tuple[int, ...], least: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Where a program for any size from ``least`` on is tried, besides ``size``: there, and on both sides of ``size``.

    Two are oblong, and their sides odd, so that no stride but an odd one divides them.
    """
    (height, width), shrunk = size, [max(low, side - side // 5) | 1 for side, low in zip(size, least, strict=True)]
    return least, (height + height // 3 | 1, shrunk[1]), (shrunk[0], width + width // 2 | 1)


def check_sizes(settings: Settings, plan: Plan, expected: Any, images: Tensor, size: Any) -> None:
    """Raise ExportError where no program for images of any size can be had of this explainer, as far as that is known yet."""
    layout, name = expected.diagnostics.layouts[0], plan.layers[0][0]
    baseline = settings.path.baseline
    # Such models take any size, and pad it to whole windows: what the tracer refuses, after minutes.
    tensors = chain(settings.model.named_parameters(), settings.model.named_buffers())
    windows = next((key for key, _ in tensors if "relative_position" in key or "relative_coords" in key), None)
    why = None
    if images.ndim != 4 or layout.kind not in ("NCHW", "NHWC"):
        why = (
            f"layer {name!r} gives {layout.kind} for images of {images.ndim - 2} dimensions, and only a layer that keeps "
            "height and width ([N, C, H, W] or [N, H, W, C]) says where the positions of other images are"
        )
    elif (
        plan.facts.pooled is None or plan.engine not in ("closed_form", "quadrature", "midpoint") or not settings.utility.named
    ):
        why = (
            f"the derivatives of the head behind layer {name!r} ({plan.facts.head}) with engine {plan.engine!r} are a graph "
            "for one size; behind a global average pool and one linear layer they are not, with a utility of the table"
        )
    elif isinstance(baseline, Tensor) and baseline.shape[-1] != 1:
        why = f"the baseline {tuple(baseline.shape)} has a value for every position: give one that broadcasts, such as [C, 1]"
    elif not isinstance(size, str):
        why = f"maps of {size!r} have one size: use size='layer' or 'image'"
    elif windows is not None:
        why = f"{windows!r} is a table of relative positions, of attention in windows of one size"
    elif 1 in layout.grid:
        why = f"layer {name!r} has {layout.grid} positions for images of {tuple(images.shape[2:])}: give larger images"
    if why is not None:
        raise ExportError(f"dynamic_size=True is not to be had: {why}.")


def tried(
    explain: Callable[..., Any], plan: Plan, expected: Any, images: Tensor
) -> tuple[tuple[int, ...], list[tuple[Tensor, Any]]]:
    """Ask the explainer at other sizes.

    Returns:
        the least height and width, where the layer has two positions in each dimension, and images at other sizes with their
        explanations.

    Raises:
        ExportError: the model does not take other sizes, or is another there: its layout, or its head.
    """
    size, layout = tuple(images.shape[2:]), expected.diagnostics.layouts[0]
    explain = copy.copy(explain)  # a head that is another elsewhere is not to be what the user's explainer remembers
    with TRACING, warnings.catch_warnings():
        warnings.simplefilter("ignore", ShapleyCamWarning)  # the user was warned by their own explainer
        explain(images)
        for least in _candidates(size, layout.grid):
            found = _ask(explain, resized(images, least))
            if not isinstance(found, Exception) and min(found.diagnostics.layouts[0].grid, default=0) > 1:
                break
        results = []
        for other in other_sizes(size, least):
            probe = resized(images, other)
            found = _ask(explain, probe)
            if isinstance(found, Exception):
                raise ExportError(
                    f"dynamic_size=True is not to be had: the model takes images of {size[0]} x {size[1]}, and fails on "
                    f"{other[0]} x {other[1]} ({said(found)[:-1]}). A size that is part of the model (a linear layer over the "
                    "positions, a table of positions) stays so in its export."
                ) from found
            how, then = found.diagnostics, expected.diagnostics
            if (how.layers, how.layouts[0].kind, how.engine) != (then.layers, layout.kind, then.engine):
                raise ExportError(
                    f"dynamic_size=True is not to be had: for images of {size[0]} x {size[1]} layer {then.layers[0]!r} is read "
                    f"as {layout.kind} and explained by {then.engine!r}, for {other[0]} x {other[1]} {how.layers[0]!r} as "
                    f"{how.layouts[0].kind} by {how.engine!r}. Does the model pool with a window of fixed size? A global "
                    "average pool (nn.AdaptiveAvgPool2d(1)) is the same for every size."
                )
            results.append((probe, found))
    return least, results


def _candidates(size: tuple[int, ...], grid: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Least sizes, from two strides upwards to the size itself."""
    least = tuple(2 * -(-side // positions) for side, positions in zip(size, grid, strict=True))
    while any(low < side for low, side in zip(least, size, strict=True)):
        yield tuple(min(low, side) for low, side in zip(least, size, strict=True))
        least = tuple(2 * low for low in least)
    yield size


def _ask(explain: Callable[..., Any], images: Tensor) -> Any:
    try:
        return explain(images)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises on images of another size
        return error
