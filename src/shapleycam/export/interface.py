"""What an artefact computes: ``(image, target) -> (prediction, saliency_map, ...)``, as a module that exports."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExportError, InputError
from ..model.capture import tensor_of
from ..model.layouts import Layout
from ..program.graph import SIZE
from .metadata import Port
from .pixels import Pixels

TARGETS = ("predicted", "given", "several", "all")
MAPS = ("raw", "layer", "image")
OUTPUTS = ("prediction", "saliency_map", "raw_map", "target_class", "feature_vector")


class Interface(nn.Module):
    """A program between the inputs and outputs of an artefact.

    Args:
        program: of :meth:`shapleycam.Explainer.program`.
        outputs: some of :data:`OUTPUTS`, in the order wanted.
        maps: "raw" where ``saliency_map`` is the signed map, else its display form (the size is the program's).
        pixels: what stands in front of the program, or None.
        layer, layout: of the target layer.
    """

    def __init__(
        self,
        program: nn.Module,
        outputs: Sequence[str],
        maps: str,
        pixels: Pixels | None,
        layer: str,
        layout: Layout,
    ) -> None:
        super().__init__()
        self.program, self.pixels = program, pixels
        self.outputs, self.maps = tuple(outputs), maps
        self._layout = layout
        self._layer = layer
        self.eval()

    def train(self, mode: bool = True) -> Interface:
        """The mode is the model's own affair."""
        self.training = False
        return self

    def forward(self, image: Tensor, target: Tensor | None = None) -> tuple[Tensor, ...]:
        """The outputs, in their order.

        Raises:
            ExportError: a feature vector is wanted, and the program does not run the target layer's module.
        """
        images = image if self.pixels is None else self.pixels(image)
        found: list[Tensor] = []
        handle = None
        if "feature_vector" in self.outputs:
            model, layer, owner = self.program.model, self._layer, threading.get_ident()
            assert isinstance(model, nn.Module)

            def take(module: nn.Module, args: Any, output: Any) -> None:
                if threading.get_ident() != owner:  # who explains the same model meanwhile
                    return
                found.append(self._layout.view(tensor_of(output, layer)).mean(2))

            handle = model.get_submodule(layer).register_forward_hook(take)
        try:
            explained = self.program(images) if target is None else self.program(images, target)
        finally:
            if handle is not None:
                handle.remove()
        if "feature_vector" in self.outputs and not found:
            raise ExportError(f"There is no feature vector: the program of this head does not run {self._layer!r} itself.")
        known = {
            "prediction": explained.logits,
            "saliency_map": explained.raw if self.maps == "raw" else self._marked(explained.maps, explained.raw),
            "raw_map": explained.raw,
            "target_class": explained.targets,
        }
        if found:
            known["feature_vector"] = found[0]
        return tuple(known[name] for name in self.outputs)

    def _marked(self, maps: Tensor, raw: Tensor) -> Tensor:
        """Display maps, NaN where the signed map is: OpenVINO's maximum of NaN and 0 is 0."""
        lost = raw.flatten(-len(self._layout.grid)).sum(-1).isnan()
        return torch.where(lost.view(*lost.shape, *[1] * len(self._layout.grid)), float("nan"), maps)


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    """Raise InputError unless ``value`` is one of ``known``."""
    if value not in known:
        raise InputError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}.")


def check_outputs(outputs: Sequence[str]) -> tuple[str, ...]:
    """The outputs as a tuple, with InputError where one is unknown or named twice, or no map or no prediction is left."""
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    for name in names:
        check_choice("outputs", name, OUTPUTS)
    if len(set(names)) < len(names):
        raise InputError(f"An output is named twice in {names}.")
    if "prediction" not in names or not {"saliency_map", "raw_map"} & set(names):
        raise InputError(f"outputs must have 'prediction', and 'saliency_map' or 'raw_map', got {names}.")
    return names


#: What the free dimensions of maps are called.
GRID = ("grid_height", "grid_width")


def input_ports(targets: str, image_shape: Sequence[int | str], pixels: Pixels | None, dtype: torch.dtype) -> tuple[Port, ...]:
    """The inputs: ``image`` (``image_shape`` is one image's), and ``target`` where classes are given."""
    if pixels is None:
        image = Port("image", str(dtype)[6:], ("n", *image_shape), "images, normalised as the model expects")
    elif pixels.resize:
        image = Port("image", "uint8", ("n", *SIZE, 3), "decoded RGB pictures of any size")
    else:
        said = "of any size, which are not resized" if image_shape[1:] == SIZE else "of the model's size"
        image = Port("image", "uint8", ("n", *image_shape[1:], 3), f"decoded RGB pictures {said}")
    said = "the class to explain; -1 is the predicted one, any other index that is no class gives a map of NaN"
    if targets == "given":
        return image, Port("target", "int64", ("n",), said)
    if targets == "several":
        return image, Port("target", "int64", ("n", "m"), said.replace("class", "classes", 1))
    return (image,)


def output_ports(
    outputs: Sequence[str], values: Sequence[Tensor], targets: str, maps: str, prediction: str, dynamic_size: bool = False
) -> tuple[Port, ...]:
    """The outputs, from an example of their values; with ``dynamic_size`` maps have no size yet."""
    display = {"raw": "signed", "layer": "in [0, 1], at the layer's size", "image": "in [0, 1], at the image's size"}[maps]
    content = {
        "prediction": "logits",
        "saliency_map": f"maps, {display}",
        "raw_map": "signed maps",
        "target_class": "the explained classes",
        "feature_vector": "mean over the positions of the target layer's output",
    }
    ports = []
    for name, value in zip(outputs, values, strict=True):
        shape: list[int | str] = ["n", *value.shape[1:]]
        if targets == "several" and name in ("saliency_map", "raw_map", "target_class"):
            shape[1] = "m"
        if dynamic_size and name in ("saliency_map", "raw_map"):
            shape[-2:] = SIZE if name == "saliency_map" and maps == "image" else GRID
        ports.append(Port(prediction if name == "prediction" else name, str(value.dtype)[6:], tuple(shape), content[name]))
    return tuple(ports)
