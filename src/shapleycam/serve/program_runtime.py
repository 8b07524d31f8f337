"""The explainer's program: plain, compiled by ``torch.compile``, or captured in CUDA graphs; one method, utility and engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..explainer import Explainer
from ..model.zoo import Classifier
from .runtime import Maps, Question

#: How a program may run.
WAYS = ("program", "compiled", "captured")


class ProgramRuntime:
    """A program of :meth:`shapleycam.Explainer.program`, made on the thread that runs it, at the first call.

    Args:
        classifier: the model, on its device, with preprocessing and class names.
        way: "program"; "compiled", by :meth:`shapleycam.Explainer.compile`; or "captured", by
            :meth:`shapleycam.Explainer.capture`, which on a CPU is "program".
        method, utility, engine: the ones that are served.
        options: further arguments of the explainer.

    Raises:
        InputError: another way, or an unknown name.
    """

    gap = False
    mismatches = 0

    def __init__(
        self,
        classifier: Classifier,
        way: str = "compiled",
        *,
        method: str = "shapleycam",
        utility: str = "rest",
        engine: str = "auto",
        **options: Any,
    ) -> None:
        if way not in WAYS:
            raise InputError(f"A program runs as one of {', '.join(WAYS)}, got {way!r}.")
        self.classifier, self._way = classifier, way
        self.preprocess = classifier.preprocess
        self.classes: Sequence[Sequence[str]] = classifier.classes
        self.count = len(classifier.classes) or None
        self.methods: Sequence[str] = (method,)
        self.utilities: Sequence[str] = (utility,)
        self.engines: Sequence[str] = (engine,)
        self._where = next((p.device for p in classifier.model.parameters()), torch.device("cpu"))
        self.device = f"{self._where}, {way}"
        self._explainer = Explainer(classifier.model, method=method, utility=utility, engine=engine, **options)
        self._program: Callable[[Tensor, Tensor], Any] | None = None
        self._made: dict[str, str] = {}

    def explain(self, images: Tensor, question: Question, targets: Tensor | None) -> Maps:
        """See :class:`shapleycam.serve.Runtime`. With ``topk`` above 1, and no targets, the model runs once more.

        Raises:
            InputError: the completeness gap, which a program has not.
            ExportError: the explainer has no program for this model, method or engine.
        """
        if question.gap:
            raise InputError("This model runs as a program, which has no completeness gap: ask without it.")
        images = images.to(self._where)
        program = self._program or self._make(images)
        if targets is None and question.topk > 1:
            targets = self.predict(images).logits.topk(question.topk, 1).indices
        chosen = torch.full((images.shape[0], 1), -1) if targets is None else targets
        count, classes = chosen.shape
        if classes > 1 and self._way == "compiled":
            # As many rows: another shape of the targets would be compiled while clients wait.
            images, chosen = images.repeat_interleave(classes, 0), chosen.reshape(-1, 1)
        # A clone, as the compiler would look at what a view is a view of, and compile again.
        found = program(images, (chosen if chosen.shape[1] > 1 else chosen[:, 0].clone()).to(self._where))
        return Maps(
            found.logits[:: len(found.logits) // count].float().cpu(),
            found.targets.reshape(count, classes).cpu(),
            raw=found.raw.reshape(count, classes, *found.raw.shape[-2:]).float().cpu(),
            made=self._made,
        )

    def predict(self, images: Tensor) -> Maps:
        """See :class:`shapleycam.serve.Runtime`: the model itself, not compiled."""
        with torch.inference_mode():
            logits = self.classifier.model(images.to(self._where))
        return Maps(logits=logits.float().cpu())

    def _make(self, images: Tensor) -> Callable[[Tensor, Tensor], Any]:
        example = images if len(images) > 1 else torch.cat((images, torch.randn_like(images)))
        explainer = self._explainer
        if self._way == "compiled":
            self._program = explainer.compile(example, targets="given", dynamic=True)
        elif self._way == "captured":
            self._program = explainer.capture(example, targets="given")
        else:
            self._program = explainer.program(example, targets="given")
        plan = explainer.prepare(example)
        self._made = {
            "method": explainer.method.name,
            "utility": explainer.utility.name,
            "engine": plan.engine,
            "backend": self._way,
            "layer": plan.layers[0][0],
        }
        if self._way == "compiled":
            for rows in (example[:1].clone(), example):  # one row is compiled apart from several: both before clients come
                self._program(rows, torch.full((len(rows),), -1, device=rows.device))
        return self._program
