"""A program through ``torch.compile``: one graph without breaks, with weights of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExportError, InputError, ShapleyCamError
from ..plan import Plan, Settings
from .base import Explained, Program
from .build import TOLERANCE, assemble, off
from .graph import copied, plainly, said

#: The relative error of the maps up to which a compiled program of this dtype counts as the explainer.
TOLERANCES = {torch.float64: TOLERANCE, torch.float32: TOLERANCE, torch.float16: 0.05, torch.bfloat16: 0.3}


@dataclass(frozen=True, slots=True)
class Report:
    """What compiling, folding and a smaller dtype cost in accuracy, on the images that a program was compiled with.

    Attributes:
        images: how many.
        same_class: the share of them whose predicted class is the explainer's; of the others, the map of the class that the
            program predicts is compared.
        logits, maps: the largest relative error of the logits and of the raw maps (by the image's largest magnitude).
        correlation: the least Pearson correlation of a raw map with the explainer's.
    """

    images: int
    same_class: float
    logits: float
    maps: float
    correlation: float


@dataclass(frozen=True, slots=True)
class Compilation:
    """The arguments of :meth:`shapleycam.Explainer.compile`; ``options`` are those of ``torch.compile``."""

    targets: str
    size: str | int | Sequence[int]
    all_classes: bool
    dtype: torch.dtype | None
    channels_last: bool | None
    fold: bool
    report: bool
    options: dict[str, Any]


class Compiled:
    """A compiled program, called as a program is: ``(images, targets=None) -> Explained``.

    It holds a copy of the weights: what is changed in the model later is not followed, nor is autocast. The first call of
    every shape compiles anew, which takes seconds to minutes; the sizes that it was made with are compiled already.

    Attributes:
        program: what was compiled.
        dtype: of the weights; images of another dtype are converted.
        report: what it costs in accuracy, if that was asked for.
    """

    def __init__(self, program: Program, dtype: torch.dtype, channels_last: bool, options: dict[str, Any]) -> None:
        self.program, self.dtype = program, dtype
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._run: Callable[..., Explained] = torch.compile(_own(program.explain), fullgraph=True, **options)
        self.report: Report | None = None

    def __repr__(self) -> str:
        return f"Compiled({self.program.extra_repr()}, dtype={self.dtype})"

    def __call__(self, images: Tensor, targets: Tensor | None = None) -> Explained:
        """Explain a batch; arguments, result and errors as :meth:`shapleycam.Program.forward`."""
        self.program.check(images, targets)
        with plainly(images.device), torch.no_grad():
            return self._run(images.to(self.dtype, memory_format=self._format), targets)


def _own(method: Any) -> Any:
    """The method with a code object of its own: torch.compile counts recompilations by that, over all programs."""
    function = method.__func__
    code = function.__code__.replace(co_name=f"explain_{next(_COUNT)}")
    own = FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    return MethodType(own, method.__self__)


_COUNT = count()


def compile_program(
    settings: Settings,
    plan: Plan,
    explain: Callable[..., Any],
    images: Tensor,
    asked: Compilation,
) -> Compiled:
    """Compile a studied explainer; arguments and errors as :meth:`shapleycam.Explainer.compile`."""
    dtype = images.dtype if asked.dtype is None else asked.dtype
    if dtype not in TOLERANCES:
        raise InputError(f"dtype must be one of {', '.join(map(str, TOLERANCES))}, got {dtype!r}.")
    if asked.channels_last and images.ndim != 4:
        raise InputError(f"channels_last=True needs images [N, channels, H, W], got {tuple(images.shape)}.")
    convolves = any(isinstance(module, nn.Conv2d) for module in settings.model.modules())
    last = images.ndim == 4 and convolves if asked.channels_last is None else asked.channels_last
    with torch.inference_mode(False), plainly(images.device):
        return _compile(settings, plan, explain, images, asked, dtype, last)


def _compile(
    settings: Settings,
    plan: Plan,
    explain: Callable[..., Any],
    images: Tensor,
    asked: Compilation,
    dtype: torch.dtype,
    last: bool,
) -> Compiled:
    expected = explain(images, None)
    model = copied(settings.model, type(settings.model).__name__, "compiling").to(dtype)
    if last:
        model = model.to(memory_format=torch.channels_last)
    program = assemble(settings, plan, expected, images, asked.targets, asked.size, asked.all_classes, model, asked.fold)
    try:
        compiled = Compiled(program, dtype, last, asked.options)
        found = compiled(images, expected.targets if asked.targets == "given" else None)
    except (ShapleyCamError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a compiler that is missing or fails: torch has many errors for that
        raise ExportError(
            f"torch.compile cannot compile the program of {type(settings.model).__name__}: {said(error)} Use "
            "explainer.program(images), which needs no compiler."
        ) from error
    measured = _measure(found, expected, lambda classes: explain(images, classes))
    if not max(measured.maps, measured.logits) <= TOLERANCES[dtype]:
        raise ExportError(
            f"The compiled program's maps are off by {measured.maps:.1e} (logits by {measured.logits:.1e}), relative; at most "
            f"{TOLERANCES[dtype]:.0e} is allowed for {dtype}. Use another dtype, or fold=False."
        )
    compiled.report = measured if asked.report else None
    return compiled


def _measure(found: Explained, expected: Any, explain: Callable[[Tensor], Any]) -> Report:
    """How far a program is from the explanation of the same images by their predicted classes, or by those of the program."""
    rows = torch.arange(len(expected.targets), device=expected.targets.device)
    raw, chosen = found.raw, found.targets
    if chosen.ndim == 2:  # all classes
        raw, chosen = raw[rows, expected.targets], found.logits.argmax(1)
    same = chosen == expected.targets
    wanted = expected if bool(same.all()) else explain(chosen)
    a, b = raw.double().flatten(1), wanted.raw.double().flatten(1)
    pairs = torch.stack((a, b), 1)
    centred = pairs - pairs.mean(2, keepdim=True)
    norms = centred.norm(dim=2)
    together = (centred[:, 0] * centred[:, 1]).sum(1) / norms.prod(1).clamp_min(1e-300)
    # A map of one value has no correlation.
    alive = together[(norms > 0).all(1)]
    return Report(
        images=len(rows),
        same_class=float(same.double().mean()),
        logits=off(found.logits, expected.logits),
        maps=off(a, b),
        correlation=float(alive.amin()) if len(alive) else 1.0,
    )
