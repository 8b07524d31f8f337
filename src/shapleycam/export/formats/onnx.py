"""ONNX files, for ONNX Runtime, OpenVINO and other runtimes that need no PyTorch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.export import ExportedProgram

from ...errors import ExportError, InputError
from ...optional import need
from ..files import sha256_of
from ..metadata import Metadata
from ..tracing import said
from .base import Format, Run
from .onnx_graph import tidy

#: Read by ONNX Runtime 1.14 (2023) and later. Every operator of a program is in it.
OPSET = 18
_LONGEST = 2**24  # bytes of metadata
_LARGEST = 2**31 - _LONGEST - 2**10  # protobuf's 2 GiB, less the metadata


class Onnx(Format):
    """One file with its weights inside. Its metadata are two entries of the model's own, ``shapleycam`` (JSON) and
    ``shapleycam.sha256``, of all bytes before that entry, which is the last."""

    name, suffix, runtimes = "onnx", ".onnx", ("onnxruntime", "openvino")
    METADATA, SEAL = "shapleycam", "shapleycam.sha256"

    def packages(self) -> tuple[str, ...]:
        return ("onnx", "onnxscript")

    def write(self, exported: ExportedProgram, path: Path, metadata: Metadata, opset: int | None) -> None:
        onnx = need("onnx", "export")
        need("onnxscript", "export")
        try:
            with _quiet():
                program = torch.onnx.export(
                    _without_backward(exported),
                    dynamo=True,
                    verbose=False,
                    opset_version=OPSET if opset is None else opset,
                    input_names=[port.name for port in metadata.inputs],
                    output_names=[port.name for port in metadata.outputs],
                    custom_translation_table={torch.ops.aten.silu_backward.default: _silu_backward},
                )
                assert program is not None
                model = program.model_proto
        except Exception as error:
            raise ExportError(
                f"The model has no ONNX form at opset {opset or OPSET}: {said(_root(error))}. Formats 'pt2' and 'aoti' have "
                "all operators of PyTorch; or explain a layer behind the one that is missing."
            ) from error
        wanted, got = opset or OPSET, next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
        if got != wanted:
            raise ExportError(f"The model has no ONNX form at opset {wanted}: the exporter gave opset {got}.")
        tidy(model, metadata)
        size = model.ByteSize()
        if not 0 < size < _LARGEST:
            raise ExportError("The model is larger than the 2 GiB that an ONNX file may have: export it as 'pt2' or 'aoti'.")
        for key, value in _model_info(metadata).items():
            model.metadata_props.add(key=key, value=value)
        path.write_bytes(model.SerializeToString())
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except Exception as error:
            raise ExportError(f"onnx.checker refuses the file: {said(error)}.") from error

    def seal(self, path: Path, metadata: Metadata) -> None:
        # Protobuf messages one behind the other are one message: the entries need not be parsed into the model.
        with path.open("ab") as file:
            file.write(_entry(self.METADATA, metadata.dumps()))
        digest = sha256_of(path)
        with path.open("ab") as file:
            file.write(_entry(self.SEAL, digest))

    @classmethod
    def metadata(cls, path: Path) -> str:
        """The metadata of a file whose seal is whole, as JSON.

        Raises:
            InputError: it has no seal, or was changed.
        """
        empty = _entry(cls.SEAL, "0" * 64)
        length, size = len(empty), path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - length))
            seal = file.read()
            if seal[:-64] != empty[:-64]:
                raise InputError(
                    f"{path} was not made by shapleycam, or is cut short: it does not end with the checksum of its content."
                )
        if sha256_of(path, size - length) != seal[-64:].decode(errors="replace"):
            raise InputError(f"{path} is damaged: its content has another checksum than when it was made.")
        key = _field(1, cls.METADATA.encode()) + b"\x12"  # then the length, in groups of seven bits, and the document
        with path.open("rb") as file:
            file.seek(max(0, size - length - _LONGEST))
            tail = file.read()[:-length]
        _, found, rest = tail.rpartition(key)
        if not found:
            raise InputError(f"{path} was not made by shapleycam: it has no metadata.")
        start = next(i for i, byte in enumerate(rest) if byte < 128) + 1
        return rest[start:].decode(errors="replace")

    def open(self, path: Path, metadata: Metadata, runtime: str) -> Run:
        package = need(runtime, "openvino" if runtime == "openvino" else "export")
        start = _openvino if runtime == "openvino" else _onnx_runtime
        try:
            return start(package, path, [port.name for port in metadata.outputs])
        except Exception as error:
            raise InputError(f"{runtime} {package.__version__} does not load {path}: {said(error)}.") from error


def _onnx_runtime(package: Any, path: Path, names: list[str]) -> Run:
    session = package.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        arrays = {name: value.numpy() for name, value in inputs.items()}
        return tuple(torch.from_numpy(array) for array in session.run(names, arrays))

    return run


def _openvino(package: Any, path: Path, names: list[str]) -> Run:
    # Without the hint it computes in bfloat16 where the processor has it.
    compiled = package.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        found = compiled({name: value.numpy() for name, value in inputs.items()})
        return tuple(torch.from_numpy(found[name].copy()) for name in names)

    return run


def _entry(key: str, value: str) -> bytes:
    """The bytes of a ModelProto with nothing but one entry of metadata_props (field 14; key is field 1, value field 2)."""

    return _field(14, _field(1, key.encode()) + _field(2, value.encode()))


def _field(number: int, content: bytes) -> bytes:
    length, size = b"", len(content)
    while size > 127:
        length, size = length + bytes([size % 128 + 128]), size // 128
    return bytes([number * 8 + 2]) + length + bytes([size]) + content


def _model_info(metadata: Metadata) -> dict[str, str]:
    """What OpenVINO's Model API reads."""
    info = {"model_type": "Classification", "output_raw_scores": "True"}
    if metadata.preprocess is not None and metadata.inputs[0].dtype != "uint8":  # it is told what it is to do itself
        for key, name in (("mean_values", "mean"), ("scale_values", "std")):
            info[key] = " ".join(f"{255 * value:.9g}" for value in metadata.preprocess[name])
    if metadata.classes:
        info["labels"] = " ".join(name.replace(" ", "_") for name in metadata.classes)
    return {f"model_info {key}": value for key, value in info.items()}


def _silu_backward(gradient: Any, x: Any) -> Any:
    """The one derivative that :func:`_without_backward` cannot take: torch.export keeps what it calls composite."""
    op = need("onnxscript", "export").opset18
    gate, one = op.Sigmoid(x), op.CastLike(op.Constant(value_float=1.0), x)
    return op.Mul(op.Mul(gradient, gate), op.Add(one, op.Mul(x, op.Sub(one, gate))))


def _without_backward(exported: ExportedProgram) -> ExportedProgram:
    """The program with the derivatives that are operators of their own, which ONNX has not, written out."""
    graphs = [each.graph for each in exported.graph_module.modules() if isinstance(each, torch.fx.GraphModule)]
    targets = {node.target for graph in graphs for node in graph.nodes if node.op == "call_function"}
    names = [each for each in targets if isinstance(each, torch._ops.OpOverload) and "_backward" in each.name()]
    table = get_decompositions(names)
    return exported.run_decompositions(table) if table else exported


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own warnings and prints of its progress; what is wrong with the file, its check finds."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
