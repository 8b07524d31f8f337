"""Smoothing by test-time augmentation: the mean of the maps of an image's mirrored and rescaled versions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from .errors import InputError
from .explainer import Explainer
from .explanation import Explanation


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Smoothed(Explanation):
    """An explanation whose heatmaps are the mean of several views' heatmaps.

    Outputs, targets, raw maps and diagnostics are those of the image as it was given.

    Attributes:
        views: the explanation of every view, and whether the view is mirrored.
    """

    views: tuple[tuple[Explanation, bool], ...] = ()

    def heatmaps(self, size: Sequence[int] | int | None = None) -> Tensor:
        """The mean of the views' heatmaps, each mirrored back; see :meth:`Explanation.heatmaps`.

        The mean is not stretched to [0, 1] again: where the views disagree, its maximum is below 1.
        """
        maps = [view.heatmaps(size) for view, _ in self.views]
        return torch.stack([m.flip(-1) if mirrored else m for m, (_, mirrored) in zip(maps, self.views, strict=True)]).mean(0)

    @property
    def finite(self) -> Tensor:
        """Bool [N] on the device: whether all views' maps hold neither NaN nor Inf."""
        return torch.stack([view.finite for view, _ in self.views]).all(0)

    def _each(self, change: Callable[[Tensor], Tensor], outputs: Any, view: Callable[[Explanation], Explanation]) -> Self:
        # Not super(): dataclass makes the class anew to give it slots.
        same = Explanation._each(self, change, outputs, view)
        return replace(same, views=tuple((view(one), mirrored) for one, mirrored in self.views))


def smoothed(
    explainer: Explainer,
    images: Tensor,
    targets: Any = None,
    *,
    mirror: bool = True,
    factors: Sequence[float] = (0.9, 1.0, 1.1),
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Smoothed:
    """Explain a batch through several views of it: as it is and mirrored left to right, each multiplied by every factor.

    The defaults are the six views of pytorch-grad-cam's ``aug_smooth=True``. All views explain the same class: with
    ``targets=None`` the one predicted for the image as it is (pytorch-grad-cam takes each view's own prediction). One call of
    the explainer per view.

    Args:
        explainer: any explainer.
        images, targets: as for :meth:`Explainer.__call__`. The factors multiply the images as given, so normalised ones.
        mirror: whether to take the mirrored views too.
        factors: finite numbers other than 0; 1 need not be among them.
        args, kwargs: what the model takes besides the images; the same for all views.

    Raises:
        InputError: ``factors`` is empty or holds something else, the utility is tied to places in the image (which would have
            to be mirrored too), or as the explainer.
    """
    if not factors or not all(isinstance(f, (int, float)) and abs(f) not in (0.0, float("inf")) and f == f for f in factors):
        raise InputError(f"factors must be finite numbers other than 0, at least one, got {factors!r}.")
    if mirror and getattr(explainer.utility.value, "tied_to_places", False):
        raise InputError(
            f"The utility {explainer.utility.name!r} is tied to places in the image, which do not move when the image is "
            "mirrored. Use mirror=False."
        )
    plain = explainer(images, targets, args=args, kwargs=kwargs)
    if plain.targets is not None:
        targets = plain.targets
    views = []
    for mirrored in (False, True) if mirror else (False,):
        view = images.flip(-1) if mirrored else images
        for factor in factors:
            same = factor == 1 and not mirrored
            views.append((plain if same else explainer(view * factor, targets, args=args, kwargs=kwargs), mirrored))
    known = {field.name: getattr(plain, field.name) for field in fields(Explanation)}
    return Smoothed(**known, views=tuple(views))
