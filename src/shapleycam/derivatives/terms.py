"""What a derivative engine is asked, what it answers, and what all engines share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import InputError
from ..model.capture import Capture
from ..model.inputs import Inputs
from ..model.layouts import Layout
from ..model.pooled_linear import PooledLinear
from ..utilities.named import Utility, evaluate
from ..utilities.targets import place_targets
from .path import Path, background, points


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


@dataclass(slots=True)
class Terms:
    """What one target layer contributes, as strided [N, C, S] views.

    ``gradients`` (dU/dA) and ``hvps`` (HA) have one entry per class. Where they are constant over the positions they are
    [N, C, 1]; an hvp of None is structurally zero or was not asked for. An engine that was asked for the weight alone
    (``w = g - HA/2``, or ``w = g`` at order 1) may leave both empty and give ``weights`` [N, M, C], constant over
    the positions, or ``position_weights``, one [N, C, S] per class; quadrature gives these beside the gradients, as the
    integral that takes the place of w at order 2. ``difference`` is A - B, for a baseline other than zero.
    """

    activations: Tensor
    layout: Layout
    gradients: list[Tensor] = field(default_factory=list)
    hvps: list[Tensor | None] = field(default_factory=list)
    weights: Tensor | None = None
    position_weights: list[Tensor] = field(default_factory=list)
    difference: Tensor | None = None

    @property
    def attributed(self) -> Tensor:
        """A - B [N, C, S], which the maps weigh."""
        return self.activations if self.difference is None else self.difference

    def pairs(self, order: int) -> list[tuple[Tensor, Tensor | None]]:
        """(gradient, hvp) of every class as :func:`shapleycam.ops.weighted_reduce` takes them; hvp is None at order 1."""
        if self.weights is not None:
            return [(w[:, :, None], None) for w in self.weights.unbind(1)]
        if order == 2 and self.position_weights:
            return [(w, None) for w in self.position_weights]
        return list(zip(self.gradients, self.hvps if order == 2 else [None] * len(self.gradients), strict=True))

    def constant(self, order: int) -> Tensor | None:
        """w [N, M, C] where it is constant over the positions, else None."""
        if self.weights is not None:
            return self.weights
        pairs = self.pairs(order)
        if pairs[0][0].shape[2] == 1:
            return torch.stack([(g if h is None else g - h / 2)[:, :, 0] for g, h in pairs], 1)
        return None

    def attribution_weights(self, order: int) -> list[Tensor]:
        """``w = g - HA/2`` (the path's integral under quadrature, ``w = g`` at order 1) of every class."""
        return [g if h is None else g - h / 2 for g, h in self.pairs(order)]

    def second_order(self, m: int) -> Tensor | None:
        """HA of a class; under quadrature 2 (g - w), which takes its place in w = g - HA/2. None is structurally zero."""
        return 2 * (self.gradients[m] - self.position_weights[m]) if self.position_weights else self.hvps[m]


@dataclass(slots=True)
class Derivatives:
    """The answer of an engine.

    Attributes:
        outputs, logits: of the forward pass, without gradients.
        targets: int64 [N, M], or None without logits.
        terms: per target layer.
        engine: which engine made them; "none" where nothing was differentiated.
        value, baseline: U(A) and U(B) [N, M], if asked for.
        nan_mark: [N], NaN for images whose maps must not be shown (a target on the device out of range, say), else 0.
        nodes: how many nodes of the path were read; None without a path.
        standard_errors: of the sums of A·w over the channels, [N, M, S] per layer, where the path was sampled.
        notes: what the caller is to be told about these images.
        undefined: images whose utility is not finite somewhere on the path, of which a note speaks.
    """

    outputs: Any
    logits: Tensor | None
    targets: Tensor | None
    terms: list[Terms]
    engine: str
    value: Tensor | None = None
    baseline: Tensor | None = None
    nan_mark: Tensor | None = None
    nodes: int | None = None
    standard_errors: list[Tensor] | None = None
    notes: tuple[str, ...] = ()
    undefined: frozenset[int] = frozenset()

    def mark(self, other: Tensor | None) -> None:
        """Add another mark."""
        if other is not None:
            self.nan_mark = other if self.nan_mark is None else self.nan_mark + other

    def mark_images(self, images: Tensor) -> None:
        """Mark images with NaN or Inf in them: a network may swallow either, its map must not."""
        wide = torch.float64 if images.dtype == torch.float64 else torch.float32
        # One number tells that a CPU's batch has none of them, without waiting for anything.
        if images.device.type != "cpu" or not isfinite(images.sum(dtype=wide).item()):
            self.mark(images.detach().flatten(1).sum(1, dtype=wide) * 0)

    def norm_ratio(self) -> Tensor:
        """|HA| / |g| per image and class [N, M], over all target layers; 0 where the Hessian term is structurally zero."""
        columns = []
        for m in range(self.classes):
            g2 = torch.stack([term.gradients[m].flatten(1).float().square().sum(1) for term in self.terms]).sum(0)
            products = [h for term in self.terms if (h := term.second_order(m)) is not None]
            h2 = sum((h.flatten(1).float().square().sum(1) for h in products), torch.zeros_like(g2))
            columns.append((h2 / g2).sqrt())
        return torch.stack(columns, 1)

    def gap(self, order: int) -> Tensor:
        """U(A) - U(B) - Σ (A - B)·w per image and class [N, M]."""
        [term] = self.terms
        assert self.value is not None and self.baseline is not None
        weights = term.attribution_weights(order)
        explained = [(term.attributed * w).flatten(1).sum(1, dtype=self.value.dtype) for w in weights]
        return self.value - self.baseline - torch.stack(explained, 1)

    @property
    def classes(self) -> int:
        """M, the number of classes per image."""
        return 1 if self.targets is None else self.targets.shape[1]


@dataclass(frozen=True, slots=True)
class HeadRows:
    """What was found out about running the part behind the target layers on other rows than the images'.

    Attributes:
        alone: it depends on the one target layer's output only, so it takes any rows, behind the trunk of any images.
        apart: a target layer's output depends on another's, so that each has a path of its own.
    """

    alone: bool = False
    apart: bool = False


@dataclass(slots=True)
class Request:
    """What one call asks of an engine.

    Attributes:
        model, layers: the model and (name, module) of its target layers.
        layout_of: ``(name, module, activations, images) -> Layout``.
        utility, inputs, targets: of the call; the targets are checked, up to their range.
        order: the highest derivative wanted, 0 to 2.
        writes: something behind a target layer writes into its output, so the head needs a copy.
        head: the pool-and-linear head, where it was verified.
        with_baseline: U(A) and U(B) are wanted too.
        find_cuts: also look for operators that would silently cut the second derivative off.
        weights_only: neither g nor HA is wanted by itself.
        backend: of the operators.
        path: from the baseline to the activations; every engine attributes A - B, and quadrature goes along it.
        rows: what is known of running the head on other rows than the images'.
        chunk: how many altered activations may go through the head at once; None for what memory allows.
    """

    model: nn.Module
    layers: Sequence[tuple[str, nn.Module]]
    layout_of: Callable[[str, nn.Module, Tensor, Tensor], Layout]
    utility: Utility
    inputs: Inputs
    targets: Any
    order: int
    writes: bool
    head: PooledLinear | None = None
    with_baseline: bool = False
    find_cuts: bool = False
    weights_only: bool = False
    backend: str = "auto"
    path: Path = field(default_factory=Path)
    rows: HeadRows | None = None
    chunk: int | None = None

    @property
    def batch(self) -> int:
        return self.inputs.images.shape[0]

    def capture(self, **options: Any) -> Capture:
        """A forward pass with the target layers captured."""
        return Capture(self.model, self.layers, copy=self.writes, **options)

    def terms(self, capture: Capture) -> list[Terms]:
        """The layers' activations, without derivatives yet."""
        found = []
        for captured in capture.layers:
            assert captured.activations is not None
            found.append(self.term(captured.name, captured.module, _detached(captured.activations)))
        return found

    def term(self, name: str, module: nn.Module, activations: Tensor) -> Terms:
        """One layer's activations, in its own layout, without derivatives yet."""
        layout = self.layout_of(name, module, activations, self.inputs.images)
        term = Terms(layout.view(activations), layout)
        if not self.path.from_zero:
            term.difference = term.activations - background(self.path.baseline, term.activations)
        return term

    def direction(self, layout: Layout, activations: Tensor) -> Tensor:
        """A - B in the layer's own layout: the vector of the Hessian-vector product.

        With the baseline zero that is the layer's output, prefix tokens and all (arXiv 2501.06261); with any other, prefix
        tokens stay as they are.
        """
        if self.path.from_zero:
            return activations
        start = background(self.path.baseline, layout.view(activations))
        return activations - points(activations, layout, start, [0.0])

    def start(self, capture: Capture, outputs: Any, engine: str, terms: list[Terms] | None = None) -> Derivatives:
        """The answer as far as a forward pass gives it; ``terms`` are given where they are at hand."""
        logits = self.utility.logits_of(outputs)
        targets, mark = place_targets(self.targets, logits, self.batch, self.inputs.images.device, checked=True)
        # What the caller keeps must not keep the head's graph alive.
        kept = _detached(outputs) if isinstance(outputs, Tensor) else tree_map_only(Tensor, Tensor.detach, outputs)
        logits = kept if logits is outputs else None if logits is None else _detached(logits)
        return Derivatives(kept, logits, targets, terms or self.terms(capture), engine, nan_mark=mark)

    def values(self, outputs: Any, targets: Tensor | None, logits: Tensor | None = None) -> list[Tensor]:
        """U [N] for every class; ``logits`` are given where they are at hand."""
        logits = self.utility.logits_of(outputs) if logits is None else logits
        columns = [None] if targets is None else [targets[:, m] for m in range(targets.shape[1])]
        return [evaluate(self.utility, outputs, logits, column, self.batch) for column in columns]

    def add_baseline(self, found: Derivatives, values: list[Tensor]) -> None:
        """U(A) from ``values`` and U(B) by a forward pass, if asked for.

        Raises:
            InputError: there are several target layers.
        """
        if not self.with_baseline:
            return
        if len(self.layers) != 1:
            raise InputError("The completeness gap is defined for one target layer; ask for it with a single layer.")
        if values:
            found.value = torch.stack([value.detach() for value in values], 1)

        def at_baseline(_: int, activations: Tensor) -> Tensor:
            if self.path.from_zero:
                return torch.zeros_like(activations)
            layout = found.terms[0].layout
            return points(activations, layout, background(self.path.baseline, layout.view(activations)), [0.0])

        with self.capture(gradients=False, replace=at_baseline) as capture:
            outputs = capture.run(self.inputs)
            found.baseline = torch.stack(self.values(outputs, found.targets), 1)
