"""Utilities: the scalar per image whose Shapley values are explained.

A named utility's derivatives in the logits are three coefficients (:mod:`shapleycam.ops.coefficients`); a user's own callable
has none, and is differentiated by autograd.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..ops.coefficients import COEFFICIENTS, Coefficients
from .outputs import Output, flat, logits_of

UtilityFunction = Callable[[Any, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class Utility:
    """One utility.

    Attributes:
        name: the key ("rest"), or the user's function's name.
        formula: U, for people.
        value: ``(outputs, targets [N]) -> [N]``, differentiable; a utility with coefficients takes the logits [N, K].
        gradient: ``(p_c [N, M]) -> Coefficients`` of dU/dz; None for a user's own callable.
        curvature: ``(p_c, v_c, s) -> Coefficients`` of (d²U/dz²)v; None for a user's own callable.
        curved: False where d²U/dz² is known to vanish.
        output: where the logits are in what the model returns: "auto", a key or attribute, a position, or a callable; see
            :func:`shapleycam.utilities.outputs.logits_of`.

    Raises:
        InputError: a gradient without a curvature or the reverse, or one of the three is no callable of that many arguments.
    """

    name: str
    formula: str
    value: UtilityFunction
    gradient: Callable[[Tensor], Coefficients] | None = None
    curvature: Callable[[Tensor, Tensor, Tensor], Coefficients] | None = None
    curved: bool = True
    output: Output = "auto"
    #: the value for the whole batch and the rows of it that :attr:`value` is for, behind :meth:`rows`
    _whole: tuple[Any, Tensor] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_callable(self.value, f"The value of utility {self.name!r}", "(outputs, targets)")
        if (self.gradient is None) != (self.curvature is None):
            there, missing = ("curvature", "gradient") if self.gradient is None else ("gradient", "curvature")
            raise InputError(
                f"Utility {self.name!r} has a {there} but no {missing}: give both, in the form of shapleycam.UTILITIES, "
                "or neither (then autograd differentiates its value)."
            )
        if self.gradient is not None:
            _check_callable(self.gradient, f"The gradient of utility {self.name!r}", "(p_c)")
            _check_callable(self.curvature, f"The curvature of utility {self.name!r}", "(p_c, v_c, s)")

    @property
    def named(self) -> bool:
        """Whether gradient and curvature in the logits are known: the table's utilities, and a user's own that gives both."""
        return self.gradient is not None

    @property
    def fused(self) -> bool:
        """Whether these are the very functions of the table's row of this name, which the operators' kernels compute."""
        row = UTILITIES.get(self.name)
        return row is self or (
            row is not None
            and all(getattr(self, part) is getattr(row, part) for part in ("value", "gradient", "curvature", "curved"))
        )

    def logits_of(self, outputs: Any) -> Tensor | None:
        """The logits in what a model returned; [N, K] also from a classifier's [N, K, 1, 1], where they are to be named rows.

        Raises:
            InputError: there is no tensor where ``output`` says.
        """
        found = logits_of(outputs, self.output)
        return flat(found) if found is not None and self.named else found

    def sees_logits_only(self, outputs: Any, logits: Tensor | None) -> bool:
        """Whether the logits are all of the outputs that the value is given, so that it is a function of them."""
        return self.named or outputs is logits or (logits is not None and bool(getattr(self.value, "reads_logits", False)))

    def rows(self, rows: Tensor) -> Utility:
        """This utility for other rows: entry i belongs to image ``rows[i]`` (int64 [B]) of the batch.

        A callable that holds something per image (a mask, boxes) says so by a method ``rows(rows) -> callable``; every other
        utility is the same for all rows.
        """
        # What a method rows() returns need not have one itself: rows of rows are asked of the whole batch's.
        whole, chosen = self._whole or (self.value, None)
        select = getattr(whole, "rows", None)
        if select is None:
            return self
        rows = rows if chosen is None else chosen.to(rows.device)[rows]
        return replace(self, value=select(rows), _whole=(whole, rows))


def _check_callable(function: Any, what: str, form: str) -> None:
    """Raise InputError unless ``function`` can be called in this form, as far as its signature says."""
    if not callable(function):
        raise InputError(f"{what} must be a callable {form}, got {type(function).__name__}.")
    if isinstance(function, type):
        raise InputError(f"{what} is the class {function.__name__}: pass an instance, {function.__name__}(...).")
    try:
        signature = inspect.signature(function.forward if isinstance(function, torch.nn.Module) else function)
    except (TypeError, ValueError):
        return  # a builtin without one
    try:
        signature.bind(*form.strip("()").split(", "))
    except TypeError as error:
        raise InputError(f"{what} must take {form}, but it is called as {signature}: {error}.") from error


def _wide(z: Tensor) -> Tensor:
    # A softmax over a thousand half-precision logits loses the digits that the curvature lives in.
    return z if z.dtype in (torch.float32, torch.float64) else z.float()


def _pick(z: Tensor, targets: Tensor | None) -> Tensor:
    assert targets is not None
    return z.gather(1, targets[:, None]).squeeze(1)


def _logit(z: Tensor, targets: Tensor | None) -> Tensor:
    return _pick(_wide(z), targets)


def _probability(z: Tensor, targets: Tensor | None) -> Tensor:
    return _pick(_wide(z).softmax(1), targets)


def _log_probability(z: Tensor, targets: Tensor | None) -> Tensor:
    return _pick(_wide(z).log_softmax(1), targets)


def _rest(z: Tensor, targets: Tensor | None) -> Tensor:
    return _logit(z, targets) + _log_probability(z, targets)


def _named(name: str, formula: str, value: UtilityFunction) -> Utility:
    row = COEFFICIENTS[name]
    return Utility(name, formula, value, row.gradient, row.curvature, row.curved)


_ROWS = (
    _named("logit", "z_c", _logit),
    _named("probability", "p_c", _probability),
    _named("log_probability", "ln p_c", _log_probability),
    _named("rest", "z_c + ln p_c", _rest),
)

#: Every named utility; "rest" (residual softmax target-class utility, the paper's) is the default of the package.
UTILITIES: Mapping[str, Utility] = MappingProxyType({row.name: row for row in _ROWS})


def get_utility(utility: str | UtilityFunction | Utility) -> Utility:
    """The named utility, or the user's own callable ``(outputs, targets [N]) -> [N]`` as a utility.

    Raises:
        InputError: unknown name (the nearest is suggested), neither a name nor a callable, a class instead of an instance, or
            a callable that does not take (outputs, targets).
    """
    if isinstance(utility, Utility):
        return utility
    if isinstance(utility, str):
        row = UTILITIES.get(utility.lower())
        if row is None:
            near = difflib.get_close_matches(utility.lower(), UTILITIES, n=2, cutoff=0.4)
            hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise InputError(f"Unknown utility {utility!r}. {hint}The utilities are: {', '.join(UTILITIES)}.")
        return row
    if isinstance(utility, type):
        raise InputError(
            f"utility is the class {utility.__name__}: pass a name, an instance, or a callable (outputs, targets) -> [N]."
        )
    if callable(utility):
        return Utility(getattr(utility, "__name__", type(utility).__name__), "the user's own", utility)
    raise InputError(f"utility must be one of {', '.join(UTILITIES)} or a callable (outputs, targets) -> [N], got {utility!r}.")


def evaluate(utility: Utility, outputs: Any, logits: Tensor | None, targets: Tensor | None, batch: int) -> Tensor:
    """U per image [N] as a differentiable tensor; a user's callable is checked for what it returns.

    A callable that only looks at the logits says so by an attribute ``reads_logits``, and gets them instead of the outputs.

    Raises:
        InputError: a named utility without logits, or a callable whose result is not a floating tensor [N].
    """
    if utility.named:
        if logits is None or logits.ndim != 2:
            # [N, ...], as this may be about the few images that the explainer looks at first.
            shape = () if logits is None else ("N", *logits.shape[1:])
            what = type(outputs).__name__ if logits is None else f"a tensor [{', '.join(map(str, shape))}]"
            raise InputError(
                f"Utility {utility.name!r} needs logits [N, K], but the model returned {what}. "
                "Pass your own utility=(outputs, targets) -> [N] for such a model."
            )
        return utility.value(logits, targets)
    seen = logits if logits is not None and getattr(utility.value, "reads_logits", False) else outputs
    value = utility.value(seen, targets)
    if not isinstance(value, Tensor) or value.shape != (batch,) or not value.is_floating_point():
        got = f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(
            f"The utility {utility.name!r} must return one floating value per image, [N]; for {batch} images it returned {got}."
        )
    return value
