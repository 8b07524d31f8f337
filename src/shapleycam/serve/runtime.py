"""What runs the model: one protocol, the eager explainer behind it, and ONNX Runtime for a file that holds a program.

A runtime is called from one thread. Its maps are in host memory when it returns, so a batch is over when ``explain`` is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..data.images import Preprocess
from ..derivatives import ENGINES
from ..errors import InputError, TargetError
from ..explainer import Explainer
from ..explanation import Diagnostics, Explanation
from ..methods.table import METHODS
from ..model.zoo import Classifier
from ..utilities.named import UTILITIES

#: Methods that ask the model once per channel: a request for one costs as much as hundreds of others.
COSTLY = ("scorecam", "ablationcam")


@dataclass(frozen=True, slots=True)
class Question:
    """What a client asks of an image; requests with the same :attr:`key` share a batch.

    Attributes:
        method, utility, engine: names as for :class:`shapleycam.Explainer`; "" for the server's default.
        targets: the classes to explain; () for the most probable ones.
        topk: how many of those.
        gap: also the completeness gap.
        explain: False for a prediction alone.
    """

    method: str = ""
    utility: str = ""
    engine: str = ""
    targets: tuple[int, ...] = ()
    topk: int = 1
    gap: bool = False
    explain: bool = True

    @property
    def key(self) -> tuple[Any, ...]:
        """What the images of a batch have in common: everything but which classes were named."""
        if not self.explain:
            return ("predict",)
        return (self.method, self.utility, self.engine, len(self.targets), self.topk, self.gap)


@dataclass(frozen=True, slots=True)
class Maps:
    """The answers to a batch of N images with M classes each, in host memory.

    Attributes:
        logits: [N, K] float32.
        targets: the explained classes, int64 [N, M]; None for a prediction alone.
        raw: the signed maps [N, M, h, w] float32, before the final ReLU; None for a prediction, or where the program has none.
        shown: display maps in [0, 1], [N, M, H, W] float32, from a program that has no raw ones; else None.
        gap: the completeness gap [N, M], if it was asked for.
        made: how: method, utility, engine, backend, layer.
    """

    logits: Tensor
    targets: Tensor | None = None
    raw: Tensor | None = None
    shown: Tensor | None = None
    gap: Tensor | None = None
    made: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class Runtime(Protocol):
    """What the server needs of a model.

    Attributes:
        preprocess: how pictures become its inputs.
        classes: a tuple of names per class; () where unknown.
        count: K, the number of classes; None where that is not known before the first batch.
        methods, utilities, engines: what may be asked for, the default first.
        device: where it runs, in words.
        gap: whether it has the completeness gap.
    """

    preprocess: Preprocess
    classes: Sequence[Sequence[str]]
    count: int | None
    methods: Sequence[str]
    utilities: Sequence[str]
    engines: Sequence[str]
    device: str
    gap: bool

    def explain(self, images: Tensor, question: Question, targets: Tensor | None) -> Maps:
        """Explain a batch.

        Args:
            images: float32 [N, 3, H, W] in host memory, normalised by ``preprocess``.
            question: what all N have in common.
            targets: int64 [N, M], the named classes of each; None for the ``question.topk`` most probable ones.
        """

    def predict(self, images: Tensor) -> Maps:
        """The logits alone."""


class ExplainerRuntime:
    """The eager explainer: any model, method and engine.

    One explainer per combination of method, utility and engine is made when it is first asked for, over the same model.

    Args:
        classifier: the model, on its device, with preprocessing and class names.
        layer: as for :class:`shapleycam.Explainer`, one layer.
        methods, utilities, engines: what clients may ask for, the default first. By default all, but the methods that ask the
            model once per channel (:data:`COSTLY`).
        options: further arguments of the explainers (``nodes`` goes to those of engine "quadrature" only).

    Raises:
        InputError: an unknown name, or several layers.
    """

    gap = True

    def __init__(
        self,
        classifier: Classifier,
        *,
        layer: Any = "auto",
        methods: Sequence[str] | None = None,
        utilities: Sequence[str] | None = None,
        engines: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        if isinstance(layer, (list, tuple)) and len(layer) != 1:
            raise InputError(f"A served model has one target layer, got {list(layer)}.")
        self.classifier = classifier
        self.preprocess = classifier.preprocess
        self.classes: Sequence[Sequence[str]] = classifier.classes
        self.count = len(classifier.classes) or None
        self.methods: Sequence[str] = _known("method", methods, [name for name in METHODS if name not in COSTLY], METHODS)
        self.utilities: Sequence[str] = _known(
            "utility", utilities, ["rest", *(u for u in UTILITIES if u != "rest")], UTILITIES
        )
        self.engines: Sequence[str] = _known("engine", engines, ["auto", *ENGINES], ["auto", *ENGINES])
        self._where = next((p.device for p in classifier.model.parameters()), torch.device("cpu"))
        self.device = str(self._where)
        self._layer, self._options = layer, options
        self._explainers: dict[tuple[str, str, str], Explainer] = {}

    def _explainer(self, question: Question) -> Explainer:
        names = question.method or self.methods[0], question.utility or self.utilities[0], question.engine or self.engines[0]
        found = self._explainers.get(names)
        if found is None:
            method, utility, engine = names
            options = {name: value for name, value in self._options.items() if name != "nodes" or engine == "quadrature"}
            found = Explainer(self.classifier.model, self._layer, method, utility, engine, **options)
            self._explainers[names] = found
        return found

    def explain(self, images: Tensor, question: Question, targets: Tensor | None) -> Maps:
        """See :class:`Runtime`. With ``topk`` above 1, and no targets, the model runs once more, to know the classes.

        Raises:
            TargetError: a class that the model does not have.
            ShapleyCamError: as :class:`shapleycam.Explainer`.
        """
        images = images.to(self._where, non_blocking=True)
        explainer = self._explainer(question)
        if targets is None and question.topk > 1:
            logits = self.predict(images).logits
            if question.topk > logits.shape[1]:
                raise TargetError(f"topk is {question.topk}, and the model has {logits.shape[1]} classes.")
            targets = logits.topk(question.topk, 1).indices
        several = targets is not None and targets.shape[1] > 1
        chosen = None if targets is None else targets.to(self._where) if several else targets[:, 0].to(self._where)
        found = explainer(images, chosen, with_gap=question.gap and explainer.method.order > 0)
        if found.logits is None or found.targets is None:
            raise InputError("The server explains classifiers, whose logits are [N, K].")
        how = found.diagnostics
        made = {
            "method": how.method,
            "utility": how.utility,
            "engine": how.engine,
            "backend": how.backend,
            "layer": how.layers[0],
        }

        def wide(tensor: Tensor) -> Tensor:
            return tensor if several else tensor[:, None]

        return Maps(
            logits=found.logits.float().cpu(),
            targets=wide(found.targets).cpu(),
            raw=wide(found.raw).float().cpu(),
            gap=None if found.gap is None else wide(found.gap).float().cpu(),
            made=made,
        )

    def predict(self, images: Tensor) -> Maps:
        """See :class:`Runtime`."""
        with torch.inference_mode():
            outputs = self.classifier.model(images.to(self._where))
        logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
        if logits is None or logits.ndim != 2:
            raise InputError("The server explains classifiers, whose logits are [N, K].")
        return Maps(logits=logits.float().cpu())


class OnnxRuntime:
    """A program in an ONNX file, run by ONNX Runtime; PyTorch computes nothing here.

    The file has an input ``image`` [N, 3, H, W] and may have ``target``, int64 [N] or [N, M], where -1 is the predicted class.
    Its outputs are ``prediction`` [N, K] and ``saliency_map`` [N, (M,) H, W], and may be ``target_class`` and ``raw``. Method,
    utility and engine are those that it was made with.

    Args:
        file: its path.
        preprocess: how pictures become its inputs.
        classes: a tuple of names per class, or ().
        made: how it was made: method, utility, engine, layer, where the file's metadata do not say so.
        providers: ONNX Runtime's, in order; None for those that this installation of it has.
        threads: of one run; 0 for ONNX Runtime's choice.

    Raises:
        InputError: onnxruntime is missing, the file cannot be read, or has other inputs and outputs.
    """

    gap = False

    def __init__(
        self,
        file: str,
        preprocess: Preprocess,
        classes: Sequence[Sequence[str]] = (),
        *,
        made: Mapping[str, str] | None = None,
        providers: Sequence[str] | None = None,
        threads: int = 0,
    ) -> None:
        from ..optional import need

        ort = need("onnxruntime", "export")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self._session = ort.InferenceSession(file, options, providers=providers or ort.get_available_providers())
        except Exception as error:  # ONNX Runtime has an error of its own per way to fail
            raise InputError(f"{file} cannot be run by ONNX Runtime: {str(error).splitlines()[0]}") from error
        inputs = {one.name: one for one in self._session.get_inputs()}
        outputs = {one.name: one for one in self._session.get_outputs()}
        if "image" not in inputs or not {"prediction", "saliency_map"} <= set(outputs):
            raise InputError(
                f"{file} has the inputs {list(inputs)} and outputs {list(outputs)}; expected 'image' (and 'target'), and "
                "'prediction', 'saliency_map' (and 'target_class', 'raw')."
            )
        shape = inputs["image"].shape
        if tuple(shape[2:]) != tuple(preprocess.crop):
            raise InputError(f"{file} takes images of {shape[2:]}, but the preprocessing makes {list(preprocess.crop)}.")
        self._fixed = shape[0] if isinstance(shape[0], int) else None
        self._names = [name for name in ("prediction", "saliency_map", "target_class", "raw") if name in outputs]
        self._targets = len(inputs["target"].shape) if "target" in inputs else 0
        told = {**self._session.get_modelmeta().custom_metadata_map, **(made or {})}
        self._made = {
            "method": told.get("method", "shapleycam"),
            "utility": told.get("utility", "rest"),
            "engine": told.get("engine", "program"),
            "backend": "onnxruntime",
            "layer": told.get("layer", ""),
        }
        self.preprocess = preprocess
        self.classes: Sequence[Sequence[str]] = classes
        count = outputs["prediction"].shape[1]
        self.count = count if isinstance(count, int) else None
        self.methods: Sequence[str] = (self._made["method"],)
        self.utilities: Sequence[str] = (self._made["utility"],)
        self.engines: Sequence[str] = ("auto", *({self._made["engine"]} - {"auto"}))
        self.device = self._session.get_providers()[0]

    def explain(self, images: Tensor, question: Question, targets: Tensor | None) -> Maps:
        """See :class:`Runtime`. Several classes of an image are as many rows of the batch.

        Raises:
            InputError: the completeness gap, or classes of a program for the predicted one.
        """
        if question.gap:
            raise InputError("This model runs as a program, which has no completeness gap: ask without it.")
        if targets is None and question.topk > 1:
            targets = self.predict(images).logits.topk(question.topk, 1).indices
        if targets is not None and not self._targets:
            raise InputError("This program explains the predicted class only: ask without a target.")
        count, classes = images.shape[0], 1 if targets is None else targets.shape[1]
        rows = images if classes == 1 else images.repeat_interleave(classes, 0)
        wanted = torch.full((count,), -1) if targets is None else targets.reshape(-1)
        found = self._run(rows, wanted)
        logits = found["prediction"]
        if "target_class" in found:
            chosen = found["target_class"].reshape(count, classes)
        else:
            chosen = torch.where(wanted < 0, logits.argmax(1), wanted).reshape(count, classes)

        def maps(name: str) -> Tensor | None:
            one = found.get(name)
            return None if one is None else one.reshape(count, classes, *one.shape[-2:]).float()

        raw = maps("raw")
        return Maps(
            logits=logits[::classes].float(),
            targets=chosen,
            raw=raw,
            shown=maps("saliency_map") if raw is None else None,
            made=self._made,
        )

    def predict(self, images: Tensor) -> Maps:
        """See :class:`Runtime`: the map is computed too, as it is part of the program."""
        return Maps(logits=self._run(images, torch.full((images.shape[0],), -1))["prediction"].float())

    def _run(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        parts = [images] if self._fixed is None else images.split(self._fixed)
        found: list[list[Any]] = []
        start = 0
        for part in parts:
            feed: dict[str, Any] = {"image": part.contiguous().numpy()}
            here = targets[start : start + len(part)]
            start += len(part)
            if self._targets:
                feed["target"] = (here if self._targets == 1 else here[:, None]).contiguous().numpy()
            found.append(self._session.run(self._names, feed))
        return {name: torch.cat([torch.from_numpy(one[index]) for one in found]) for index, name in enumerate(self._names)}


def _known(what: str, asked: Sequence[str] | None, default: Sequence[str], known: Any) -> tuple[str, ...]:
    if asked is None:
        return tuple(default)
    unknown = [name for name in asked if name not in known]
    if unknown or not asked:
        raise InputError(f"Unknown {what} {unknown or list(asked)}: expected some of {', '.join(known)}.")
    return tuple(asked)


def as_explanation(maps: Maps, row: int, size: tuple[int, int]) -> Explanation:
    """The answer to one image as an explanation of one image with M classes, which knows how to draw itself.

    Args:
        maps: the answers to a batch.
        row: which image.
        size: (height, width) of the image as the network saw it.
    """
    shape = maps.raw if maps.raw is not None else maps.shown
    assert shape is not None and maps.targets is not None
    picked = slice(row, row + 1)
    made: dict[str, Any] = {name: maps.made.get(name, "") for name in ("method", "utility", "engine", "backend")}
    return Explanation(
        outputs=None,
        logits=maps.logits[picked],
        targets=maps.targets[picked],
        raws=(shape[picked],),
        image_size=size,
        diagnostics=Diagnostics(layers=(maps.made.get("layer", ""),), layouts=(), **made),
        gap=None if maps.gap is None else maps.gap[picked],
    )
