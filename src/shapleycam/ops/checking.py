"""Operators that check themselves: the fused kernels against the reference, at run time, on the user's own device."""

from __future__ import annotations

import functools
import os
import random
import threading
import warnings
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
from torch import Tensor

from ..errors import InputError, KernelMismatch, ShapleyCamWarning
from .tolerance import Expected, deviation

if TYPE_CHECKING:
    from .backends import Backend
    from .operator import Operator

VARIABLE = "SHAPLEYCAM_CHECK"
ACTIONS = ("raise", "warn", "fallback")

OnMismatch = Literal["raise", "warn", "fallback"]


class checking:
    """While the context lasts, this thread's calls of fused operators are computed by the reference too, and compared.

    The reference is computed in float64, and an error is held against the sum of the magnitudes of the terms
    (:mod:`shapleycam.ops.tolerance`), so that neither cancellation nor the scale of a model's gradients matters. NaN must meet
    NaN, and Inf the same Inf. A checked call costs memory for float64 copies of its arguments, time, and on a GPU a
    synchronisation. Without a context, the environment variable SHAPLEYCAM_CHECK says what is checked ("1", "0.01", or
    "0.01:fallback" with what to do on a mismatch); it is read once. Of nested contexts the innermost counts.

    The object can be entered again and by several threads; it remembers what it took off the ladder.

    Args:
        check: True or 1 for every call, False or 0 for none, or the fraction of the calls to check, chosen at random by a
            generator of its own.
        on_mismatch: "raise" raises KernelMismatch; "warn" gives a ShapleyCamWarning and returns the kernel's result;
            "fallback" returns the reference's result, takes the backend off the ladder for that operator (an explicit
            ``backend=`` is then passed over too), and says so once.

    Raises:
        InputError: ``check`` is no number from 0 to 1, or ``on_mismatch`` is none of the three.
        KernelMismatch: from an operator's call, see above.
    """

    def __init__(self, check: bool | float = True, on_mismatch: OnMismatch = "raise") -> None:
        if not isinstance(check, (bool, int, float)) or not 0 <= check <= 1:
            raise InputError(f"check must be True, False, or the fraction of calls to check, from 0 to 1; got {check!r}.")
        if on_mismatch not in ACTIONS:
            raise InputError(f"on_mismatch must be 'raise', 'warn' or 'fallback', got {on_mismatch!r}.")
        self.fraction = float(check)
        self.on_mismatch = on_mismatch
        #: (backend, operator) that are off the ladder.
        self.distrusted: set[tuple[str, str]] = set()
        self._draws = random.Random()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        _ACTIVE.set((self, _ACTIVE.get()))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        entered = _ACTIVE.get()
        assert entered is not None
        _ACTIVE.set(entered[1])

    def __getstate__(self) -> dict[str, Any]:
        return {"check": self.fraction, "on_mismatch": self.on_mismatch, "distrusted": set(self.distrusted)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["check"], state["on_mismatch"])  # type: ignore[misc]
        self.distrusted = state["distrusted"]

    def verify(self, operator: Operator, backend: Backend, arguments: tuple[Any, ...], out: Any) -> Any:
        """``out``, the result of ``backend``, or what on_mismatch makes of it."""
        if not backend.fused or (self.fraction < 1 and self._draws.random() >= self.fraction):
            return out
        first: Tensor = arguments[0]
        if first.is_cuda and torch.cuda.is_current_stream_capturing():
            raise InputError(
                f"{operator.name} cannot be checked while a CUDA graph is captured: capture it under ops.checking(False), "
                "and check the same call outside of the graph."
            )
        with torch.no_grad():
            _, said = compare(operator, backend.name, arguments, out)
        if said is None:
            return out
        if self.on_mismatch == "raise":
            raise said
        if self.on_mismatch == "warn":
            warnings.warn(f"{said} Its result is used.", ShapleyCamWarning, stacklevel=2)
            return out
        with self._lock:
            first_time = (backend.name, operator.name) not in self.distrusted
            self.distrusted.add((backend.name, operator.name))
        if first_time:
            warnings.warn(
                f"{said} The reference's result is used, and {backend.name!r} serves {operator.name} no more.",
                ShapleyCamWarning,
                stacklevel=2,
            )
        return operator.reference(*arguments)


#: The contexts entered, innermost first, as (context, the outer ones).
_Entered = tuple[checking, Any]
_ACTIVE: ContextVar[_Entered | None] = ContextVar("shapleycam_checking", default=None)


def active() -> checking | None:
    """What checks calls here and now, or None."""
    entered = _ACTIVE.get()
    found = _of_environment() if entered is None else entered[0]
    return found if found is not None and found.fraction else None


@functools.cache
def _of_environment() -> checking | None:
    said = os.environ.get(VARIABLE, "")
    number, _, action = said.partition(":")
    if not said:
        return None
    try:
        return checking(float(number), cast(OnMismatch, action or "raise"))
    except ValueError as error:  # InputError is one
        raise InputError(
            f"{VARIABLE}={said!r} must be a fraction from 0 to 1, such as '1' or '0.01', or one with what to do on a mismatch, "
            f"such as '0.01:fallback' ({', '.join(ACTIONS)})."
        ) from error


def compare(operator: Operator, backend: str, arguments: tuple[Any, ...], out: Any) -> tuple[float, KernelMismatch | None]:
    """The largest error of ``out`` as a part of what is allowed, and what to say where it is larger than 1."""
    parts: tuple[Tensor, ...] = out if isinstance(out, tuple) else (out,)
    plain: tuple[Tensor, ...] | None = None
    largest = 0.0
    for index, (part, expected) in enumerate(zip(parts, operator.expect(arguments, parts), strict=True)):
        if not part.numel():
            continue
        excess = deviation(part, expected)
        worst = float(excess.max())
        if worst > 1 and part.is_floating_point():
            # Float32 may overflow where float64 does not: the reference in the arguments' own dtypes may do the same.
            if plain is None:
                alike = operator.reference(*arguments)
                plain = alike if isinstance(alike, tuple) else (alike,)
            twin, got = plain[index].double(), part.double()
            overflown = ~twin.isfinite() & ((got == twin) | (got.isnan() & twin.isnan()))
            excess = torch.where(overflown, 0.0, excess)
            worst = float(excess.max())
        largest = max(largest, worst)
        if worst > 1:
            return largest, _report(operator, backend, arguments, part, expected, excess)
    return largest, None


def _report(
    operator: Operator,
    backend: str,
    arguments: tuple[Any, ...],
    part: Tensor,
    expected: Expected,
    excess: Tensor,
) -> KernelMismatch:
    worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), part.shape))
    got, value = part[worst].item(), expected.value[worst].item()
    allowed = expected.allowed.expand(part.shape)[worst].item()
    count = f"{int((excess > 1).sum())} of {part.numel()} elements"
    error = KernelMismatch(
        f"The backend {backend!r} computed {operator.name} wrong: {count} of the result {tuple(part.shape)}. "
        f"The worst is {list(worst)}: {got!r} where the reference in float64 has {value!r}, and "
        f"{allowed:.2g} is allowed. Arguments: {'; '.join(map(_describe, arguments))}. Please report this text with the output "
        f"of `shapleycam info` and `shapleycam verify` as an issue of the project; until then use backend='torch', or "
        f"on_mismatch='fallback'."
    )
    error.operator, error.backend, error.index, error.got, error.expected = operator.name, backend, worst, got, value
    return error


def _describe(argument: Any) -> str:
    if isinstance(argument, Tensor):
        kind = str(argument.dtype).removeprefix("torch.")
        return f"{kind} {list(argument.shape)} strides {list(argument.stride())} on {argument.device}"
    return repr(argument)
