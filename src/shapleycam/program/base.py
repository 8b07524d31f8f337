"""What every program is: a module ``(images, targets) -> (logits, targets, raw, maps)``, with its checks and its end."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..derivatives.path import Path, gauss_legendre
from ..errors import ExportError, InputError, ModelStateError
from ..methods.table import Method
from ..model.layouts import Layout
from ..model.state import ModeCheck
from ..ops import reference
from ..utilities.named import Utility

#: What a program may be asked to explain: the predicted class, the classes it is given, or all classes.
TARGETS = ("predicted", "given", "all")


class Explained(NamedTuple):
    """What a program returns, on the images' device.

    Attributes:
        logits: [N, K], the model's dtype.
        targets: the explained classes, int64 [N] or [N, M].
        raw: signed maps before the final ReLU, [N, *grid] or [N, M, *grid]; float32 (float64 for a float64 model).
        maps: their display form in [0, 1], [N, *size] or [N, M, *size], in the dtype of ``raw``.
    """

    logits: Tensor
    targets: Tensor
    raw: Tensor
    maps: Tensor


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a program does.

    Attributes:
        layer: the dotted name of the target layer.
        layout: how its output is read.
        method, utility, path: rows of their tables, and the path from the baseline.
        engine: a derivative engine; "quadrature" with a number of nodes.
        image_shape: of one image, without the batch.
        size: of the maps; "layer" or "image" where that of the images is free.
        targets: one of :data:`TARGETS`.
        writes: an operator behind the layer writes into its output.
        images_as: the keyword under which the model takes the images.
        least: the least height and width of images, where these are free; else empty.

    Raises:
        ExportError: the method, engine or baseline is none that a program has.
        InputError: ``targets`` is unknown.
    """

    layer: str
    layout: Layout
    method: Method
    utility: Utility
    path: Path
    engine: str
    image_shape: tuple[int, ...]
    size: tuple[int, ...] | str
    targets: str = "predicted"
    writes: bool = False
    images_as: str | None = None
    least: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.method.order == 0 or self.method.pooling == "principal":
            raise ExportError(
                f"Programs have the methods with derivatives and a pooling (ShapleyCAM, GradCAM, …), not {self.method.title}."
            )
        if self.engine == "quadrature" and (self.path.masks or not isinstance(self.path.nodes, int)):
            raise ExportError("Programs have quadrature with a number of nodes, without masks: nodes=4.")
        baseline = self.path.baseline
        if isinstance(baseline, Tensor) and baseline.ndim == 3 and baseline.shape[0] != 1:
            raise ExportError(
                f"A program takes any number of images, and the baseline {tuple(baseline.shape)} is for "
                f"{baseline.shape[0]}: give one that broadcasts, such as [C, 1]."
            )
        if self.targets not in TARGETS:
            raise InputError(f"targets must be one of {', '.join(map(repr, TARGETS))}, got {self.targets!r}.")

    @property
    def rule(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Nodes and weights of the path's integral, where it takes the place of the second derivative."""
        if self.engine != "quadrature" or self.method.order < 2 or not isinstance(self.path.nodes, int):
            return None
        return gauss_legendre(self.path.nodes)


class Program(nn.Module):
    """An explainer's road as a module; made by :meth:`shapleycam.Explainer.program`.

    It holds the user's very model: a parameter or buffer that changes is followed, and a module that was replaced, added or
    removed is refused, as is training mode. Whatever else the model holds (a number, a tensor that is no buffer, a hook, a
    function) is followed where the head is pool-and-linear, as the model itself runs there, and stays what it was when the
    program was made where the head was traced. One that was made for :meth:`shapleycam.Explainer.compile` holds weights of
    its own instead. What is made under autocast has none of it; in a call, autocast acts on a model that runs, and not on a
    traced graph.

    Args:
        model: in evaluation mode; None for a program with weights of its own.
        recipe: what to do with it.
    """

    baseline: Tensor | None

    def __init__(self, model: nn.Module | None, recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        self.layer, self.layout, self.method, self.utility = recipe.layer, recipe.layout, recipe.method, recipe.utility
        self.engine, self.targets = recipe.engine, recipe.targets
        self.image_shape, self.size, self.least = recipe.image_shape, recipe.size, recipe.least
        baseline = recipe.path.baseline
        self._named_baseline = recipe.path.start
        self.register_buffer("baseline", baseline if isinstance(baseline, Tensor) else None, persistent=False)
        self._mode = None if model is None else ModeCheck(model)
        self.eval()

    def extra_repr(self) -> str:
        return (
            f"layer={self.layer!r}, method={self.method.name!r}, utility={self.utility.name!r}, engine={self.engine!r}, "
            f"targets={self.targets!r}, size={self.size}"
        )

    def train(self, mode: bool = True) -> Program:
        """The mode is the model's own affair; a program has none."""
        self.training = False
        return self

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Explained:
        """Explain a batch.

        Args:
            images: floating [N, channels, H, W] of the size and on the device that the program was made for; of any height
                and width from ``least`` on, where these are free.
            targets: int64 [N] or [N, M] for ``targets="given"``, where -1 is the predicted class and any other index that is
                no class gives a map of NaN; None (also otherwise) for the predicted one.

        Raises:
            InputError: images of another size, targets that the program does not take, or not one row of them for each image.
            ModelStateError: the model was edited, or is in training mode.
        """
        self.check(images, targets)
        self.check_model()
        with torch.no_grad():
            return self.explain(images, targets)

    def check_model(self) -> None:
        """Raise ModelStateError where the model was edited, or is in training mode."""
        if self._mode is not None and self._mode.check():
            raise ModelStateError(
                "The model was edited after this program was made: make another by explainer.program(images)."
            )

    def check(self, images: Tensor, targets: Tensor | None) -> None:
        """Raise InputError unless the program takes these images and targets."""
        if self.least:
            fits = images.ndim == 4 and images.shape[1] == self.image_shape[0]
            if not fits or images.shape[2] < self.least[0] or images.shape[3] < self.least[1]:
                raise InputError(
                    f"This program explains images [N, {self.image_shape[0]}, H, W] with H >= {self.least[0]} and W >= "
                    f"{self.least[1]}, got {tuple(images.shape)}."
                )
        elif tuple(images.shape[1:]) != self.image_shape:
            raise InputError(
                f"This program explains images [N, {', '.join(map(str, self.image_shape))}], got {tuple(images.shape)}."
            )
        if targets is not None and self.targets != "given":
            raise InputError(f"This program was made for targets={self.targets!r}: call it without targets.")
        if targets is not None and (targets.ndim not in (1, 2) or targets.dtype != torch.int64):
            raise InputError(f"targets must be int64 [N] or [N, M], got {targets.dtype} {tuple(targets.shape)}.")
        if targets is not None and targets.shape[0] != images.shape[0]:
            raise InputError(f"targets must have a row for each of {images.shape[0]} images, got {tuple(targets.shape)}.")

    def explain(self, images: Tensor, targets: Tensor | None) -> Explained:
        """:meth:`forward` without its checks: nothing but tensors, for what traces or compiles."""
        several = self.targets == "all" or (targets is not None and targets.ndim == 2)
        wanted = targets[:, None] if targets is not None and targets.ndim == 1 else targets
        logits, chosen, raw, grid = self._maps(images, wanted)
        # A network may swallow NaN or Inf in an image; its map must not.
        raw = raw + (images.flatten(1).sum(1, dtype=reference.accumulator(images.dtype)) * 0)[:, None, None].to(raw.dtype)
        rows = raw.flatten(0, 1).unflatten(1, grid)  # by rows, as unflatten of [N, 1, S] asks whether h divides 1
        shaped, maps = (
            each.unflatten(0, (-1, chosen.shape[1])) for each in (rows, self._display(rows, tuple(images.shape[2:])))
        )
        if several:
            return Explained(logits, chosen, shaped, maps)
        return Explained(logits, chosen[:, 0], shaped[:, 0], maps[:, 0])

    def _display(self, raw: Tensor, image: tuple[int, ...]) -> Tensor:
        """Display maps [N, *size] of signed maps [N, *grid]."""
        if not isinstance(self.size, str):
            return reference.display_map(raw, self.size, True)
        if self.size == "layer":
            return reference.display_map(raw, tuple(raw.shape[1:]), True)
        # Whether the sizes differ, which the operator asks, a graph of any size cannot tell.
        maps = reference.display_map(raw, tuple(raw.shape[1:]), False)
        maps = F.interpolate(maps[:, None], image, mode="bilinear", align_corners=False)[:, 0]
        return reference.display_map(maps, image, False)

    @abstractmethod
    def _maps(self, images: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
        """The logits [N, K], the classes [N, M], the signed maps [N, M, S] and their grid; ``targets`` are [N, M], or None."""


def map_size(size: str | int | Sequence[int], grid: tuple[int, ...], image: tuple[int, ...]) -> tuple[int, ...]:
    """The size of the maps: "layer", "image", one number, or one for each dimension.

    Raises:
        InputError: it is none of these.
    """
    if size in ("layer", "image"):
        return grid if size == "layer" else image
    wanted = (size,) * len(grid) if isinstance(size, int) else size if isinstance(size, str) else tuple(size)
    if isinstance(wanted, str) or len(wanted) != len(grid) or any(not isinstance(s, int) or s < 1 for s in wanted):
        raise InputError(f"size must be 'layer', 'image', or {len(grid)} positive integers, got {size!r}.")
    return wanted
