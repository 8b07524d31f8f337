"""What an explainer returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops
from .errors import InputError


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """How an explanation was made.

    Attributes:
        method, utility: the names of the rows that were used.
        engine: which derivative engine served: "closed_form", "reverse_over_reverse", "forward_over_reverse", "midpoint",
            or "none" for the methods without derivatives (RandomCAM, ScoreCAM, AblationCAM, EigenCAM).
        backend: which operator backend made the raw maps: "cuda", "triton", "native" or "torch".
        layers: the names of the target layers.
        layouts: how their outputs were read.
        notes: what the explainer had to say about this model, once for all calls.
    """

    method: str
    utility: str
    engine: str
    backend: str
    layers: tuple[str, ...]
    layouts: tuple[Any, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    """Maps for a batch of N images, on the model's device, with nothing waited for.

    Attributes:
        outputs: what the model returned.
        logits: the logits in it, [N, K] in the model's dtype, without gradients; None if there are none.
        targets: the explained classes, int64, [N], or [N, M] where M classes per image were asked for; None without logits.
        raws: one signed map per target layer, before the final ReLU, [N, h, w] or [N, M, h, w]; float32 (float64 for a
            float64 model). An image with NaN or Inf in its pixels or its activations has a map of NaN.
        image_size: the spatial shape of the images.
        diagnostics: how the maps were made.
        hvp_ratio: |HA| / |g| per image (and class), if asked for with ``with_norms=True``: how much the second order says.
        gap: U(A) - U(0) - Σ A·w per image (and class), if asked for with ``with_gap=True``: how far the expansion is from
            the efficiency axiom (zero for a utility quadratic in A).
    """

    outputs: Any
    logits: Tensor | None
    targets: Tensor | None
    raws: tuple[Tensor, ...]
    image_size: tuple[int, ...]
    diagnostics: Diagnostics
    hvp_ratio: Tensor | None = None
    gap: Tensor | None = None
    backend: str = "auto"

    @property
    def raw(self) -> Tensor:
        """The signed map of the only target layer, [N, h, w] or [N, M, h, w].

        Raises:
            InputError: there are several target layers; use ``raws``.
        """
        if len(self.raws) != 1:
            raise InputError(
                f"There are maps of {len(self.raws)} layers {list(self.diagnostics.layers)}: use .raws or .heatmaps()."
            )
        return self.raws[0]

    @property
    def probabilities(self) -> Tensor:
        """Softmax probability of the targets, [N] or [N, M], float32 (float64 for a float64 model).

        Raises:
            InputError: the model returned no logits [N, K].
        """
        if self.logits is None or self.targets is None or self.logits.ndim != 2:
            raise InputError("The model returned no logits [N, K], so there are no class probabilities.")
        wide = torch.promote_types(self.logits.dtype, torch.float32)
        p = self.logits.softmax(1, dtype=wide)
        targets = self.targets if self.targets.ndim == 2 else self.targets[:, None]
        return p.gather(1, targets).reshape(self.targets.shape)

    @property
    def finite(self) -> Tensor:
        """Bool [N] on the device: whether the image's maps hold neither NaN nor Inf (an input with either fails too)."""
        flags = [torch.isfinite(raw.flatten(1)).all(1) for raw in self.raws]
        return torch.stack(flags).all(0)

    def check(self) -> Explanation:
        """Wait for the maps and return self if all are finite.

        Raises:
            InputError: names the images whose pixels, activations or targets gave NaN or Inf.
        """
        wrong = (~self.finite).nonzero().flatten().tolist()
        if wrong:
            raise InputError(
                f"The maps of images {wrong} are not finite: NaN or Inf in the image or in the activations of "
                f"{', '.join(self.diagnostics.layers)}, or a target out of range. Check preprocessing and dtype."
            )
        return self

    def agreement(self, oracle: Any) -> Any:
        """The same as ``oracle.agreement(self)``; see :meth:`shapleycam.shapley.ShapleyValues.agreement`."""
        return oracle.agreement(self)

    def heatmaps(self, size: Sequence[int] | int | None = None) -> Tensor:
        """The display form: ReLU, min-max, resize, mean over layers, min-max (arXiv 2501.06261).

        Args:
            size: spatial size of the result; None for the images' own, an int for all dimensions alike.

        Returns:
            [N, *size] or [N, M, *size] in [0, 1], float32 (float64 for a float64 model), on the device. NaN stays NaN.

        Raises:
            InputError: the size does not fit the maps' number of dimensions or is not positive.
        """
        target = self._size(size)
        several = len(self.raws) > 1
        maps = []
        for raw in self.raws:
            flat = raw.flatten(0, 1) if self._multi else raw
            maps.append(ops.display_map(flat, target, renormalize=not several, backend=self.backend))
        out = maps[0]
        if several:
            # Already at the final size: the resize in this last step changes nothing.
            out = ops.display_map(torch.stack(maps).mean(0), target, renormalize=False, backend=self.backend)
        return out.unflatten(0, self.raws[0].shape[:2]) if self._multi else out

    def overlay(
        self,
        images: Tensor,
        *,
        colormap: str = "jet",
        alpha: float = 0.5,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> Tensor:
        """The heatmaps drawn over the images.

        Args:
            images: [N, 3, H, W] uint8, or floating in [0, 1], or normalised with ``mean`` and ``std`` (3 numbers each).
            colormap: "jet", "turbo", "viridis" or "magma".
            alpha: weight of the heatmap, 0 to 1.
            mean, std: undo this normalisation first.

        Returns:
            uint8 [N, H, W, 3] (or [N, M, H, W, 3]) on the device; positions without a finite value are magenta.

        Raises:
            InputError: the images do not match the explained batch, or an argument is out of range.
        """
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[0] != self.raws[0].shape[0]:
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise InputError(f"images must be a tensor [{self.raws[0].shape[0]}, 3, H, W] for this explanation, got {got}.")
        maps = self.heatmaps(tuple(images.shape[2:]))
        if self._multi:
            classes = maps.shape[1]
            images, maps = images.repeat_interleave(classes, 0), maps.flatten(0, 1)
        drawn = ops.overlay(
            images.to(maps.device), maps, colormap=colormap, alpha=alpha, mean=mean, std=std, backend=self.backend
        )
        return drawn.unflatten(0, self.raws[0].shape[:2]) if self._multi else drawn

    @property
    def _multi(self) -> bool:
        return self.targets is not None and self.targets.ndim == 2

    def _size(self, size: Sequence[int] | int | None) -> tuple[int, ...]:
        dims = self.raws[0].ndim - (2 if self._multi else 1)
        if size is None:
            return self.image_size
        wanted = (size,) * dims if isinstance(size, int) else tuple(size)
        if len(wanted) != dims or any(not isinstance(s, int) or s < 1 for s in wanted):
            raise InputError(f"size must be {dims} positive integers for maps of {dims} dimensions, got {size!r}.")
        return wanted
