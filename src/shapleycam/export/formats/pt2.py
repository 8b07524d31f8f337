"""ExportedPrograms, for PyTorch."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ...errors import ExportError, InputError
from ...program.graph import TRACING
from ..metadata import Metadata
from ..tracing import said
from .base import Format, Run


class Pt2(Format):
    """What ``torch.export.save`` writes, with the metadata as an extra file of the archive. Loading it needs PyTorch."""

    name, suffix, runtimes = "pt2", ".pt2", ("torch",)
    MEMBER = "extra/shapleycam.json"  # where torch.export.load(extra_files=) looks, below the archive's own folder

    def write(self, exported: ExportedProgram, path: Path, metadata: Metadata, opset: int | None) -> None:
        if opset is not None:
            raise InputError(f"opset is for ONNX files; format {self.name!r} has none.")
        try:
            torch.export.save(exported, path)
        except Exception as error:
            raise ExportError(f"torch.export.save refuses the program: {said(error)}.") from error

    def seal(self, path: Path, metadata: Metadata) -> None:
        with zipfile.ZipFile(path, "a") as archive:
            folder = archive.namelist()[0].partition("/")[0]
            archive.writestr(f"{folder}/{self.MEMBER}", metadata.dumps())

    def open(self, path: Path, metadata: Metadata, runtime: str) -> Run:
        try:
            with TRACING:
                module = torch.export.load(path).module()
        except Exception as error:
            raise InputError(f"PyTorch {torch.__version__} does not load {path}: {said(error)}.") from error

        def run(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return tuple(module(*(inputs[port.name] for port in metadata.inputs)))

        return run
