"""The road as a pure function: ``(images, targets) -> (logits, targets, raw, maps)``, for pool-and-linear heads.

A program remembers what was learned about a model and learns nothing more: no locks, no studies, no choice of an engine, and
nothing but plain PyTorch operators behind the model, which ``torch.export`` takes as they are. The weight of such a head is
constant over the positions, so every pooling of the method table is one or two products of channel weights with A, for one
class or for all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .derivatives.path import Path, background, gauss_legendre
from .errors import ExportError, InputError, ModelStateError
from .methods.table import Method
from .model.capture import tensor_of
from .model.inputs import Inputs
from .model.layouts import Layout
from .model.state import ModeCheck
from .ops import reference
from .ops.coefficients import Coefficients
from .plan import Plan, Settings
from .utilities.named import Utility

#: What a program may be asked to explain: the predicted class, the classes it is given, or all classes.
TARGETS = ("predicted", "given", "all")
#: The relative error up to which a program counts as the explainer that it was made from.
TOLERANCE = 1e-4


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


class Program(nn.Module):
    """An explainer's road as a module; made by :meth:`shapleycam.Explainer.program`.

    It holds the user's very model: a weight changed in place is followed, and a module that was replaced, added or removed is
    refused, as is training mode. A hook lives for one call, and acts for the thread that makes it.

    Args:
        model: in evaluation mode.
        layer, linear: dotted names of the target layer, and of the classifier that reads the mean of its output.
        layout: how the layer's output is read.
        method, utility, path: rows of their tables, and the path from the baseline.
        engine: "closed_form", or "quadrature" with a number of nodes.
        image_shape: of one image, without the batch; programs are made for one size.
        size: of the maps.
        targets: one of :data:`TARGETS`.
        writes: an operator behind the layer writes into its output.
        images_as: the keyword under which the model takes the images.

    Raises:
        ExportError: the method, utility, engine or baseline is none that a program has.
    """

    baseline: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        layer: str,
        linear: str,
        layout: Layout,
        method: Method,
        utility: Utility,
        path: Path,
        engine: str,
        image_shape: Sequence[int],
        size: Sequence[int],
        targets: str = "predicted",
        writes: bool = False,
        images_as: str | None = None,
    ) -> None:
        super().__init__()
        if method.order == 0 or method.pooling == "principal":
            raise ExportError(
                f"Programs have the methods with derivatives and a pooling (ShapleyCAM, GradCAM, …), not {method.title}."
            )
        if not utility.named:
            raise ExportError(
                f"Programs have utilities with coefficients (logit, probability, log_probability, rest, or a Utility "
                f"with gradient= and curvature=); {utility.name!r} has none."
            )
        if engine not in ("closed_form", "quadrature"):
            raise ExportError(f"Programs have the engines 'closed_form' and 'quadrature', not {engine!r}. Use engine='auto'.")
        if engine == "quadrature" and (path.masks or not isinstance(path.nodes, int)):
            raise ExportError("Programs have quadrature with a number of nodes, without masks: nodes=4.")
        baseline = path.baseline
        if isinstance(baseline, Tensor) and baseline.ndim == 3 and baseline.shape[0] != 1:
            raise ExportError(
                f"A program takes any number of images, and the baseline {tuple(baseline.shape)} is for "
                f"{baseline.shape[0]}: give one that broadcasts, such as [C, 1]."
            )
        if targets not in TARGETS:
            raise InputError(f"targets must be one of {', '.join(map(repr, TARGETS))}, got {targets!r}.")
        self.model = model
        self.layer, self.linear = layer, linear
        self.layout, self.method, self.utility = layout, method, utility
        self.engine, self.targets = engine, targets
        self.image_shape, self.size = tuple(image_shape), tuple(size)
        self._rule = gauss_legendre(path.nodes) if engine == "quadrature" and isinstance(path.nodes, int) else None
        self._named_baseline = "tensor" if isinstance(baseline, Tensor) else baseline
        self.register_buffer("baseline", baseline if isinstance(baseline, Tensor) else None, persistent=False)
        self._writes, self._images_as = writes, images_as
        self._mode = ModeCheck(model)
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
            images: floating [N, channels, H, W] of the size and on the device that the program was made for.
            targets: int64 [N] or [N, M] for ``targets="given"``, where -1 is the predicted class and any other index that is
                no class gives a map of NaN; None (also otherwise) for the predicted one.

        Raises:
            InputError: images of another size, or targets that the program does not take.
            ModelStateError: the model was edited, or is in training mode.
        """
        if tuple(images.shape[1:]) != self.image_shape:
            raise InputError(
                f"This program explains images [N, {', '.join(map(str, self.image_shape))}], got {tuple(images.shape)}."
            )
        if targets is not None and self.targets != "given":
            raise InputError(f"This program was made for targets={self.targets!r}: call it without targets.")
        if targets is not None and (targets.ndim not in (1, 2) or targets.dtype != torch.int64):
            raise InputError(f"targets must be int64 [N] or [N, M], got {targets.dtype} {tuple(targets.shape)}.")
        if self._mode.check():
            raise ModelStateError(
                "The model was edited after this program was made: make another by explainer.program(images)."
            )
        with torch.no_grad():
            return self._explain(images, targets)

    def _explain(self, images: Tensor, targets: Tensor | None) -> Explained:
        logits, output = self._run(images)
        activations = self.layout.view(output)  # [N, C, S]
        several = self.targets == "all" or (targets is not None and targets.ndim == 2)
        chosen = self._targets(logits, targets)
        alpha, a = self._channel_weights(logits, activations, chosen)
        raw = _pooled(self.method.pooling, alpha, a)  # [N, M, S]
        # A network may swallow NaN or Inf in an image; its map must not.
        raw = raw + (images.flatten(1).sum(1, dtype=reference.accumulator(images.dtype)) * 0)[:, None, None].to(raw.dtype)
        shaped = raw.unflatten(2, self.layout.grid)
        maps = reference.display_map(shaped.flatten(0, 1), self.size, True).unflatten(0, (-1, chosen.shape[1]))
        if several:
            return Explained(logits, chosen, shaped, maps)
        return Explained(logits, chosen[:, 0], shaped[:, 0], maps[:, 0])

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The logits [N, K] and the target layer's output."""
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
        if targets is None:
            return predicted
        targets = targets[:, None] if targets.ndim == 1 else targets
        return torch.where(targets == -1, predicted, targets)

    def _channel_weights(self, logits: Tensor, activations: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """w [N, M, C], which is constant over the positions, and A - B [N, C, S].

        With the utility's coefficients (on e_c, p, p·v) it is ``on_c W_c + on_p (p W) + on_pv (p·v W)``, over S: however many
        classes, the products with W are made once per image.
        """
        linear = self.model.get_submodule(self.linear)
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
        known = (targets >= 0) & (targets < z.shape[1])
        safe = targets.clamp(0, z.shape[1] - 1)
        if self.method.order == 2 and self._rule is not None:
            on_class, on_vectors, vectors = self._integral(z, start, safe)
        else:
            on_class, on_vectors, vectors = self._second_order(z, z - start, safe)
        alpha = on_class[:, :, None] * weight[safe] + torch.matmul(on_vectors, torch.matmul(vectors, weight))
        alpha = torch.where(known[:, :, None], alpha / a.shape[2], float("nan"))
        return alpha, a.to(reference.accumulator(a.dtype))

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


def build(
    settings: Settings,
    plan: Plan,
    explain: Callable[..., Any],
    images: Tensor,
    targets: str,
    size: str | int | Sequence[int],
) -> Program:
    """The program of a studied explainer, compared with it; arguments and errors as :meth:`shapleycam.Explainer.program`.

    Args:
        settings, plan: of the explainer.
        explain: the explainer, ``(images, targets) -> Explanation``.
        images, targets, size: as there.
    """
    pooled, path, engine = plan.facts.pooled, settings.path, plan.engine
    if pooled is None:
        raise ExportError(
            f"A program needs a pool-and-linear head, and this one is not: {plan.facts.head}. Others are not supported: "
            "name the layer that the last pooling reads, if there is one."
        )
    if engine == "midpoint":
        engine, path = "quadrature", replace(path, nodes=1)
    expected = explain(images, None)
    layout: Layout = expected.diagnostics.layouts[0]
    program = Program(
        settings.model,
        plan.layers[0][0],
        next(name for name, module in settings.model.named_modules() if module is pooled.linear),
        layout,
        settings.method,
        settings.utility,
        path,
        engine,
        images.shape[1:],
        _size(size, layout.grid, expected.image_size),
        targets,
        plan.facts.writes,
        settings.images_as,
    )
    found = program(images)
    if targets != "predicted":
        # The predicted class, and the first and the last: what is given and what is gathered must be what is meant.
        last = torch.full_like(expected.targets, expected.logits.shape[1] - 1)
        classes = torch.stack((expected.targets, torch.zeros_like(last), last), 1)
        expected = explain(images, classes)
        found = program(images, classes) if targets == "given" else found
        if targets == "all":
            found = found._replace(raw=found.raw[torch.arange(len(classes), device=classes.device)[:, None], classes])
    off = _off(found.logits, expected.logits), _off(found.raw, expected.raw)
    if not max(off) <= TOLERANCE:
        raise ExportError(
            f"The program differs from the explainer: logits by {off[0]:.1e}, maps by {off[1]:.1e}, relative; at most "
            f"{TOLERANCE:.0e} is allowed. Is the model the same in every call (in evaluation mode, without random parts)?"
        )
    return program


def _size(size: str | int | Sequence[int], grid: tuple[int, ...], image: tuple[int, ...]) -> tuple[int, ...]:
    if size in ("layer", "image"):
        return grid if size == "layer" else image
    wanted = (size,) * len(grid) if isinstance(size, int) else size if isinstance(size, str) else tuple(size)
    if isinstance(wanted, str) or len(wanted) != len(grid) or any(not isinstance(s, int) or s < 1 for s in wanted):
        raise InputError(f"size must be 'layer', 'image', or {len(grid)} positive integers, got {size!r}.")
    return wanted


def _off(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape or not torch.equal(got.isnan(), expected.isnan()):
        return float("inf")
    difference = (got.double() - expected.double()).nan_to_num(0.0).flatten(1).abs().amax(1)
    size = expected.double().nan_to_num(0.0).flatten(1).abs().amax(1)
    return float((difference / size.clamp_min(1e-30)).amax())
