"""The head alone: the part of a model behind one target layer, run on other activations.

Coalitions, ablated channels and baselines are all "the same head, thousands of other activations". A hook puts a large
batch of them in the place of the target layer's output while the trunk sees one image only, so that its cost vanishes.
That is right only where nothing but the target layer reaches the head, which is verified on the model at hand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import InputError
from .capture import Capture
from .inputs import Inputs

#: What one pass may hold, in bytes of the tensor that is altered. On a CPU small passes stay in the cache.
ACTIVATION_BYTES = {"cpu": 8 << 20, "other": 256 << 20}


def rows_per_pass(row: Tensor, chunk: int | None, bounds: dict[str, int] = ACTIVATION_BYTES) -> int:
    """How many copies of ``row`` one pass may hold: ``chunk`` where it is given, else what the bounds allow."""
    if chunk is not None:
        return chunk
    bound = bounds["cpu" if row.device.type == "cpu" else "other"]
    return max(1, bound // max(1, row.numel() * row.element_size()))


class Head:
    """The part of ``model`` behind one target layer, as a function of that layer's output.

    Args:
        model: the model, in evaluation mode; it is left as it was.
        layer: (name, module) of the target layer.
        inputs: images [N, channels, *spatial] on the model's device, whose activations may be altered; alone, or with what
            the model takes besides.

    Attributes:
        activations: the target layer's output for the images, [N, ...] in the layer's own layout.
        outputs: what the model returned for the images.
        bypassed: something else than the target layer reaches the head (a skip connection around it, a batch size kept
            from before it), so every row needs its own image's trunk. Slower, and still right.

    Raises:
        LayerError: the layer is not reached, reached twice, or does not return one floating tensor.
    """

    def __init__(self, model: nn.Module, layer: tuple[str, nn.Module], inputs: Inputs | Tensor) -> None:
        self._model, self._layer = model, layer
        self._inputs = Inputs(inputs) if isinstance(inputs, Tensor) else inputs
        with Capture(model, [layer], gradients=False) as capture:
            self.outputs = capture.run(self._inputs)
        [captured] = capture.layers
        assert captured.activations is not None
        # The capture hands the head a copy, so this is the layer's output even where the head writes in place.
        self.activations = captured.activations
        # What the model takes beside the images may reach the head too.
        self.bypassed = self._inputs.extra or not self._stands_alone()

    def __call__(self, activations: Tensor, rows: Tensor | None = None) -> Any:
        """The model's outputs with ``activations`` in the place of the target layer's, without gradients.

        Args:
            activations: [B, ...] as :attr:`activations`, any B from 1 up.
            rows: int64 [B], the image each row belongs to; None where row i belongs to image i.

        Raises:
            InputError: the shapes do not fit.
        """
        if activations.shape[1:] != self.activations.shape[1:]:
            raise InputError(
                f"activations must be [B, {', '.join(map(str, self.activations.shape[1:]))}] for layer {self._layer[0]!r}, got "
                f"{tuple(activations.shape)}."
            )
        batch = self._inputs.images.shape[0] if rows is None else rows.shape[0]
        if activations.shape[0] != batch:
            raise InputError(f"rows names {batch} images for {activations.shape[0]} activations: expected one each.")
        if not self.bypassed:
            return self._run(self._inputs.rows(slice(0, 1)), activations)
        return self._run(self._inputs if rows is None else self._inputs.rows(rows), activations)

    def _run(self, inputs: Inputs, activations: Tensor) -> Any:
        # The copy keeps a head that writes in place from changing the caller's activations.
        with Capture(self._model, [self._layer], gradients=False, replace=lambda _, found: activations) as capture:
            return capture.run(inputs)

    def _stands_alone(self) -> bool:
        """Whether the outputs are a function of the target layer alone, seen by running the trunk on noise."""
        images = self._inputs.images
        generator = torch.Generator(images.device).manual_seed(0)
        noise = torch.randn(
            images[:1].shape, generator=generator, device=images.device, dtype=torch.float32
        ) * images.float().std(correction=0).nan_to_num(1.0).clamp_min(1e-3)
        activations, expected = self.activations, self.outputs
        if activations.shape[0] == 1:
            # A head that counts its images betrays itself with several rows only.
            activations = torch.cat((activations, activations))
            expected = self._run(self._inputs.with_images(torch.cat((images, images))), activations)
        try:
            outputs = self._run(self._inputs.with_images(noise.to(images.dtype)), activations)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError):
            return False  # a batch size from before the layer meets the head's
        return _equal(outputs, expected)


def _equal(outputs: Any, expected: Any) -> bool:
    """Whether two outputs of one head agree to rounding: a side path from noise would be far off."""
    left = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    right = [leaf for leaf in tree_leaves(expected) if isinstance(leaf, Tensor)]
    if [leaf.shape for leaf in left] != [leaf.shape for leaf in right]:
        return False
    for a, b in zip(left, right, strict=True):
        if b.is_floating_point() and b.numel():
            tolerance = 64 * torch.finfo(b.dtype).eps * float(b[b.isfinite()].abs().amax()) if b.isfinite().any() else 0.0
            if not torch.allclose(a, b, rtol=0.0, atol=tolerance, equal_nan=True):
                return False
    return True
