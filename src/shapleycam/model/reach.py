"""What takes another forward pass to know of a layer: which positions the utility reads, and whether it reads nothing else.

The gradient is asked for from some layer on, not from the images on, so that a study holds the graph of the last layers and
not of the whole network.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DerivativeError
from ..utilities.named import Utility, evaluate
from .capture import Capture, replace_tensor
from .double_backward import TwiceDifferentiable
from .layouts import Layout
from .survey import Survey, map_of, watch


@dataclass(frozen=True, slots=True)
class Question:
    """A model, what a survey saw of it, and the utility whose dependence on layers is in question.

    Attributes:
        model: the user's model.
        seen: its survey, with images.
        utility: the utility, for the survey's images.
        targets: the classes, int64 [N]; None for the predicted ones.
    """

    model: nn.Module
    seen: Survey
    utility: Utility
    targets: Tensor | None = None

    def value(self, outputs: Any) -> Tensor:
        """U [N] of the survey's images, or of any other outputs."""
        assert self.seen.images is not None
        targets, logits = self.targets, self.seen.logits
        if targets is None and logits is not None and logits.ndim == 2:
            targets = logits.detach().argmax(1)
        return evaluate(self.utility, outputs, self.utility.logits_of(outputs), targets, self.seen.images.shape[0])

    def gradients(self, first: str | None, layouts: Mapping[str, Layout]) -> Answer | None:
        """dU/dA of some layers, each as its module returned it, where U depends on it.

        Args:
            first: the first of them to finish; the graph begins at its output. None for a graph from the images on.
            layouts: names of modules that run once, none of which finishes before the first, and how to read what they return.

        Returns:
            the gradients, without those of layers that U does not depend on; None if U has no gradient at all.

        Raises:
            DerivativeError: an operator behind the layer has no derivative.
        """
        assert self.seen.images is not None
        kept: dict[str, Tensor] = {}
        pooled: set[str] = set()
        vector = self._classified()
        owner = threading.get_ident()

        def after(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> Any:
                if threading.get_ident() != owner or name not in layouts:
                    return None
                if name == first:
                    torch.set_grad_enabled(True)
                part = map_of(output)
                if part is None or not torch.is_grad_enabled():
                    return None
                if vector is not None and _is_mean(vector, layouts[name].view(part.detach())):
                    pooled.add(name)
                if part.requires_grad:
                    kept[name] = part
                    return None
                # Beside or before the graph, over frozen weights. The copy is no leaf, so the head may write into it.
                kept[name] = part.detach().requires_grad_(True).clone()
                return replace_tensor(output, part, kept[name])

            return hook

        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(first is None))
            stack.enter_context(TwiceDifferentiable())
            watch(stack, self.model, after)
            outputs = self.seen.run(self.model, self.seen.images.clone().requires_grad_(first is None))
        with torch.enable_grad():
            value = self.value(outputs)
            if not value.requires_grad:
                return None
            try:
                found = torch.autograd.grad(value.sum(), list(kept.values()), allow_unused=True)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise DerivativeError(
                    f"{type(self.model).__name__} cannot be differentiated behind layer {first or 'the images'!r}: {error} "
                    "Name a later layer with layer=, or use a method without derivatives."
                ) from error
        return Answer({name: g for name, g in zip(kept, found, strict=True) if g is not None}, pooled)

    def _classified(self) -> Tensor | None:
        """The vectors [N, C] that a linear classifier turned into the logits, if it did."""
        for record in reversed(self.seen.records):
            if isinstance(record.module, nn.Linear) and record.place == self.seen.end:
                return record.input
        return None

    def alone(self, name: str, before: tuple[str, Layout] | None = None) -> tuple[bool, bool]:
        """Whether a layer depends on the images, and whether the utility depends on the images through this layer alone.

        The model is run on noise, with the layer's output as the images gave it: U changes where something goes past it.

        Args:
            name: the layer.
            before: an earlier layer whose positions, and not the images, are to be noise. Its prefix and suffix tokens stay as
                the images gave them: they go past the last attention of a transformer without being positions.
        """
        images = self.seen.images
        assert images is not None
        layers = [(part, self.model.get_submodule(part)) for part in ([name] if before is None else [before[0], name])]
        with Capture(self.model, layers, gradients=False) as capture:
            expected = self.value(capture.run(self.seen.of(images)))
            found = [captured.activations for captured in capture.layers]
        differs = False

        def replace(index: int, activations: Tensor) -> Tensor:
            nonlocal differs
            given = found[index]
            assert given is not None
            if index < len(layers) - 1:
                assert before is not None
                given = given.clone()
                view = before[1].view(given)
                view.copy_(_noise(view))
            else:
                differs = not torch.equal(given, activations)
            return given

        with Capture(self.model, layers, gradients=False, replace=replace) as capture:
            value = self.value(capture.run(self.seen.of(_noise(images))))
        scale = expected.abs()
        if isinstance(self.seen.logits, Tensor) and self.seen.logits.numel():
            scale = scale + self.seen.logits.abs().amax()
        bound = 256 * torch.finfo(images.dtype).eps * scale.nan_to_num(0.0)
        return differs, bool(((value - expected).abs() <= bound).all())


@dataclass(frozen=True, slots=True)
class Answer:
    """Gradients by layer, and the layers whose mean over the positions is all that a linear classifier reads."""

    gradients: dict[str, Tensor]
    pooled: set[str]


def _is_mean(vector: Tensor, view: Tensor) -> bool:
    """Whether vectors [N, C] are the means of activations [N, C, S], to rounding."""
    if vector.shape != view.shape[:2]:
        return False
    bound = 64 * torch.finfo(vector.dtype).eps * vector.float().norm()
    return bool((view.float().mean(2) - vector.float()).norm() <= bound)


def share(layout: Layout, gradient: Tensor | None) -> float:
    """The share of a layer's positions that a gradient reaches."""
    return 0.0 if gradient is None else (layout.view(gradient) != 0).any(1).float().mean().item()


def _noise(like: Tensor) -> Tensor:
    """Noise of the spread of a tensor; its shape, dtype and device."""
    generator = torch.Generator(like.device).manual_seed(0)
    noise = torch.randn(like.shape, generator=generator, device=like.device, dtype=torch.float32)
    return (noise * like.float().std(correction=0).nan_to_num(1.0).clamp_min(1e-3)).to(like.dtype)
