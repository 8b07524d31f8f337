"""One operator: the choice of a backend, the check of its result, and what compilers and exporters see of it.

Registered with torch.library as one opaque operator and not a ``triton_op``: there is nothing around these kernels left to
fuse, and the interpreter, opcheck and export all work with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from .backends import LADDER
from .checking import active
from .tolerance import Expected

#: Arguments of these very types, and not of a subclass such as a fake tensor, can be served without the dispatcher.
_PLAIN = frozenset({Tensor, torch.nn.Parameter, NoneType, str, int, float, bool, list, torch.dtype})


class Operator:
    """An operator of the package.

    Args:
        name: in the namespace "shapleycam" of torch.library, of the backends' methods, and for messages.
        schema: of the arguments, the last of which is ``str backend``, and of the result.
        reference: the operator in plain PyTorch, for all arguments but the last.
        empty: the result, not filled, for the same: what fused backends fill, and what fake tensors need.
        expect: ``(arguments, results) -> what each result should be``, computed by the reference in float64.
        pooling: which argument is a pooling, that a backend may lack.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        reference: Callable[..., Any],
        empty: Callable[..., Any],
        expect: Callable[[tuple[Any, ...], tuple[Tensor, ...]], Sequence[Expected]],
        pooling: int | None = None,
    ) -> None:
        self.name = name
        self.reference = reference
        self.empty = empty
        self.expect = expect
        self._pooling = pooling
        # The dispatcher passes what the schema says, the backend last.
        custom = torch.library.custom_op(
            f"shapleycam::{name}", lambda *a: self.serve(a[-1], *a[:-1]), mutates_args=(), schema=schema
        )
        custom.register_fake(lambda *a: empty(*a[:-1]))
        self._registered: Callable[..., Any] = getattr(torch.ops.shapleycam, name).default

    def __call__(self, backend: str, *arguments: Any) -> Any:
        """Serve checked arguments; where something traces or transforms, through the dispatcher, which costs."""
        if traced() or has_torch_function(arguments) or not _PLAIN.issuperset(map(type, arguments)):
            return self._registered(*arguments, backend)
        return self.serve(backend, *arguments)

    def serve(self, backend: str, *arguments: Any) -> Any:
        """The result for checked arguments by the backend that the ladder chooses, checked where that is wanted."""
        check = active()
        first: Tensor = arguments[0]
        pooling = None if self._pooling is None else arguments[self._pooling]
        chosen = LADDER.choose(
            self.name, first.device.type, first.dtype, pooling, backend, () if check is None else check.distrusted
        )
        out = chosen.run(self, arguments)
        return out if check is None else check.verify(self, chosen, arguments, out)


def traced() -> bool:
    """Whether this thread traces: ``is_compiling`` is true in all threads of the process while one of them exports."""
    if not torch.compiler.is_compiling():  # Dynamo takes it for true
        return False
    return torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() > 0


def select(operator: str, *tensors: Tensor | None, pooling: str | None = None, backend: str = "auto") -> str:
    """The name of the backend that serves ``operator`` for these tensors, here and now.

    The choice is remembered: passing the name on as ``backend=`` costs a look-up.

    Args:
        operator: such as "weighted_reduce".
        tensors: the arguments; the first decides, by its device type and dtype.
        pooling: the row of ``weighted_reduce``.
        backend: "auto" (the environment variable SHAPLEYCAM_BACKEND, else the ladder), or a name.

    Raises:
        BackendError: an explicit choice is unknown or cannot serve the call; the message says why.
    """
    first = tensors[0]
    assert first is not None
    check = active()
    return LADDER.choose(
        operator, first.device.type, first.dtype, pooling, backend, () if check is None else check.distrusted
    ).name
