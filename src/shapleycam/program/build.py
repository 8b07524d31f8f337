"""From a studied explainer to its program, which is compared with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExportError, ShapleyCamError
from ..model.layouts import Layout
from ..plan import Plan, Settings
from .base import Explained, Program, Recipe, map_size
from .graph import ModelGraph, one_size, operator_of, plainly, said, trace
from .pooled import PooledProgram
from .sizes import asked, check_sizes, in_words, other_sizes, resized, tried
from .traced import TracedProgram

#: The relative error up to which a program counts as the explainer that it was made from.
TOLERANCE = 1e-4


def build(
    settings: Settings,
    plan: Plan,
    explain: Callable[..., Any],
    images: Tensor,
    targets: str,
    size: str | int | Sequence[int],
    all_classes: bool = False,
    dynamic_size: bool = False,
) -> Program:
    """The program of a studied explainer, compared with it; arguments and errors as :meth:`shapleycam.Explainer.program`.

    Args:
        settings, plan: of the explainer.
        explain: the explainer, ``(images, targets) -> Explanation``.
        images, targets, size, all_classes, dynamic_size: as there.
    """
    with torch.inference_mode(False), plainly(images.device):  # tensors of inference mode have no derivatives
        expected = explain(images, None)
        least: tuple[int, ...] = ()
        others: list[tuple[Tensor, Any]] = []
        if dynamic_size:
            check_sizes(settings, plan, expected, images, size)
            least, others = tried(explain, settings, expected, images)
        program = assemble(settings, plan, expected, images, targets, size, all_classes, least=least)
        doubtful = program.doubtful if isinstance(program, TracedProgram) else {}
        try:
            _compare(program, explain, images, expected)
            for other, meant in others:
                _compare(program, explain, other, meant)
        except ExportError as error:
            if doubtful:
                raise one_size(in_words(doubtful)) from error
            raise
        for size_of_doubt in doubtful:
            rule = in_words({size_of_doubt: doubtful[size_of_doubt]})
            other, meant = asked(explain, images, size_of_doubt, rule)
            try:
                _compare(program, copy.copy(explain), other, meant)
            except ExportError as error:
                raise one_size(rule) from error
    return program


def assemble(
    settings: Settings,
    plan: Plan,
    expected: Any,
    images: Tensor,
    targets: str,
    size: str | int | Sequence[int],
    all_classes: bool,
    converted: nn.Module | None = None,
    fold: bool = False,
    least: tuple[int, ...] = (),
) -> Program:
    """The program, not compared yet.

    Args:
        expected: the explainer's explanation of ``images``.
        settings, plan, images, targets, size, all_classes: as for :func:`build`.
        converted: a copy of the model, in another dtype perhaps, whose weights are to be the program's own.
        fold: fold its batch normalisations.
        least: height and width from which on any size is taken; empty for the images' own.
    """
    recipe, pooled = _recipe(settings, plan, expected, images, targets, size, least), plan.facts.pooled
    model, frozen = settings.model if converted is None else converted, converted is not None
    if frozen:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype)
        images = images.to(dtype)
        if isinstance(recipe.path.baseline, Tensor):
            recipe = replace(recipe, path=replace(recipe.path, baseline=recipe.path.baseline.to(dtype)))

    def graph() -> ModelGraph:
        example = resized(images, other_sizes(tuple(images.shape[2:]), least)[1]) if least else images
        return trace(model, recipe.layer, example, settings.images_as, fold=fold, least=least)

    if pooled is not None and recipe.engine in ("closed_form", "quadrature") and settings.utility.named:
        linear = next(name for name, module in settings.model.named_modules() if module is pooled.linear)
        return PooledProgram(model, recipe, linear, graph() if frozen else None)
    if targets == "all" and not all_classes:
        classes = expected.logits.shape[1] if expected.logits is not None and expected.logits.ndim == 2 else 0
        raise ExportError(
            f"targets='all' costs {classes} passes of the head for each image here, all of them in memory at once, as the "
            f"head is not pool-and-linear ({plan.facts.head}). Ask for it with all_classes=True, or use targets='given'."
        )
    if recipe.engine not in ("quadrature", "reverse_over_reverse"):  # of which the others are equals
        recipe = replace(recipe, engine="reverse_over_reverse")
    return TracedProgram(model, recipe, graph(), frozen)


def _recipe(
    settings: Settings,
    plan: Plan,
    expected: Any,
    images: Tensor,
    targets: str,
    size: str | int | Sequence[int],
    least: tuple[int, ...],
) -> Recipe:
    if len(plan.layers) != 1:
        raise ExportError(f"A program explains one target layer, and there are {len(plan.layers)}: make one for each.")
    value = settings.utility.value
    if settings.utility.rows(torch.zeros(1, dtype=torch.int64)).value is not value:
        raise ExportError(
            f"The utility {settings.utility.name!r} holds something for every image of one batch, and a program takes any "
            "number of images. Use a utility that is the same for all images."
        )
    engine, path = plan.engine, settings.path
    if engine == "midpoint":
        engine, path = "quadrature", replace(path, nodes=1)
    layout: Layout = expected.diagnostics.layouts[0]
    wanted = map_size(size, layout.grid, expected.image_size)
    return Recipe(
        plan.layers[0][0],
        layout,
        settings.method,
        settings.utility,
        path,
        engine,
        tuple(images.shape[1:]),
        str(size) if least else wanted,
        targets,
        plan.facts.writes,
        settings.images_as,
        least,
    )


def _compare(program: Program, explain: Callable[..., Any], images: Tensor, expected: Any) -> None:
    """Raise ExportError unless the program is the explainer, also for one image more."""

    def run(*inputs: Tensor) -> Explained:
        try:
            explained: Explained = program(*inputs)
            return explained
        except (ShapleyCamError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of an operator that a graph has with the sizes of its example
            raise ExportError(
                f"The program does not run for {len(inputs[0])} images{operator_of(error)}: {said(error)} An operator behind "
                f"{program.layer!r} fixes their number: explain a layer behind it, or write it with others in the model."
            ) from error

    found = run(images)
    if program.targets != "predicted":
        # The predicted class, and the first and the last: what is given and what is gathered must be what is meant.
        last = torch.full_like(expected.targets, expected.logits.shape[1] - 1)
        classes = torch.stack((expected.targets, torch.zeros_like(last), last), 1)
        expected = explain(images, classes)
        found = run(images, classes) if program.targets == "given" else found
        if program.targets == "all":
            found = found._replace(raw=found.raw[torch.arange(len(classes), device=classes.device)[:, None], classes])
    pairs = [(found.logits, expected.logits), (found.raw, expected.raw)]
    if isinstance(program, TracedProgram) and program.targets != "all":
        more = run(torch.cat((images, images[:1])))
        pairs += [(more.logits, torch.cat((found.logits, found.logits[:1])))]
        if found.raw.ndim == more.raw.ndim:
            pairs += [(more.raw, torch.cat((found.raw, found.raw[:1])))]
    wrong = off(found.logits, expected.logits), max(off(*pair) for pair in pairs)
    if not max(wrong) <= TOLERANCE:
        raise ExportError(
            f"The program differs from the explainer: logits by {wrong[0]:.1e}, maps by {wrong[1]:.1e}, relative; at most "
            f"{TOLERANCE:.0e} is allowed. Is the model the same in every call (in evaluation mode, without random parts)? Is "
            "the map more than rounding (where a norm follows the layer at once, the sums of some methods cancel)?"
        )


def off(got: Tensor, expected: Tensor) -> float:
    """The largest relative error of a row, by the magnitude of the row; infinite where shapes, NaN or Inf differ."""
    if got.shape != expected.shape:
        return float("inf")
    differs = (got != expected) & ~(got.isnan() & expected.isnan())
    if bool((differs & ~(got.isfinite() & expected.isfinite())).any()):
        return float("inf")
    difference = (got.double() - expected.double()).nan_to_num(0.0).flatten(1).abs().amax(1)
    size = expected.double().nan_to_num(0.0, 0.0, 0.0).flatten(1).abs().amax(1)
    return float((difference / size.clamp_min(1e-30)).amax())
