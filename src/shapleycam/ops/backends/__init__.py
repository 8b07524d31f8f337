"""The ladder of backends: cuda, triton, native, torch; the first that can serve a call does.

An explicit choice (``backend=`` or the environment variable SHAPLEYCAM_BACKEND) never falls back: it serves or raises.
What a backend needs is imported when it is first asked for, and asking what is available does not initialise CUDA.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch as pytorch  # .torch is a rung

from ...errors import BackendError
from .base import Backend, BackendStatus, Call
from .cuda import Cuda
from .native import Native
from .torch import Torch
from .triton import Triton

__all__ = ["LADDER", "Backend", "BackendStatus", "Call", "Ladder", "backends"]

VARIABLE = "SHAPLEYCAM_BACKEND"


class Ladder:
    """Backends in the order in which ``backend="auto"`` tries them; the last one serves everything."""

    def __init__(self, *rungs: Backend) -> None:
        self._rungs = rungs
        # By call and choice: a choice is made once, and costs a look-up from then on.
        self._chosen: dict[tuple[str, str, pytorch.dtype, str | None, str], Backend] = {}

    def __iter__(self) -> Iterator[Backend]:
        return iter(self._rungs)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the rungs, in order."""
        return tuple(rung.name for rung in self._rungs)

    @contextmanager
    def holding(self, backend: Backend) -> Iterator[Backend]:
        """The ladder with ``backend`` on top while the context lasts; it hides a rung of its name. For tests."""
        before = self._rungs
        self._rungs = (backend, *(rung for rung in before if rung.name != backend.name))
        self._chosen = {}
        try:
            yield backend
        finally:
            self._rungs = before
            self._chosen = {}

    def choose(
        self,
        operator: str,
        device: str,
        dtype: pytorch.dtype,
        pooling: str | None = None,
        backend: str = "auto",
        distrusted: Collection[tuple[str, str]] = (),
    ) -> Backend:
        """The backend that serves ``operator``.

        Args:
            operator, pooling, backend: as for :func:`shapleycam.ops.select`.
            device, dtype: the first argument's device type, such as "cuda", and dtype.
            distrusted: (backend, operator) that gave wrong results and are passed over, an explicit choice too.

        Raises:
            BackendError: an explicit choice is unknown or cannot serve the call; the message says why.
        """
        wanted = os.environ.get(VARIABLE) or "auto" if backend == "auto" else backend
        key = (operator, device, dtype, pooling, wanted)
        found = self._chosen.get(key)
        if found is None:
            found = self._search(Call(*key[:4]), wanted, f"{VARIABLE}=" if backend == "auto" else "backend=")
            self._chosen[key] = found
        if distrusted and (found.name, operator) in distrusted:
            return self._search(Call(*key[:4]), "auto", "", distrusted)
        return found

    def _search(self, call: Call, wanted: str, source: str, distrusted: Collection[tuple[str, str]] = ()) -> Backend:
        if wanted != "auto":
            named = next((rung for rung in self._rungs if rung.name == wanted), None)
            if named is None:
                raise BackendError(f"{source}{wanted!r} is no backend: expected 'auto', {', '.join(map(repr, self.names))}.")
            refusal = named.can(call)
            if refusal:
                raise BackendError(
                    f"{source}{wanted!r} cannot serve {call.operator}{f' ({call.pooling})' if call.pooling else ''} on "
                    f"{call.device}: {refusal}. Use backend='auto', or see `shapleycam info`."
                )
            return named
        for rung in self._rungs:
            if (rung.name, call.operator) not in distrusted and rung.can(call) is None and rung.volunteers(call):
                return rung
        return self._rungs[-1]


LADDER = Ladder(Cuda(), Triton(), Native(), Torch())


def backends() -> dict[str, BackendStatus]:
    """Every backend in the order of the ladder: whether it is available here, and why not."""
    return {rung.name: rung.status() for rung in LADDER}
