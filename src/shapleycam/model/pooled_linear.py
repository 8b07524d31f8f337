"""Is the part of a model behind its target layer a mean over positions and one linear layer, ``z = W·mean_s(A) + b``?

Found by its shape, verified once on random activations, and checked again in every call that relies on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Capture
from .inputs import Inputs
from .layouts import Layout
from .survey import Survey

# Relative errors up to which a mean counts as the same; float32 leaves room for TF32 products.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Outdated(Exception):
    """The model is no longer what was learned about it: learn again. Never leaves the package."""


@dataclass(frozen=True, slots=True)
class PooledLinear:
    """A verified pool-and-linear head.

    Attributes:
        linear: the classifier, whose weight and bias are read anew in every call.
        error: relative error found in the verification.
    """

    linear: nn.Linear
    error: float
    #: shapes of activations on an accelerator, without the batch, for which the mean was seen to hold
    shapes: set[tuple[int, ...]] = field(default_factory=set)

    def still_holds(self, capture: Capture, logits: Tensor | None, activations: Tensor) -> Tensor | None:
        """Check a forward pass that relies on the head.

        Where that waits for nothing (on a CPU, and for the first activations of a shape), a head that pools otherwise is
        noticed here. Else its images are marked: a wrong map must not look like one.

        Args:
            capture: the forward pass, with the classifier watched.
            logits: what it returned.
            activations: the target layer's output as a view [N, C, S].

        Returns:
            [N], NaN for an image whose classifier did not read the mean of the activations, else 0; None where that was
            checked on the host.

        Raises:
            Outdated: the logits are not the classifier's output, or it read something else.
        """
        calls = capture.linear_calls
        if logits is None or len(calls) != 1 or not same_tensor(calls[0][1], logits) or calls[0][0].ndim != 2:
            raise Outdated("the logits are no longer the output of the classifier")
        read = calls[0][0]
        if read.shape != activations.shape[:2]:
            raise Outdated("the classifier no longer reads one number per channel")
        cpu = activations.device.type == "cpu"
        shape = () if cpu else tuple(activations.shape[1:])
        if not cpu and shape in self.shapes:
            return torch.where(self.differs(read, activations), float("nan"), 0.0)
        if not self._near(read, activations) and bool(self.differs(read, activations).any()):
            raise Outdated("the classifier no longer reads the mean of the target layer's output")
        if not cpu:
            self.shapes.add(shape)
        return None

    def _near(self, read: Tensor, activations: Tensor) -> bool:
        """A quick look at the whole batch, which rounding passes by far; NaN does not."""
        if read.dtype == activations.dtype and torch.equal(read, activations.mean(2)):
            return True  # torch's own pools on a CPU are this very operator
        mean = activations.mean(2, dtype=torch.promote_types(activations.dtype, torch.float32))
        distance = torch.dist(read.to(mean.dtype), mean).item()
        return bool(distance <= 0.05 * tolerance(activations.dtype) * torch.linalg.vector_norm(mean).item())

    def differs(self, read: Tensor, activations: Tensor) -> Tensor:
        """Bool [N]: whether what the classifier read [N, C] is not the mean of A [N, C, S]; False for NaN."""
        wide = torch.promote_types(activations.dtype, torch.float32)
        mean = activations.mean(2, dtype=wide)
        distance = torch.linalg.vector_norm(read - mean, dim=1)
        far = distance > tolerance(activations.dtype) * torch.linalg.vector_norm(mean, dim=1)
        # Means that cancel are rounding error, of the size of what was summed.
        size = torch.linalg.vector_norm(activations, dim=(1, 2), dtype=wide) / activations.shape[2] ** 0.5
        differs: Tensor = far & (distance > 1e3 * torch.finfo(wide).eps * size)
        return differs


def find(seen: Survey, layers: Sequence[tuple[str, nn.Module]]) -> tuple[nn.Linear | None, str]:
    """The linear layer whose output is the logits and which runs once, behind the target layer; or None and the reason."""
    if len(layers) != 1:
        return None, "there are several target layers"
    if seen.logits is None or seen.logits.ndim != 2:
        return None, "the model does not return logits [N, K]"
    done = [i for i, r in enumerate(seen.records) if any(r.module is module for _, module in layers)]
    for i, record in enumerate(seen.records):
        if isinstance(record.module, nn.Linear) and record.place == seen.end:
            if not done or i < max(done):
                return None, f"the classifier {record.name!r} does not run behind the target layer"
            if sum(r.module is record.module for r in seen.records) > 1:
                return None, f"the classifier {record.name!r} runs more than once"
            if record.input is None or record.input.ndim != 2:
                return None, f"the classifier {record.name!r} does not read one vector per image"
            return record.module, record.name
    return None, "the logits are not the output of a linear layer"


def verify(
    model: nn.Module,
    layer: tuple[str, nn.Module],
    linear: nn.Linear,
    inputs: Inputs,
    layout_of: Callable[[str, nn.Module, Tensor, Tensor], Layout],
    read: Callable[[Any], Tensor | None],
) -> tuple[float, bool]:
    """Run the head on random activations of both signs: (the relative error of ``W·mean_s(A) + b``, whether that is none).

    A head that is so for these is so for all activations of their shape.

    Args:
        model, layer: the model, and (name, module) of its target layer.
        linear: what :func:`find` returned.
        inputs: a few images.
        layout_of: ``(name, module, activations, images) -> Layout``.
        read: the logits in what the model returns.
    """
    given: list[Tensor] = []

    def scramble(_: int, found: Tensor) -> Tensor:
        generator = torch.Generator(found.device).manual_seed(0)
        noise = torch.randn(found.shape, generator=generator, device=found.device, dtype=torch.float32)
        scale = 4 * found.float().abs().amax().nan_to_num(1.0).clamp(1.0, 1e3)
        given.append((noise * scale).to(found.dtype))
        return given[0].clone()

    with Capture(model, [layer], gradients=False, replace=scramble, linear=linear) as capture:
        logits = read(capture.run(inputs))
    assert logits is not None
    view = layout_of(*layer, given[0], inputs.images).view(given[0])
    mean = view.double().mean(2)
    taken = capture.linear_calls[0][0].double()
    if taken.shape != mean.shape:
        return float("inf"), False
    predicted, actual = mean @ linear.weight.detach().double().T, logits.detach().double()
    if linear.bias is not None:
        actual = actual - linear.bias.detach().double()
    error = max(_off(taken, mean), _off(actual, predicted))
    return error, error <= tolerance(view.dtype)


def _off(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-300))


def tolerance(dtype: torch.dtype) -> float:
    """The relative error up to which a mean, and the logits of it, count as the same."""
    return _TOLERANCE.get(dtype, 1e-3)


def same_tensor(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory in the same shape."""
    return one is other or (one.data_ptr() == other.data_ptr() and one.shape == other.shape)
