"""Programs for images of any height and width: which models have one, and at which sizes that is tried.

A program for one size may rely on it unseen: a pool of fixed width, a linear layer over the positions. So the explainer itself
is asked at other sizes first, which also says in the model's own words why it takes no others.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from sympy import Function, Integer, Symbol
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.overrides import TorchFunctionMode
from torch.utils._sympy.printers import PythonPrinter

from ..errors import ExportError, ShapleyCamWarning
from ..model.inputs import Inputs
from ..plan import Plan, Settings
from .graph import SIZE, TRACING, one_size, said


def resized(images: Tensor, size: tuple[int, ...]) -> Tensor:
    """Images [N, channels, H, W] at another height and width, as they might have been."""
    wide = images.detach().to(torch.promote_types(images.dtype, torch.float32))
    return F.interpolate(wide, size, mode="bilinear", align_corners=False).to(images.dtype)


def other_sizes(size: tuple[int, ...], least: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Where a program for any size from ``least`` on is tried, besides ``size``: there, and on both sides of ``size``.

    Two are oblong, and their sides odd, so that no stride but an odd one divides them.
    """
    (height, width), shrunk = size, [max(low, side - side // 5) | 1 for side, low in zip(size, least, strict=True)]
    return least, (height + height // 3 | 1, shrunk[1]), (shrunk[0], width + width // 2 | 1)


def check_sizes(settings: Settings, plan: Plan, expected: Any, images: Tensor, size: Any) -> None:
    """Raise ExportError where no program for images of any size can be had of this explainer, as far as that is known yet."""
    layout, name = expected.diagnostics.layouts[0], plan.layers[0][0]
    baseline = settings.path.baseline
    # Such models take any size, and pad it to whole windows: what the tracer refuses, after minutes.
    tensors = chain(settings.model.named_parameters(), settings.model.named_buffers())
    windows = next((key for key, _ in tensors if "relative_position" in key or "relative_coords" in key), None)
    why = None
    if images.ndim != 4 or layout.kind not in ("NCHW", "NHWC"):
        why = (
            f"layer {name!r} gives {layout.kind} for images of {images.ndim - 2} dimensions, and only a layer that keeps "
            "height and width ([N, C, H, W] or [N, H, W, C]) says where the positions of other images are"
        )
    elif isinstance(baseline, Tensor) and baseline.shape[-1] != 1:
        why = f"the baseline {tuple(baseline.shape)} has a value for every position: give one that broadcasts, such as [C, 1]"
    elif not isinstance(size, str):
        why = f"maps of {size!r} have one size: use size='layer' or 'image'"
    elif windows is not None:
        why = f"{windows!r} is a table of relative positions, of attention in windows of one size"
    elif 1 in layout.grid:
        why = f"layer {name!r} has {layout.grid} positions for images of {tuple(images.shape[2:])}: give larger images"
    if why is not None:
        raise ExportError(f"dynamic_size=True is not to be had: {why}.")


def tried(
    explain: Callable[..., Any], settings: Settings, expected: Any, images: Tensor
) -> tuple[tuple[int, ...], list[tuple[Tensor, Any]]]:
    """Ask the explainer at other sizes.

    Returns:
        the least height and width, where every layer that has several positions in a dimension keeps two of them, and images
        at other sizes with their explanations.

    Raises:
        ExportError: the model does not take other sizes, or is another there: its layout, or its head.
    """
    size, layout = tuple(images.shape[2:]), expected.diagnostics.layouts[0]
    explain = copy.copy(explain)  # a head that is another elsewhere is not to be what the user's explainer remembers
    with TRACING, warnings.catch_warnings():
        warnings.simplefilter("ignore", ShapleyCamWarning)  # the user was warned by their own explainer
        explain(images)
        large = _Large(settings, images)
        for least in _candidates(size, layout.grid):
            found = _ask(explain, resized(images, least))
            if not isinstance(found, Exception) and min(found.diagnostics.layouts[0].grid, default=0) > 1 and large(least):
                break
        results = []
        for other in other_sizes(size, least):
            probe = resized(images, other)
            found = _ask(explain, probe)
            if isinstance(found, Exception):
                raise ExportError(
                    f"dynamic_size=True is not to be had: the model takes images of {size[0]} x {size[1]}, and fails on "
                    f"{other[0]} x {other[1]} ({said(found)[:-1]}). A size that is part of the model (a linear layer over the "
                    "positions, a table of positions) stays so in its export."
                ) from found
            how, then = found.diagnostics, expected.diagnostics
            if (how.layers, how.layouts[0].kind, how.engine) != (then.layers, layout.kind, then.engine):
                raise ExportError(
                    f"dynamic_size=True is not to be had: for images of {size[0]} x {size[1]} layer {then.layers[0]!r} is read "
                    f"as {layout.kind} and explained by {then.engine!r}, for {other[0]} x {other[1]} {how.layers[0]!r} as "
                    f"{how.layouts[0].kind} by {how.engine!r}. Does the model pool with a window of fixed size? A global "
                    "average pool (nn.AdaptiveAvgPool2d(1)) is the same for every size."
                )
            results.append((probe, found))
    return least, results


def asked(explain: Callable[..., Any], images: Tensor, size: tuple[int, int], rule: str) -> tuple[Tensor, Any]:
    """One image at a size for which it is doubtful that the graph is the model's, and its explanation.

    Raises:
        ExportError: the model does not take that size; ``rule`` is what does not hold there.
    """
    probe = resized(images[:1], size)
    with TRACING, warnings.catch_warnings():
        warnings.simplefilter("ignore", ShapleyCamWarning)
        found = _ask(copy.copy(explain), probe)
    if isinstance(found, Exception):
        raise one_size(f"{rule}, and fails on {size[0]} x {size[1]} ({said(found)[:-1]})") from found
    return probe, found


class _Shapes(TorchFunctionMode):
    """Notes the shapes of what the functions of torch return, less the number of images, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, Tensor):
                self.found.append(tuple(each.shape[1:]))
        return result


class _Large:
    """Whether at some size the model has everywhere more than one of what it has several of at the images' own.

    A graph takes a dimension of one element for another than one of several.
    """

    def __init__(self, settings: Settings, images: Tensor) -> None:
        self._settings, self._images = settings, images[:1]
        self._usual = self._shapes(self._images)

    def __call__(self, size: tuple[int, ...]) -> bool:
        shapes = self._shapes(resized(self._images, size))
        return len(shapes) == len(self._usual) and all(
            len(now) == len(usual) and all(n > 1 or u <= 1 for n, u in zip(now, usual, strict=True))
            for now, usual in zip(shapes, self._usual, strict=True)
        )

    def _shapes(self, images: Tensor) -> list[tuple[int, ...]]:
        noted = _Shapes()
        with torch.no_grad(), noted:
            Inputs(images, images_as=self._settings.images_as).run(self._settings.model)
        return noted.found


def counterexamples(
    images: Tensor, least: Sequence[int], dims: tuple[int, int] = (2, 3), operators: Sequence[Any] = ()
) -> dict[tuple[int, int], str]:
    """Heights and widths for which a rule of the tracer does not hold, one for each such rule, with the rule in words.

    torch.export sees to rules about one side alone that it can solve; it passes over those about both, and leaves what it
    cannot prove to be asserted by the graph. Every rule is tried on all heights and on all widths up to some thousands, and on
    some pairs of both, for one image, as :func:`asked` gives it.

    Args:
        images: the tracer's fake tensor, with its number of images and the sizes ``dims`` free.
        least: height and width from which on they are. The tracer's own bounds are moved by the rules.
        dims: height and width of ``images``.
        operators: whom the tracer's rules are of, as far as that is known.

    Raises:
        ExportError: a rule that cannot be computed.
    """
    mode = detect_fake_mode([images])
    assert mode is not None and mode.shape_env is not None
    sides: list[Any] = [images.shape[dim] for dim in (0, *dims)]
    names = {
        side.node._expr: Symbol(name, integer=True)
        for side, name in zip(sides, ("images", *SIZE), strict=True)
        if isinstance(side, torch.SymInt)
    }
    found: dict[tuple[int, int], str] = {}
    shapes = mode.shape_env
    rules = {guard.expr: operator for guard, operator in zip_longest(shapes.guards, operators)}
    rules.update(dict.fromkeys(each.expr for each in shapes.deferred_runtime_asserts.get(None, ())))
    for rule, operator in rules.items():
        others = dict.fromkeys(rule.free_symbols - names.keys(), Integer(1))  # how many classes are given, say
        written = PythonPrinter().doprint(rule.xreplace({**names, **others}))
        known = {"math": math, "torch": torch, **{type(each).__name__: type(each) for each in rule.atoms(Function)}}
        try:
            rule_of = eval(f"lambda images, {', '.join(SIZE)}: {written}", known)
            rule_of(1, *least)
        except (AttributeError, NameError, SyntaxError) as error:  # of a tracer whose rules have words that are not known here
            raise one_size(f"{written}, which cannot be tried ({said(error)[:-1]})") from error
        except (ArithmeticError, TypeError, ValueError):
            pass  # of that size; below it does not hold there

        def holds(size: tuple[int, int], rule_of: Callable[..., Any] = rule_of) -> bool:
            try:
                return bool(rule_of(1, *size))
            except (ArithmeticError, TypeError, ValueError):  # of a size that nothing is known of
                return False

        if all(map(holds, found)):
            broken = next((each for each in _sizes_to_try(least) if not holds(each)), None)
            if broken is not None:
                found[broken] = written if operator is None else f"{written}, of {operator}"
    return found


def in_words(doubtful: Mapping[tuple[int, int], str]) -> str:
    """What :func:`counterexamples` found."""
    return "; ".join(f"{rule}, which is not so for {height} x {width}" for (height, width), rule in doubtful.items())


def _sizes_to_try(least: Sequence[int]) -> Iterator[tuple[int, int]]:
    low, narrow = least
    for more in range(2048):
        yield low + more, narrow + more * 7 % 1021
        yield low + more * 5 % 1021, narrow + more
        yield max(least) + more, max(least) + more


def _candidates(size: tuple[int, ...], grid: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Least sizes, from two strides upwards to the size itself."""
    least = tuple(2 * -(-side // positions) for side, positions in zip(size, grid, strict=True))
    while any(low < side for low, side in zip(least, size, strict=True)):
        yield tuple(min(low, side) for low, side in zip(least, size, strict=True))
        least = tuple(2 * low for low in least)
    yield size


def _ask(explain: Callable[..., Any], images: Tensor) -> Any:
    try:
        return explain(images)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises on images of another size
        return error
