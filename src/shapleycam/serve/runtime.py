"""What runs the model: one protocol, and the eager explainer behind it; onnx_runtime.py has the other one.

A runtime is called from one thread. Its maps are in host memory when it returns, so a batch is over when ``explain`` is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .. import ops
from ..data.images import Preprocess
from ..derivatives import ENGINES
from ..errors import InputError, KernelMismatch, TargetError
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
        mismatches: how often a fused operator was checked and was wrong.
    """

    preprocess: Preprocess
    classes: Sequence[Sequence[str]]
    count: int | None
    methods: Sequence[str]
    utilities: Sequence[str]
    engines: Sequence[str]
    device: str
    gap: bool
    mismatches: int

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
        check, on_mismatch: compare the fused operators with the reference, all calls or a fraction of them; see
            :class:`shapleycam.ops.checking`.
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
        check: float | None = None,
        on_mismatch: ops.OnMismatch = "fallback",
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
        self._checking = None if check is None else ops.checking(check, on_mismatch)
        self.mismatches = 0
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
        with self._counted():
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

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Checking as it was asked for, and its findings counted."""
        if self._checking is None:
            yield
            return
        before = len(self._checking.distrusted)
        try:
            with self._checking:
                yield
        except KernelMismatch:
            self.mismatches += 1
            raise
        self.mismatches += len(self._checking.distrusted) - before

    def predict(self, images: Tensor) -> Maps:
        """See :class:`Runtime`."""
        with torch.inference_mode():
            outputs = self.classifier.model(images.to(self._where))
        logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
        if logits is None or logits.ndim != 2:
            raise InputError("The server explains classifiers, whose logits are [N, K].")
        return Maps(logits=logits.float().cpu())


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
