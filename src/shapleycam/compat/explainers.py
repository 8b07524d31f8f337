"""The explainer as the drop-in classes use it: it remembers its terms, and can show a principal component instead of a sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..derivatives import Terms
from ..errors import InputError, TargetError
from ..explainer import Explainer
from ..methods.perturbation import check_chunk
from ..methods.reduce import shares
from ..methods.table import Method
from ..utilities.outputs import logits_of

Target = Callable[[Any], Tensor]


class PerImage:
    """A utility made of one callable per image; ``targets`` is set for every call."""

    __name__ = "targets"

    def __init__(self) -> None:
        self.targets: Sequence[Target] = ()

    def __call__(self, outputs: Any, classes: Tensor | None = None) -> Tensor:
        """[N] for the outputs of the first N images."""
        return _values(self.targets, outputs)

    def rows(self, rows: Tensor) -> PerImage:
        """The utility of outputs whose row i belongs to image ``rows[i]``."""
        chosen = PerImage()
        chosen.targets = [self.targets[row] for row in rows.tolist()]
        return chosen


def _values(targets: Sequence[Target], outputs: Any) -> Tensor:
    if not isinstance(outputs, (Tensor, list, tuple)):
        outputs = logits_of(outputs)
        if outputs is None:
            raise InputError(
                "The model returns neither a tensor, nor a list, nor an object with logits: wrap it so that it does."
            )
    values = []
    # A plan is made with the first images only.
    for target, output in zip(targets, outputs, strict=False):
        value = target(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TargetError(f"A target must return one value for its image's output; {target!r} returned {got}.")
        values.append(value.reshape(()))
    return torch.stack(values)


class DropInExplainer(Explainer):
    """An explainer for one utility, with or without smoothing.

    Args:
        principal: maps are the first principal component of the weighted activations instead of their sum.
        options: as for :class:`shapleycam.Explainer`.
    """

    def __init__(self, *arguments: Any, principal: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.principal = principal
        #: of the last call, one per target layer
        self.terms: list[Terms] = []

    def set_chunk(self, rows: int | None) -> None:
        """How many rows go through the model at once, for the methods that ask it many times; None to have it chosen."""
        self._settings = replace(self._settings, chunk=check_chunk(rows))

    def _reduce(self, method: Method, term: Terms, alpha: Tensor | None, classes: int) -> tuple[Tensor, str]:
        self.terms.append(term)
        if not self.principal and method.pooling != "principal":
            return super()._reduce(method, term, alpha, classes)
        maps = torch.stack([principal_map(part) for part in shares(method, term, alpha, self.backend)], 1)
        return maps.expand(-1, classes, -1), "torch"

    def _draw(self, activations: Tensor, classes: int) -> Tensor:
        # NumPy's global generator, which is what a user of RandomCAM seeds.
        drawn = np.random.uniform(-1, 1, tuple(activations.shape[:2]))  # noqa: NPY002
        return torch.from_numpy(drawn)[:, None].to(activations.device)


def principal_map(weighted: Tensor) -> Tensor:
    """Each image's positions, centred per channel, projected on their first principal component, with LAPACK's sign.

    The sign of a singular vector is chance, and a map's ReLU makes it matter. To give the same maps as pytorch-grad-cam,
    this is the routine that it calls, in the same precision, on the host.

    Args:
        weighted: [N, C, S].

    Returns:
        [N, S] on the device of ``weighted``; NaN for an image with NaN or Inf in it.
    """
    finite = weighted.isfinite().flatten(1).all(1)
    clean = torch.where(finite[:, None, None], weighted, 0.0)
    x = clean.mT.cpu().numpy()
    x = x - x.mean(1, keepdims=True)
    directions = np.linalg.svd(x, full_matrices=False)[2][:, :1]  # [N, 1, C]
    projected = torch.from_numpy(np.ascontiguousarray((x @ directions.transpose(0, 2, 1))[:, :, 0])).to(weighted.device)
    return torch.where(finite[:, None], projected, float("nan"))
