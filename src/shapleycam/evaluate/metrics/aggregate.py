"""Means over images as torchmetrics classes: mergeable, resettable, synchronised across processes.

Every metric sums in float64. An image whose value is NaN or Inf (NaN in its pixels, say) takes no part in the mean and is
counted in the state ``skipped``; the state ``images`` counts the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from .curves import area, deletion, insertion
from .functional import adcc, coherency, complexity, drop, increase
from .road import PERCENTILES, road


class _MeanOverImages(Metric):
    """Sums of per-image rows [N, parts]."""

    is_differentiable = False
    full_state_update = False
    higher_is_better: bool | None = None
    parts: ClassVar[int] = 1

    totals: Tensor
    images: Tensor
    skipped: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("totals", torch.zeros(self.parts, dtype=torch.float64), "sum", persistent=True)
        self.add_state("images", torch.zeros((), dtype=torch.int64), "sum", persistent=True)
        self.add_state("skipped", torch.zeros((), dtype=torch.int64), "sum", persistent=True)

    def _add(self, rows: Tensor) -> None:
        rows = rows.detach().double().reshape(rows.shape[0], self.parts)
        good = rows.isfinite().all(1)
        self.totals = self.totals + torch.where(good[:, None], rows, 0.0).sum(0)
        self.images = self.images + good.sum()
        self.skipped = self.skipped + (~good).sum()

    def _means(self) -> Tensor:
        return self.totals / self.images  # NaN without images

    def compute(self) -> Any:
        """The mean over the images, a float64 scalar; NaN before the first image."""
        return self._means()[0]


class AverageDrop(_MeanOverImages):
    """Mean of max(0, p - p⁺) / p, in [0, 1]; lower is better."""

    higher_is_better = False

    def update(self, probabilities: Tensor, kept: Tensor) -> None:
        """Add images by p and p⁺, each [N]."""
        self._add(drop(probabilities, kept))


class AverageDropInDeletion(_MeanOverImages):
    """Mean of max(0, p - p⁻) / p, in [0, 1]; higher is better."""

    higher_is_better = True

    def update(self, probabilities: Tensor, deleted: Tensor) -> None:
        """Add images by p and p⁻, each [N]."""
        self._add(drop(probabilities, deleted))


class IncreaseInConfidence(_MeanOverImages):
    """Share of images with p⁺ > p, in [0, 1]; higher is better."""

    higher_is_better = True

    def update(self, probabilities: Tensor, kept: Tensor) -> None:
        """Add images by p and p⁺, each [N]."""
        self._add(increase(probabilities, kept))


class Coherency(_MeanOverImages):
    """Mean of (Pearson(M, M′) + 1) / 2, 0 for a pair with NaN, Inf or no variance; higher is better."""

    higher_is_better = True

    def update(self, maps: Tensor, again: Tensor) -> None:
        """Add images by M and M′, each [N, *size]."""
        self._add(coherency(maps, again))


class Complexity(_MeanOverImages):
    """Mean of mean |M|, in [0, 1]; lower is better."""

    higher_is_better = False

    def update(self, maps: Tensor) -> None:
        """Add images by M, [N, *size]."""
        self._add(complexity(maps))


class ADCC(_MeanOverImages):
    """All parts of the evaluation at once, and ADCC = 3 / (1/Coh + 1/(1 - Com) + 1/(1 - AD)) of their means.

    ``compute`` returns ``{"AD", "Coh", "Com", "ADCC", "IC", "ADD"}``, float64 scalars in [0, 1], so that Lightning's
    ``log_dict`` takes it. An image counts in all parts or in none.
    """

    higher_is_better = True
    parts: ClassVar[int] = 5

    def update(self, probabilities: Tensor, kept: Tensor, deleted: Tensor, maps: Tensor, again: Tensor) -> None:
        """Add images by p, p⁺, p⁻ [N], M and M′ [N, *size]; ``metric.update(*measurement.tensors)``."""
        columns = (
            drop(probabilities, kept),
            coherency(maps, again),
            complexity(maps),
            increase(probabilities, kept),
            drop(probabilities, deleted),
        )
        self._add(torch.stack(columns, 1))

    def compute(self) -> dict[str, Tensor]:
        """The table's row."""
        ad, coh, com, ic, add = self._means().unbind()
        return {"AD": ad, "Coh": coh, "Com": com, "ADCC": adcc(ad, coh, com), "IC": ic, "ADD": add}

    def save(self) -> dict[str, Any]:
        """The state as plain numbers; JSON keeps them to the last digit."""
        return {"totals": self.totals.tolist(), "images": int(self.images), "skipped": int(self.skipped)}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Add what :meth:`save` returned to this metric's state."""
        self.totals = self.totals + torch.tensor(saved["totals"], dtype=torch.float64, device=self.totals.device)
        self.images = self.images + int(saved["images"])
        self.skipped = self.skipped + int(saved["skipped"])
        self._update_count += 1
        self._computed = None


class InsertionAUC(_MeanOverImages):
    """Mean area under :func:`shapleycam.metrics.insertion`; higher is better. Arguments as there."""

    higher_is_better = True

    def __init__(self, steps: int = 50, baseline: str | Tensor = "blur", chunk: int = 64, **options: Any) -> None:
        super().__init__(**options)
        self._how: dict[str, Any] = {"steps": steps, "baseline": baseline, "chunk": chunk}

    def update(self, model: nn.Module, images: Tensor, maps: Tensor, targets: Tensor, **inputs: Any) -> None:
        """Add images [N, channels, *size] by their maps [N, *size] and classes [N].

        ``inputs`` are ``output``, ``args``, ``kwargs`` and ``images_as`` of the function.
        """
        self._add(area(insertion(model, images, maps, targets, **self._how, **inputs)))


class DeletionAUC(_MeanOverImages):
    """Mean area under :func:`shapleycam.metrics.deletion`; lower is better. Arguments as there."""

    higher_is_better = False

    def __init__(self, steps: int = 50, baseline: str | Tensor = "zero", chunk: int = 64, **options: Any) -> None:
        super().__init__(**options)
        self._how: dict[str, Any] = {"steps": steps, "baseline": baseline, "chunk": chunk}

    def update(self, model: nn.Module, images: Tensor, maps: Tensor, targets: Tensor, **inputs: Any) -> None:
        """Add images [N, channels, *size] by their maps [N, *size] and classes [N].

        ``inputs`` are ``output``, ``args``, ``kwargs`` and ``images_as`` of the function.
        """
        self._add(area(deletion(model, images, maps, targets, **self._how, **inputs)))


class ROAD(_MeanOverImages):
    """Mean of :func:`shapleycam.metrics.road`; higher is better. Arguments as there.

    The noise of update number k is drawn with the seed ``seed + k``.
    """

    higher_is_better = True

    def __init__(self, percentiles: Sequence[float] = PERCENTILES, noise: float = 0.01, seed: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self._percentiles, self._noise, self._seed = tuple(percentiles), noise, seed

    def update(self, model: nn.Module, images: Tensor, maps: Tensor, targets: Tensor, **inputs: Any) -> None:
        """Add images [N, channels, H, W] by their maps [N, H, W] and classes [N]; ``inputs`` as in :class:`DeletionAUC`."""
        generator = torch.Generator(images.device).manual_seed(self._seed + self.update_count)
        how: dict[str, Any] = {"percentiles": self._percentiles, "noise": self._noise, "generator": generator}
        self._add(road(model, images, maps, targets, **how, **inputs))
