"""What an artefact says of itself: one JSON document inside the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import nn

from ..errors import InputError

#: Of the document below. A reader refuses what is newer than itself.
LAYOUT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output of an artefact.

    Attributes:
        name, dtype: as the runtime knows them; dtype in PyTorch's words ("float32").
        shape: numbers, and names of dimensions that are free ("n" for the batch).
        content: what it holds, in words.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    content: str


@dataclass(frozen=True, slots=True)
class Metadata:
    """The document.

    Attributes:
        layout_version: of the document.
        format: "onnx", "pt2" or "aoti".
        inputs, outputs: in their order.
        targets: "predicted", "given", "several" or "all".
        maps: what ``saliency_map`` is: "raw", "layer" or "image".
        image_size: (height, width) that the network takes; with ``least_size``, of the images that it was made with.
        preprocess: the fields of :class:`shapleycam.data.images.Preprocess`, None where unknown. Whether it is done inside the
            artefact, the dtype and the shape of the input ``image`` say.
        classes: their names, empty where unknown.
        model: the name of the network. weights: sha256 of its ``state_dict``: see :func:`weights_checksum`.
        layer, method, utility, engine, baseline, nodes: of the explainer.
        versions: of the packages that made the file.
        checks: how far the artefact was off when it was made, in each runtime that it was run in: see
            :class:`shapleycam.export.Checks`.
        least_size: the least (height, width) of images where these are free (``dynamic_size=True``), else empty.
    """

    format: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    targets: str
    maps: str
    image_size: tuple[int, ...]
    preprocess: Mapping[str, Any] | None
    classes: tuple[str, ...]
    model: str
    weights: str
    layer: tuple[str, ...]
    method: str
    utility: str
    engine: str
    baseline: str
    nodes: int | None
    versions: Mapping[str, str]
    checks: Mapping[str, Any] = field(default_factory=dict)
    least_size: tuple[int, ...] = ()
    layout_version: int = LAYOUT_VERSION

    def dumps(self) -> str:
        """The document as JSON, in ASCII."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def loads(cls, text: str, where: str) -> Metadata:
        """Read :meth:`dumps`.

        Raises:
            InputError: it is not one, or of a newer layout; ``where`` is what the message calls the file.
        """
        try:
            content = json.loads(text)
            version = content["layout_version"]
            if not isinstance(version, int) or version > LAYOUT_VERSION:
                raise InputError(
                    f"{where} has metadata of layout version {version!r}, and this shapleycam reads {LAYOUT_VERSION}: use a "
                    "newer one."
                )
            known = {each.name for each in fields(cls)}
            content = {key: _tuples(value) for key, value in content.items() if key in known}
            for ports in ("inputs", "outputs"):
                content[ports] = tuple(Port(**port) for port in content[ports])
            return cls(**content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{where} has metadata that is not shapleycam's ({type(error).__name__}: {error}).") from error

    def port(self, name: str) -> Port | None:
        """The input or output of that name, if there is one."""
        return next((port for port in (*self.inputs, *self.outputs) if port.name == name), None)


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tuples(each) for each in value)
    return {key: _tuples(each) for key, each in value.items()} if isinstance(value, dict) else value


def weights_checksum(model: nn.Module) -> str:
    """sha256 over the names, dtypes, shapes and bytes of the tensors in a model's ``state_dict``, in the order of their names.

    The same for the same weights, on every device and in every memory layout; buffers that are not persistent, and tensors
    that the model holds otherwise, are none of it.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, torch.Tensor):
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        plain = value.detach().to("cpu").contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().data if plain.numel() else b"")
    return digest.hexdigest()
