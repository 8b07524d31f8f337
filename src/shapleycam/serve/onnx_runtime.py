"""A program in an ONNX file, run by ONNX Runtime or OpenVINO: the explanation without PyTorch's computing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.images import Preprocess
from ..errors import InputError
from .onnx_sessions import open_session
from .runtime import Maps, Question

_RAW = ("raw_map", "raw")


class OnnxRuntime:
    """A program in an ONNX file, as ``shapleycam export`` writes it, or anything with the same inputs and outputs.

    The input ``image`` is float32 [N, 3, H, W], normalised; ``target``, if there is one, int64 [N] or [N, M], where -1 is the
    predicted class. The outputs are ``prediction`` [N, K] and ``saliency_map`` [N, H, W], or [N, M, H, W] for several or all
    classes, and may be ``target_class`` and ``raw_map``. Method, utility and engine are those that it was made with.

    Args:
        file: its path.
        preprocess: how pictures become its inputs; None for what the file's metadata say.
        classes: a tuple of names per class; None for those in the metadata.
        engine: "onnxruntime" or "openvino".
        providers: ONNX Runtime's, in order; None for those that this installation of it has.
        threads: of one run; 0 for the engine's choice.

    Raises:
        InputError: the engine is missing, the file cannot be read, has other inputs and outputs, or does not say how pictures
            become its inputs.
    """

    gap = False
    mismatches = 0

    def __init__(
        self,
        file: str,
        preprocess: Preprocess | None = None,
        classes: Sequence[Sequence[str]] | None = None,
        *,
        engine: str = "onnxruntime",
        providers: Sequence[str] | None = None,
        threads: int = 0,
    ) -> None:
        self._session = open_session(file, engine, providers, threads)
        inputs, outputs = self._session.inputs, self._session.outputs
        maps = next((name for name in ("saliency_map", *_RAW) if name in outputs), None)
        if "image" not in inputs or inputs.keys() - {"image", "target"} or "prediction" not in outputs or maps is None:
            raise InputError(
                f"{file} has the inputs {list(inputs)} and outputs {list(outputs)}; expected 'image' (and 'target'), and "
                "'prediction', 'saliency_map' (and 'target_class', 'raw_map')."
            )
        about = _metadata(self._session.metadata, file)
        self.preprocess = preprocess or _preprocess(about, file)
        self.classes: Sequence[Sequence[str]] = [(str(n),) for n in about.get("classes", ())] if classes is None else classes
        shape = inputs["image"].shape
        crop = zip(shape[2:], self.preprocess.crop, strict=False)
        if inputs["image"].dtype != "float32" or len(shape) != 4 or any(size not in (None, side) for size, side in crop):
            raise InputError(
                f"{file} takes {inputs['image'].dtype} {list(shape)}; the server, which prepares pictures itself, has float32 "
                f"[N, 3, {self.preprocess.crop[0]}, {self.preprocess.crop[1]}]. Export it without pixels= and resize=."
            )
        self._fixed = shape[0]
        self._raw = next((name for name in _RAW if name in outputs), "saliency_map" if about.get("maps") == "raw" else None)
        self._maps = self._raw or maps
        self._all = "target" not in inputs and len(outputs[self._maps].shape) == 4
        self._names = ["prediction", self._maps, *(["target_class"] if "target_class" in outputs and not self._all else [])]
        self._targets = len(inputs["target"].shape) if "target" in inputs else 0
        layer = about.get("layer", "")
        self._made = {
            "method": str(about.get("method", "shapleycam")),
            "utility": str(about.get("utility", "rest")),
            "engine": str(about.get("engine", "program")),
            "backend": engine,
            "layer": layer if isinstance(layer, str) else ", ".join(layer),
        }
        self.count = outputs["prediction"].shape[1] or len(self.classes) or None
        self.methods: Sequence[str] = (self._made["method"],)
        self.utilities: Sequence[str] = (self._made["utility"],)
        self.engines: Sequence[str] = ("auto", *({self._made["engine"]} - {"auto"}))
        self.device = self._session.device

    def explain(self, images: Tensor, question: Question, targets: Tensor | None) -> Maps:
        """See :class:`shapleycam.serve.Runtime`. Several classes of an image are as many rows of the batch.

        A file that takes so many rows only is given its last one again to fill them.

        Raises:
            InputError: the completeness gap, or classes of a program for the predicted one.
        """
        if question.gap:
            raise InputError("This model runs as a program, which has no completeness gap: ask without it.")
        if (targets is not None or question.topk > 1) and not self._targets and not self._all:
            raise InputError("This program explains the predicted class only: ask without a target, and for one class.")
        if self._all:
            return self._picked(images, question, targets)
        if targets is None and question.topk > 1:
            targets = self.predict(images).logits.topk(question.topk, 1).indices
        count, classes = images.shape[0], 1 if targets is None else targets.shape[1]
        rows = images if classes == 1 else images.repeat_interleave(classes, 0)
        wanted = torch.full((count,), -1) if targets is None else targets.reshape(-1)
        found = self._run(rows, wanted)
        logits, maps = found["prediction"], found[self._maps]
        chosen = found["target_class"] if "target_class" in found else torch.where(wanted < 0, logits.argmax(1), wanted)
        shaped = maps.reshape(count, classes, *maps.shape[-2:]).float()
        return self._answer(logits[::classes].float(), chosen.reshape(count, classes), shaped)

    def predict(self, images: Tensor) -> Maps:
        """See :class:`shapleycam.serve.Runtime`: the map is computed too, as it is part of the program."""
        return Maps(logits=self._run(images, torch.full((images.shape[0],), -1))["prediction"].float())

    def _picked(self, images: Tensor, question: Question, targets: Tensor | None) -> Maps:
        """From a program that gives the maps of all classes."""
        found = self._run(images, torch.empty(0))
        logits, maps = found["prediction"].float(), found[self._maps].float()
        chosen = logits.topk(question.topk, 1).indices if targets is None else targets
        return self._answer(logits, chosen, maps.gather(1, chosen[:, :, None, None].expand(-1, -1, *maps.shape[2:])))

    def _answer(self, logits: Tensor, targets: Tensor, maps: Tensor) -> Maps:
        signed = self._raw is not None
        return Maps(logits, targets, raw=maps if signed else None, shown=None if signed else maps, made=self._made)

    def _run(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        found: list[list[Any]] = []
        size = self._fixed or len(images)
        for start in range(0, len(images), size):
            rows = torch.arange(start, start + size).clamp(max=len(images) - 1)
            feed: dict[str, Any] = {"image": images[rows].numpy()}
            if self._targets:
                feed["target"] = (targets[rows] if self._targets == 1 else targets[rows, None]).numpy()
            found.append(self._session.run(self._names, feed))
        whole = (torch.cat([torch.from_numpy(one[n]) for one in found]) for n in range(len(self._names)))
        return {name: rows[: len(images)] for name, rows in zip(self._names, whole, strict=True)}


def _metadata(told: Mapping[str, str], file: str) -> Mapping[str, Any]:
    """What the exporter has written into the file; empty for a file of another origin."""
    if "shapleycam" not in told:
        return dict(told)
    try:
        about = json.loads(told["shapleycam"])
    except ValueError as error:
        raise InputError(f"{file} has metadata that are no JSON.") from error
    return about if isinstance(about, dict) else {}


def _preprocess(about: Mapping[str, Any], file: str) -> Preprocess:
    told = about.get("preprocess")
    if not isinstance(told, dict):
        raise InputError(
            f"{file} does not say how pictures become its inputs: name the network that it was made of (model=), or export it "
            "with preprocess=."
        )
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    try:
        return Preprocess(**values)
    except TypeError as error:
        raise InputError(f"{file} describes its preprocessing in words that are not known: {sorted(told)}.") from error
