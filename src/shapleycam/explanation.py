"""What an explainer returns."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import ops
from .errors import InputError


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """How an explanation was made.

    Attributes:
        method, utility: the names of the rows that were used.
        engine: which derivative engine served: "closed_form", "gauss_newton", "reverse_over_reverse",
            "forward_over_reverse", "quadrature", "midpoint", or "none" for the methods without derivatives (RandomCAM,
            ScoreCAM, AblationCAM, EigenCAM).
        backend: which operator backend made the raw maps: "cuda", "triton", "native" or "torch".
        layers: the names of the target layers.
        layouts: how their outputs were read.
        notes: what the explainer had to say about this model, and about these images.
        baseline: what the content was counted from: "zero", "mean" or "tensor".
        nodes: how many nodes of the path were read, for the engines "quadrature" and "midpoint"; else None.
    """

    method: str
    utility: str
    engine: str
    backend: str
    layers: tuple[str, ...]
    layouts: tuple[Any, ...]
    notes: tuple[str, ...] = ()
    baseline: str = "zero"
    nodes: int | None = None


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Explanation:
    """Maps for a batch of N images, on the model's device, with nothing waited for.

    It is a sequence of its images: ``len(e)`` is N, ``e[2:5]`` the explanation of three of them, ``e[e.finite]`` of those that
    a mask picks, and iterating gives explanations of one image each. :meth:`to` and :meth:`cpu` move it, and it can be pickled.
    Two explanations are equal only if they are the same object; compare their tensors.

    Attributes:
        outputs: what the model returned.
        logits: the logits in it, [N, K] in the model's dtype, without gradients; None if there are none.
        targets: the explained classes, int64, [N], or [N, M] where M classes per image were asked for; None without logits.
        raws: one signed map per target layer, before the final ReLU, [N, h, w] or [N, M, h, w]; float32 (float64 for a
            float64 model). An image with NaN or Inf in its pixels or its activations has a map of NaN.
        image_size: the spatial shape of the images.
        diagnostics: how the maps were made.
        hvp_ratio: |HA| / |g| per image (and class), if asked for with ``with_norms=True``: how much the second order says.
            Under quadrature 2 (g - w) takes the place of HA.
        gap: U(A) - U(B) - Σ (A - B)·w per image (and class), if asked for with ``with_gap=True``: how far the weights are from
            the efficiency axiom (zero for a utility quadratic in A); B is the baseline.
        standard_errors: per target layer, in the shape of ``raws``: of the sums over the channels of (A - B)·w (the map of
            ShapleyCAM-H), where the path was sampled (``masks=``); else None.
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
    standard_errors: tuple[Tensor, ...] | None = None

    def __repr__(self) -> str:
        how, raw = self.diagnostics, self.raws[0]
        several = f" of {raw.shape[1]} classes" if self._multi else ""
        maps = ", ".join(f"{tuple(r.shape[2 if self._multi else 1 :])}" for r in self.raws)
        return (
            f"{type(self).__name__}({len(self)} images{several}, method={how.method!r}, utility={how.utility!r}, "
            f"layers={list(how.layers)}, maps={maps}, engine={how.engine!r}, {raw.dtype}, device='{raw.device}')"
        )

    def __len__(self) -> int:
        return self.raws[0].shape[0]

    def __iter__(self) -> Iterator[Self]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Self:
        """The explanation of some of the images, always as a batch: ``e[3]`` is a batch of one, so that it has heatmaps.

        In ``outputs``, which may hold anything, every tensor whose first dimension is N is cut, and a list of N mappings (as
        detectors return it); everything else stays whole.

        Args:
            rows: an int (from the end if negative), a slice, a sequence of ints, or a tensor, int [R] or bool [N].

        Raises:
            InputError: an index of another type or shape, or out of range.
        """
        count = len(self)
        index = _index(rows, count)

        def cut(tensor: Tensor) -> Tensor:
            return tensor[index if isinstance(index, slice) else index.to(tensor.device)]

        def cut_rows(tensor: Tensor) -> Tensor:
            return cut(tensor) if tensor.ndim and tensor.shape[0] == count else tensor

        if isinstance(self.outputs, list) and len(self.outputs) == count and all(isinstance(o, Mapping) for o in self.outputs):
            outputs: Any = [self.outputs[i] for i in cut(torch.arange(count)).tolist()]
        else:
            outputs = tree_map_only(Tensor, cut_rows, self.outputs)
        return self._each(cut, outputs, lambda view: view[rows])

    def to(self, device: torch.device | str) -> Self:
        """The same on another device; a backend that was named stays so only on devices of the same kind."""
        device = torch.device(device)

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device)

        moved = self._each(move, tree_map_only(Tensor, move, self.outputs), lambda view: view.to(device))
        return moved if device.type == self.raws[0].device.type else replace(moved, backend="auto")

    def cpu(self) -> Self:
        """The same in host memory; waits for the device."""
        return self.to("cpu")

    def _each(self, change: Callable[[Tensor], Tensor], outputs: Any, view: Callable[[Explanation], Explanation]) -> Self:
        """This with every tensor of its own changed; ``view`` is for the explanations in it, where a subclass holds some."""
        return replace(
            self,
            outputs=outputs,
            logits=None if self.logits is None else change(self.logits),
            targets=None if self.targets is None else change(self.targets),
            raws=tuple(change(raw) for raw in self.raws),
            hvp_ratio=None if self.hvp_ratio is None else change(self.hvp_ratio),
            gap=None if self.gap is None else change(self.gap),
            standard_errors=None if self.standard_errors is None else tuple(change(e) for e in self.standard_errors),
        )

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


def _index(rows: Any, count: int) -> slice | Tensor:
    """``rows`` as what cuts the first dimension of a tensor: a slice that goes forward, or int64 [R] in host memory."""
    if isinstance(rows, slice):
        try:
            chosen = range(*rows.indices(count))
        except TypeError as error:
            raise InputError(f"A slice of an explanation must be of ints, got {rows!r}.") from error
        return rows if chosen.step > 0 else torch.tensor(chosen, dtype=torch.int64)
    if not isinstance(rows, bool) and not (isinstance(rows, Tensor) and (rows.ndim or rows.dtype == torch.bool)):
        try:
            i = operator.index(rows)
        except TypeError:
            pass
        else:
            if not -count <= i < count:
                raise InputError(f"Image {i} is out of range: the explanation is of {count} images.")
            i %= count
            return slice(i, i + 1)
    try:
        index = rows.cpu() if isinstance(rows, Tensor) else torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"An explanation is indexed by an int, a slice, ints [R] or a mask [N], got {rows!r}.") from error
    if index.numel() == 0 and index.ndim == 1:
        index = index.long()  # of an empty list
    mask = index.dtype == torch.bool
    if index.ndim != 1 or index.is_floating_point() or index.is_complex() or (mask and len(index) != count):
        raise InputError(
            f"An explanation of {count} images is indexed by an int, a slice, ints [R] or a mask [{count}], got {index.dtype} "
            f"{tuple(index.shape)}."
        )
    if mask:
        return index.nonzero().flatten()
    wrong = index[(index < -count) | (index >= count)]
    if wrong.numel():
        raise InputError(f"Image {int(wrong[0])} is out of range: the explanation is of {count} images.")
    return index.long() % count
