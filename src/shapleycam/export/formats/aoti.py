"""Libraries compiled by AOTInductor, for PyTorch's C++ runtime and for Python."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ...errors import ExportError, InputError
from ..metadata import Metadata
from ..tracing import said
from .base import Run
from .pt2 import Pt2


class Aoti(Pt2):
    """What ``torch._inductor.aoti_compile_and_package`` makes: machine code for this kind of machine, and the weights.

    Making it needs a C++ compiler. Loading it runs its code.
    """

    name = "aoti"

    def write(self, exported: ExportedProgram, path: Path, metadata: Metadata, opset: int | None) -> None:
        if opset is not None:
            raise InputError("opset is for ONNX files; format 'aoti' has none.")
        try:
            torch._inductor.aoti_compile_and_package(exported, package_path=str(path))
        except Exception as error:
            raise ExportError(f"AOTInductor cannot compile the program (is there a C++ compiler?): {said(error)}.") from error

    def open(self, path: Path, metadata: Metadata, runtime: str) -> Run:
        try:
            compiled = torch._inductor.aoti_load_package(str(path))
        except Exception as error:
            raise InputError(f"PyTorch {torch.__version__} does not load {path}: {said(error)}.") from error

        def run(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return tuple(compiled(*(inputs[port.name] for port in metadata.inputs)))

        return run
