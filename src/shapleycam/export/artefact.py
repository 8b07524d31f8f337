"""Artefacts that were made before: :func:`load`, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..program.graph import SIZE
from .check import classes_of
from .formats import Run, check_runtimes, format_of
from .metadata import Metadata, Port


class Result(NamedTuple):
    """What an artefact says of a batch of N images, on the CPU.

    Attributes:
        logits: [N, K].
        targets: the explained classes, int64 [N] or [N, M].
        maps: ``saliency_map``: [N, *size] or [N, M, *size]; signed, or in [0, 1]; None if the artefact has none.
        raw: ``raw_map``: signed maps [N, *grid] or [N, M, *grid]; None if the artefact has none.
        features: ``feature_vector``, [N, C]; None if the artefact has none.
    """

    logits: Tensor
    targets: Tensor
    maps: Tensor | None
    raw: Tensor | None
    features: Tensor | None


class Artefact:
    """A file that explains, opened in its own runtime; made by :func:`load` and :func:`export`.

    Attributes:
        path: of the file.
        metadata: what it says of itself.
    """

    def __init__(self, path: Path, metadata: Metadata, run: Run) -> None:
        self.path, self.metadata = path, metadata
        self._run = run

    def __repr__(self) -> str:
        about = self.metadata
        return (
            f"Artefact({str(self.path)!r}, format={about.format!r}, model={about.model!r}, layer={list(about.layer)}, "
            f"method={about.method!r}, utility={about.utility!r}, engine={about.engine!r}, targets={about.targets!r}, "
            f"maps={about.maps!r})"
        )

    def explain(self, images: Any, targets: Any = None) -> Result:
        """Explain a batch.

        Args:
            images: a tensor, or an array, of the artefact's input ``image``: normalised images, or uint8 pixels [N, H, W, 3].
            targets: for an artefact that is given classes: None for the predicted ones, an int for all images, or int64 [N]
                (or [N, M]), where -1 is the predicted class and an index that is no class gives a map of NaN.

        Raises:
            InputError: another dtype or shape than the artefact takes, no image, or targets that it does not take.
        """
        image = _as_tensor("images", images, self.metadata.inputs[0], self.metadata.least_size)
        feed, given = {"image": image}, None
        port = self.metadata.port("target")
        if port is not None:
            given = self._targets(targets, image.shape[0], port)
            feed["target"] = given
        elif targets is not None:
            raise InputError(f"This artefact explains {self.metadata.targets} classes and takes no targets.")
        values = self._run(feed)
        named = {port.name: value for port, value in zip(self.metadata.outputs, values, strict=True)}
        logits = next(value for port, value in zip(self.metadata.outputs, values, strict=True) if port.content == "logits")
        chosen = classes_of(self.metadata.targets, given, logits)
        several = self.metadata.targets in ("several", "all")
        return Result(
            logits,
            chosen if several else chosen[:, 0],
            named.get("saliency_map"),
            named.get("raw_map"),
            named.get("feature_vector"),
        )

    def class_name(self, index: int) -> str:
        """The name of a class, or "class 7" where names are unknown."""
        names = self.metadata.classes
        return names[index] if 0 <= index < len(names) else f"class {index}"

    def _targets(self, targets: Any, count: int, port: Port) -> Tensor:
        several = len(port.shape) == 2
        wanted = f"an int, or int64 {'[N, M]' if several else '[N]'} with N = {count}"
        try:
            given = torch.as_tensor(-1 if targets is None else targets)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise InputError(f"targets must be {wanted}, got {targets!r:.80}: {error}.") from error
        whole = given.dtype in (torch.int64, torch.int32)
        if whole and given.ndim == 0:  # one class for all images
            return torch.full((count, 1) if several else (count,), int(given), dtype=torch.int64)
        if not whole or given.ndim != len(port.shape) or given.shape[0] != count or 0 in given.shape:
            raise InputError(f"targets must be {wanted}, got {given.dtype} {tuple(given.shape)}.")
        return given.detach().to("cpu", torch.int64).contiguous()


def load(path: str | Path, runtime: str | None = None) -> Artefact:
    """Open an artefact that :func:`export` made, on the CPU.

    Args:
        path: of the file.
        runtime: "onnxruntime" or "openvino" for an ONNX file; "torch" for the others; None for the usual one.

    A file of format "pt2" or "aoti" may run code of whoever made it: load none that you do not trust.

    Raises:
        InputError: the file is missing, was not made by shapleycam, or is damaged; or the runtime is not installed, or none
            of this format.
    """
    path = Path(path)
    form, text = format_of(path)
    metadata = Metadata.loads(text, str(path))
    [runtime] = check_runtimes(form, () if runtime is None else (runtime,))
    return Artefact(path, metadata, form.open(path, metadata, runtime))


def _as_tensor(name: str, value: Any, port: Port, least: Sequence[int]) -> Tensor:
    try:
        tensor = torch.as_tensor(value).detach().to("cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be a tensor or an array, got {type(value).__name__}.") from error
    fits = tensor.ndim == len(port.shape) and all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(tensor.shape, port.shape, strict=True)
    )
    lows = {dim: low for dim, low in zip(SIZE, least, strict=False) if dim in port.shape}
    fits = fits and all(tensor.shape[port.shape.index(dim)] >= low for dim, low in lows.items())
    if str(tensor.dtype) != f"torch.{port.dtype}" or not fits or 0 in tensor.shape:
        wanted = f"{port.dtype} [{', '.join(map(str, port.shape)).replace('n,', 'N,', 1)}]"
        wanted += "".join(f", {dim} >= {low}" for dim, low in lows.items())
        raise InputError(f"{name} must be {wanted} ({port.content}), got {tensor.dtype} {tuple(tensor.shape)}.")
    return tensor.contiguous()
