"""Programs of pool-and-linear heads.

The weight of such a head is constant over the positions, so every pooling of the method table is one or two products of channel
weights with A, for one class or for all of them.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_unflatten

from ..derivatives.path import background
from ..errors import ModelStateError
from ..model.capture import tensor_of
from ..model.inputs import Inputs
from ..ops import reference
from ..ops.coefficients import Coefficients
from .base import Program, Recipe
from .folding import bind
from .graph import ModelGraph, tensors_of


class PooledProgram(Program):
    """In closed form, or by quadrature along the logits. A hook lives for one call, and acts for the thread that makes it.

    Args:
        model, recipe: as for :class:`Program`; the utility has coefficients.
        linear: the dotted name of the classifier that reads the mean of the target layer's output.
        graph: the model's, which runs in the place of the model, with the weights as they are now.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, linear: str, graph: ModelGraph | None = None) -> None:
        super().__init__(model if graph is None else None, recipe)
        self.linear = linear
        self._rule = recipe.rule
        self._writes, self._images_as = recipe.writes, recipe.images_as
        self._spec: TreeSpec | None = None
        if graph is not None:
            classifier = model.get_submodule(linear)
            assert isinstance(classifier, nn.Linear)
            self.classifier = copy.deepcopy(classifier).requires_grad_(False)
            self.whole, self._spec = (
                bind(graph.whole.module, tensors_of(model, graph.constants, graph.whole.weights)),
                graph.spec,
            )

    def _maps(self, images: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
        logits, output = self._run(images)
        chosen = self._targets(logits, targets)
        alpha, a = self._channel_weights(logits, self.layout.view(output), chosen)
        # Behind the pooling, as in some runtimes the maximum of NaN and 0 is 0.
        known = (chosen >= 0) & (chosen < logits.shape[1])
        raw = torch.where(known[:, :, None], _pooled(self.method.pooling, alpha, a), float("nan"))
        return logits, chosen, raw, self.layout.grid_of(output) if self.least else self.layout.grid

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The logits [N, K] and the target layer's output."""
        if self._spec is not None:
            activations, *leaves = self.whole(images)
            flat = self.utility.logits_of(tree_unflatten(leaves, self._spec))
            assert flat is not None
            return flat, activations
        assert self.model is not None
        found: list[Tensor] = []
        owner = threading.get_ident()

        def take(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == owner:
                tensor = tensor_of(output, self.layer)
                found.append(tensor.clone() if self._writes else tensor)

        handle = self.model.get_submodule(self.layer).register_forward_hook(take)
        try:
            outputs = Inputs(images, images_as=self._images_as).run(self.model)
        finally:
            handle.remove()
        logits = self.utility.logits_of(outputs)
        if len(found) != 1 or logits is None or logits.ndim != 2:
            raise ModelStateError(
                f"The model no longer runs {self.layer!r} once and returns logits [N, K]: make another program."
            )
        return logits, found[0]

    def _targets(self, logits: Tensor, targets: Tensor | None) -> Tensor:
        """int64 [N, M]."""
        if self.targets == "all":
            return torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[0], -1)
        predicted = logits.argmax(1, keepdim=True)
        return predicted if targets is None else torch.where(targets == -1, predicted, targets)

    def _channel_weights(self, logits: Tensor, activations: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """w [N, M, C], which is constant over the positions, and A - B [N, C, S].

        With the utility's coefficients (on e_c, p, p·v) it is ``on_c W_c + on_p (p W) + on_pv (p·v W)``, over S: however many
        classes, the products with W are made once per image.
        """
        linear = self.classifier if self.model is None else self.model.get_submodule(self.linear)
        assert isinstance(linear, nn.Linear)
        wide = reference.accumulator(logits.dtype)
        weight = linear.weight.to(wide)
        bias = None if linear.bias is None else linear.bias.to(wide)
        a = activations
        z = logits.to(wide)
        if self._named_baseline == "zero":
            start = torch.zeros_like(z) if bias is None else bias.expand_as(z)
        else:
            base = background(self.baseline if self.baseline is not None else self._named_baseline, activations)
            start, a = F.linear(base.mean(2, dtype=wide), weight, bias), activations - base
        safe = targets.clamp(0, z.shape[1] - 1)
        if self.method.order == 2 and self._rule is not None:
            on_class, on_vectors, vectors = self._integral(z, start, safe)
        else:
            on_class, on_vectors, vectors = self._second_order(z, z - start, safe)
        # The product with W comes last for one class, as one row an image; before, for many, once for all of them.
        one = isinstance(targets.shape[1], int) and targets.shape[1] == 1
        rest = on_vectors @ vectors @ weight if one else on_vectors @ (vectors @ weight)
        alpha = on_class[:, :, None] * weight[safe] + rest
        return alpha / a.shape[2], a.to(reference.accumulator(a.dtype))

    def _second_order(self, z: Tensor, z0: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients of ``u' - U''z₀/2`` (of u' at order 1): on e_c [N, M], on the vectors p, p·z₀ [N, M, 2], and these."""
        p = z.softmax(1)
        pz = p * z0
        p_c = p.gather(1, targets)
        assert self.utility.gradient is not None and self.utility.curvature is not None
        first, second = self.utility.gradient(p_c), None
        if self.method.order == 2 and self.utility.curved:
            second = self.utility.curvature(p_c, z0.gather(1, targets), pz.sum(1, keepdim=True))
        on_class, *rest = _columns(first, p_c) if second is None else _less_half(_columns(first, p_c), _columns(second, p_c))
        return on_class, torch.stack(rest, 2), torch.stack((p, pz), 1)

    def _integral(self, z: Tensor, start: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients of ``Σ ω_k u'(z_B + t_k (z - z_B))``: on e_c [N, M], on every node's p [N, M, nodes], and these."""
        assert self._rule is not None and self.utility.gradient is not None
        on_class: Tensor = torch.zeros_like(targets, dtype=z.dtype)
        on_vectors, vectors = [], []
        for t, share in zip(*self._rule, strict=True):
            p = (t * z + (1 - t) * start).softmax(1)
            p_c = p.gather(1, targets)
            at_class, at_p, _ = _columns(self.utility.gradient(p_c), p_c)
            on_class = on_class + share * at_class
            on_vectors.append(share * at_p)
            vectors.append(p)
        return on_class, torch.stack(on_vectors, 2), torch.stack(vectors, 1)


def _columns(coefficients: Coefficients, like: Tensor) -> tuple[Tensor, ...]:
    """Coefficients as tensors [N, M]."""
    return tuple(c.to(like.dtype).expand_as(like) if isinstance(c, Tensor) else torch.full_like(like, c) for c in coefficients)


def _less_half(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(one - two / 2 for one, two in zip(first, second, strict=True))


def _pooled(pooling: str, w: Tensor, a: Tensor) -> Tensor:
    """The signed maps [N, M, S] of weights w [N, M, C] that are constant over the positions: the rows of weighted_reduce."""
    if pooling == "elementwise_relu":
        return torch.matmul(w.clamp_min(0), a.clamp_min(0)) + torch.matmul((-w).clamp_min(0), (-a).clamp_min(0))
    if pooling == "activation":
        total = a.sum(2)[:, None]
        w = w * total / (total + reference.EPS_ACTIVATION)
    elif pooling == "positive_gradient":
        w = w.clamp_min(0)
    elif pooling == "plusplus":
        square = w * w
        ratio = square / (2 * square + square * w * a.sum(2)[:, None] + reference.EPS_PLUSPLUS)
        w = torch.where(w != 0, w.clamp_min(0) * ratio, torch.zeros_like(w)) * a.shape[2]
    return torch.matmul(w, a)
