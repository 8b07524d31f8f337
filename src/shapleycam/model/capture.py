"""The trunk without gradients, the head with them: hooks that live for one forward pass.

A forward hook on the target layer takes its output ``A`` out of the running forward pass and puts something back: the
same values (closed form), a leaf that requires gradients (autograd engines), or other activations (probes, baselines).
Hooks act for the thread that set them only, so one model can be explained by several threads at once, and they are
removed when the block is left, whatever happened in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

from ..errors import LayerError, ModelStateError
from .double_backward import TwiceDifferentiable
from .inputs import Inputs

Replace = Callable[[int, Tensor], Tensor]


@dataclass(slots=True)
class CapturedLayer:
    """One target layer during one forward pass."""

    name: str
    module: nn.Module
    #: the layer's output in the layer's own layout: a leaf, or a node of the head's graph, where gradients are on
    activations: Tensor | None = None
    version: int = 0

    @property
    def written(self) -> bool:
        """Whether an operator behind the layer wrote into its output (an in-place ReLU, say)."""
        return self.activations is not None and self.activations._version != self.version


class Capture(AbstractContextManager["Capture"]):
    """Runs the model once with its target layers captured.

    Args:
        model: the user's model.
        layers: (name, module) of the target layers.
        gradients: turn gradients on behind the first target layer reached.
        copy: hand the head a copy, so that what writes in place behind the layer is harmless.
        replace: ``(layer index, activations) -> activations`` the head goes on with; default the same values.
        linear: a module whose input, output and weight are wanted too (the classifier of a closed form).
        tangent: ``(activations) -> tangent`` that the head's input carries in forward mode (needs an open dual level, one
            target layer).
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[tuple[str, nn.Module]],
        *,
        gradients: bool,
        copy: bool = True,
        replace: Replace | None = None,
        linear: nn.Module | None = None,
        tangent: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model = model
        self.layers = [CapturedLayer(name, module) for name, module in layers]
        self.linear_calls: list[tuple[Tensor, Tensor]] = []
        self._gradients, self._copy, self._replace, self._linear = gradients, copy, replace, linear
        self._tangent = tangent
        self._reached = 0  # how many of the layers
        self._owner = 0
        self._handles: list[RemovableHandle] = []
        self._before = False  # the caller's grad mode
        self._twice: TwiceDifferentiable | None = None

    def __enter__(self) -> Capture:
        self._owner = threading.get_ident()
        self._before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        module: nn.Module | None = None
        try:
            for index, captured in enumerate(self.layers):
                module = captured.module
                self._handles.append(module.register_forward_hook(self._make_hook(index, captured)))
            if self._linear is not None:
                module = self._linear
                self._handles.append(module.register_forward_hook(self._on_linear))
        except BaseException as error:
            self._leave()
            if not isinstance(error, RuntimeError):
                raise
            raise ModelStateError(
                f"{type(module).__name__} does not accept hooks ({error}). Pass the original module, not a scripted one."
            ) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._leave()

    def _leave(self) -> None:
        """Put everything back, in the reverse order, whatever the hooks turned on."""
        try:
            if self._twice is not None:
                self._twice.__exit__(None, None, None)
        finally:
            for handle in self._handles:
                handle.remove()
            torch.set_grad_enabled(self._before)

    def run(self, inputs: Inputs) -> Any:
        """The model's outputs; afterwards every captured layer holds its activations.

        Raises:
            LayerError: a target layer was reached twice, was not reached, or does not return a floating tensor.
        """
        outputs = inputs.run(self.model)
        for captured in self.layers:
            if captured.activations is None:
                raise LayerError(
                    f"Layer {captured.name!r} was not reached in the forward pass. Choose a layer that the model runs for "
                    "these images (a compiled or data-parallel model runs copies: pass the original module)."
                    + checkpointing(self.model)
                )
        return outputs

    def _make_hook(self, index: int, captured: CapturedLayer) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if threading.get_ident() != self._owner:
                return None
            if captured.activations is not None:
                raise LayerError(
                    f"Layer {captured.name!r} was reached twice in one forward pass, so its map would be ambiguous. Choose a "
                    "layer that runs once (for a module shared by several places, the block around one of them)."
                )
            found = tensor_of(output, captured.name)
            outer = torch.is_grad_enabled() and found.requires_grad  # an earlier target layer has turned gradients on
            if self._gradients and not outer:
                # Both end with the block. Turned on here and not around the model, so that the trunk runs as it always does.
                torch.set_grad_enabled(True)
                if self._twice is None:
                    twice = TwiceDifferentiable()
                    twice.__enter__()
                    self._twice = twice
            given = self._replace(index, found) if self._replace is not None else found
            if self._gradients and not (outer and given.requires_grad):
                given = given.detach().requires_grad_(True)
            captured.activations, captured.version = given, given._version
            self._reached += 1
            if self._tangent is not None:
                given = forward_ad.make_dual(given, self._tangent(given.detach()))
            if self._copy:
                return replace_tensor(output, found, given.clone())
            return None if given is found else replace_tensor(output, found, given)

        return hook

    def _on_linear(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._reached == len(self.layers) and threading.get_ident() == self._owner and args:
            self.linear_calls.append((args[0], output))


def checkpointing(model: nn.Module) -> str:
    """A hint for messages, where gradient checkpointing is switched on: it runs blocks around their own calls, and twice."""
    for name, module in model.named_modules():
        if getattr(module, "grad_checkpointing", False) is True:  # timm's name for it
            return (
                f" Gradient checkpointing is on in {name or type(module).__name__!r}: it runs blocks past their hooks. Switch "
                "it off while explaining: model.set_grad_checkpointing(False)."
            )
    return ""


def tensor_of(output: Any, name: str) -> Tensor:
    """The one floating tensor of three or more dimensions in a layer's output (a tensor, or a tuple, list or mapping).

    Raises:
        LayerError: there is none, or more than one.
    """
    if isinstance(output, Tensor):
        if output.ndim >= 3 and output.is_floating_point():
            return output
        parts = [output]
    elif isinstance(output, (tuple, list)):
        parts = [part for part in output if isinstance(part, Tensor)]
    elif isinstance(output, dict):
        parts = [part for part in output.values() if isinstance(part, Tensor)]
    else:
        parts = []
    spatial = [part for part in parts if part.is_floating_point() and part.ndim >= 3]
    if len(spatial) != 1:
        shapes = [tuple(part.shape) for part in parts]
        raise LayerError(
            f"Layer {name!r} must return one floating tensor with channels and positions (three dimensions or more); it "
            f"returned {type(output).__name__} with tensors of shape {shapes}. Choose another layer."
        )
    return spatial[0]


def replace_tensor(output: Any, old: Tensor, new: Tensor) -> Any:
    """``output`` with the tensor ``old`` replaced by ``new``, in the same kind of container."""
    if output is old:
        return new
    if isinstance(output, dict):
        copied = output.copy()
        for key, part in output.items():
            if part is old:
                copied[key] = new
        return copied
    parts = [new if part is old else part for part in output]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
