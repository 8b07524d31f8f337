"""torch.export of an interface, with errors that name the place."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from ..errors import ExportError, ShapleyCamError
from ..program.graph import TRACING, one_size, rule_of, shadow
from .interface import Interface
from .metadata import Port

_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


def trace(
    interface: Interface, inputs: Sequence[Port], examples: Sequence[Tensor], least: Mapping[str, int]
) -> ExportedProgram:
    """The exported program, whose free dimensions are those that the ports name, from the ``least`` of each on (else 1).

    What is traced is a copy of the modules over the same weights, as the tracer swaps these for fakes, and one thread traces at
    a time.

    What the tracer could not prove of all sizes the graph does not assert: :func:`~shapleycam.program.sizes.counterexamples`
    has it.

    Raises:
        ExportError: the model does not trace; the message names the line of the model's code where that can be told.
    """
    dims: dict[str, Any] = {}
    for port in inputs:
        for size in port.shape:
            if isinstance(size, str):
                dims.setdefault(size, Dim(size, min=least.get(size, 1)))
    shapes = tuple({i: dims[size] for i, size in enumerate(port.shape) if isinstance(size, str)} for port in inputs)
    traced = shadow(interface, type(interface.program.model).__name__)
    try:
        with TRACING, torch.no_grad():
            # Not the caller's images: an exported program keeps its examples.
            exported = torch.export.export(
                traced,
                tuple(examples),
                dynamic_shapes=shapes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=bool(least),
            )
            return _without_asserts(exported)
    except ShapleyCamError:
        raise
    except Exception as error:
        if least and (rule := rule_of(error)):
            raise one_size(rule) from error
        raise ExportError(
            f"The model cannot be traced{place(error)}: {said(error)}. Control flow that depends on values, or code that fixes "
            "the number of images, cannot be exported: write it with torch.where, or export another layer or model."
        ) from error


def _without_asserts(exported: ExportedProgram) -> ExportedProgram:
    """The program, changed to assert nothing of its sizes: runtimes have no such operator."""
    graph = exported.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default):
        graph.erase_node(node)
    graph.eliminate_dead_code()
    exported.graph_module.recompile()
    return exported


def place(error: BaseException) -> str:
    """Where in the model's own code an error came from, for a message: " at FILE:LINE, in forward (x = ...)"; or nothing."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith((*_NOT_THE_USERS, "<"))
    ]
    inner = [frame for frame in frames if frame.name == "forward"] or []
    if not inner:
        return ""
    last = frames[max(i for i, frame in enumerate(frames) if frame is inner[-1]) :][-1]
    return f" at {last.filename}:{last.lineno}, in {last.name} ({last.line})"


def said(error: BaseException) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}".rstrip(".")
