"""The sum of gradients along a path through the head, over one or several passes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..model.capture import Capture
from ..model.head import rows_per_pass
from ..model.pooled_linear import Outdated
from ..utilities.named import evaluate
from .autograd import differentiate, still
from .path import background, gauss_legendre, points
from .terms import Request, Terms

# Bytes of activations that one pass of the head may hold; what the head makes of them comes on top.
_BYTES = {"cpu": 32 << 20, "other": 512 << 20}


@dataclass(frozen=True, slots=True)
class Point:
    """One place where the gradient is read, and its share of the integral."""

    t: float
    share: float
    keep: Tensor | None = None  # bool [S]


class Integral:
    """The weighted sum of gradients at points, for target layers that share a path, over one or several passes of the head."""

    def __init__(self, request: Request, layers: list[tuple[str, nn.Module]], raws: list[Tensor], terms: list[Terms]) -> None:
        self.request, self.layers, self.raws, self.terms = request, layers, raws, terms
        self._wide = torch.promote_types(raws[0].dtype, torch.float32)
        self._weights: dict[tuple[int, int], Tensor] = {}  # by layer and class, in the layer's own layout
        self._values: list[Tensor] = []  # per pass, [M, P, N]
        self._points: list[Point] = []
        self._masked: dict[tuple[int, int], list[Tensor]] = {}  # per pass, [P, N, S]

    def schedule(self, count: int, with_start: bool) -> list[Point]:
        """The points for a number of nodes; with masks, antithetic pairs of them at each node.

        Args:
            count: of nodes.
            with_start: also B itself, whose utility is wanted.
        """
        path, nodes = self.request.path, list(zip(*gauss_legendre(count), strict=True))
        if not path.masks:
            return [Point(t, share) for t, share in nodes] + [Point(0.0, 0.0)] * with_start
        # One draw for all images: a map must not depend on what else is in the batch.
        positions, device = self.terms[0].activations.shape[2], self.raws[0].device
        drawn = torch.rand((count, path.masks // 2, positions), generator=torch.Generator().manual_seed(path.seed)).to(device)
        found = []
        for (t, share), pairs in zip(nodes, drawn, strict=True):
            for each in pairs:  # what the one keeps the other tends to hide
                found += [Point(t, share / path.masks, each < t), Point(t, share / path.masks, each > 1 - t)]
        return found + [Point(0.0, 0.0, torch.zeros(positions, dtype=torch.bool, device=device))] * with_start

    def at(self, i: int, part: list[Point]) -> Tensor:
        """Layer i's output at these points, [P·N, ...]."""
        term, path = self.terms[i], self.request.path
        start = None if path.from_zero else background(path.baseline, term.activations)
        keep = None if part[0].keep is None else torch.stack([point.keep for point in part if point.keep is not None])
        return points(self.raws[i], term.layout, start, [point.t for point in part], keep)

    def per_pass(self) -> int:
        """How many points fit into one pass."""
        largest = max((raw[0] for raw in self.raws), key=lambda row: row.numel() * row.element_size())
        return rows_per_pass(largest, self.request.chunk, _BYTES) // len(self.raws[0])

    def add(self, part: list[Point], gradients: list[list[Tensor]], values: list[Tensor]) -> None:
        """Add one pass: per class, the gradients [P·N, ...] of every layer in its own layout, and U [P·N]."""
        shares = torch.tensor([point.share for point in part], dtype=self._wide).to(self.raws[0].device, non_blocking=True)
        self._points += part
        self._values.append(torch.stack([value.detach().unflatten(0, (len(part), -1)) for value in values]))
        for m, layers in enumerate(gradients):
            for i, gradient in enumerate(layers):
                here = torch.tensordot(shares, gradient.unflatten(0, (len(part), -1)).to(self._wide), 1)
                before = self._weights.get((i, m))
                self._weights[i, m] = here if before is None else before + here
                if self.request.path.masks:
                    view = self.terms[i].layout.view(gradient).unflatten(0, (len(part), -1))
                    paid = (view * self.terms[i].attributed).sum(2, dtype=self._wide)
                    self._masked.setdefault((i, m), []).append(paid)

    def run(self, part: list[Point], targets: Tensor | None) -> None:
        """Take the head to these points in one pass, and add it."""
        request = self.request
        given = [self.at(i, part) for i in range(len(self.raws))]
        # A head that stands alone takes its rows behind the trunk of one image.
        inputs = request.inputs.rows(slice(0, 1)) if request.rows is not None and request.rows.alone else request.inputs
        one = replace(request, layers=self.layers)
        with one.capture(gradients=True, replace=lambda i, _: given[i]) as capture:
            outputs = capture.run(inputs)
            still(request, capture)
            values, gradients = utilities_and_gradients(request, capture, outputs, targets, len(part))
        self.add(part, gradients, values)

    def values(self) -> tuple[Tensor, list[Point]]:
        """U at every point [M, T, N], and the points."""
        return torch.cat(self._values, 1), self._points

    def weights(self, i: int, classes: int) -> list[Tensor]:
        """Layer i's w for every class as views [N, C, S], in the activations' dtype."""
        return [self.terms[i].layout.view(self._weights[i, m].to(self.raws[i].dtype)) for m in range(classes)]

    def standard_error(self, i: int, classes: int) -> Tensor:
        """Of layer i's sums of (A - B)·w over the channels, over the pairs of masks, [N, M, S]."""
        found = []
        for m in range(classes):
            paid = torch.cat(self._masked[i, m])
            sampled = [t for t, point in enumerate(self._points) if point.share]
            pairs = paid[sampled].unflatten(0, (-1, self.request.path.masks // 2, 2)).mean(2)  # [K, pairs, N, S]
            share = torch.tensor([self._points[t].share for t in sampled], dtype=paid.dtype, device=paid.device)
            share = share.unflatten(0, (*pairs.shape[:1], -1)).sum(1)  # ω_k
            found.append((pairs.var(1) / pairs.shape[1] * share[:, None, None] ** 2).sum(0).sqrt())
        return torch.stack(found, 1)


def utilities_and_gradients(
    request: Request, capture: Capture, outputs: Any, targets: Tensor | None, copies: int
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Per class: U of every row, and the gradients in every captured layer; ``copies`` rows for each image."""
    rows = torch.arange(request.batch, device=request.inputs.images.device).repeat(copies)
    utility, logits = request.utility.rows(rows), request.utility.logits_of(outputs)
    if logits is not None and logits.shape[0] != len(rows):
        raise Outdated(f"the head returns {logits.shape[0]} rows for {len(rows)}")
    leaves = [captured.activations for captured in capture.layers if captured.activations is not None]
    columns = [None] if targets is None else [column[rows] for column in targets.unbind(1)]
    with torch.enable_grad():
        values = [evaluate(utility, outputs, logits, column, len(rows)) for column in columns]
    gradients = []
    for m, value in enumerate(values):
        pairs = differentiate(value, leaves, None, False, m < len(values) - 1, model=request.model)
        gradients.append([gradient for gradient, _ in pairs])
    return values, gradients
