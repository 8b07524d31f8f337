"""ONNX Runtime and OpenVINO behind one small interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ..errors import InputError
from ..optional import need

ENGINES = ("onnxruntime", "openvino")


class Port(NamedTuple):
    """An input or output: a free dimension of its shape is None."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


class Session(Protocol):
    """A file that is ready to run."""

    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    metadata: Mapping[str, str]
    device: str

    def run(self, names: Sequence[str], feed: Mapping[str, Any]) -> list[Any]:
        """The outputs of these names, as arrays."""


class OnnxRuntimeSession:
    """By ONNX Runtime; ``providers`` None for those that this installation of it has."""

    def __init__(self, file: str, providers: Sequence[str] | None, threads: int) -> None:
        ort = need("onnxruntime", "export")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self._session = ort.InferenceSession(file, options, providers=providers or ort.get_available_providers())
        except Exception as error:  # ONNX Runtime has an error of its own per way to fail
            raise InputError(f"{file} cannot be run by ONNX Runtime: {str(error).splitlines()[0]}") from error
        self.inputs: Mapping[str, Port]
        self.outputs: Mapping[str, Port]
        self.inputs, self.outputs = (
            {one.name: Port(one.name, _ORT.get(one.type, one.type), _shape(one.shape)) for one in ports}
            for ports in (self._session.get_inputs(), self._session.get_outputs())
        )
        self.metadata: Mapping[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self.device = str(self._session.get_providers()[0])

    def run(self, names: Sequence[str], feed: Mapping[str, Any]) -> list[Any]:
        """See :class:`Session`."""
        return list(self._session.run(list(names), dict(feed)))


class OpenVinoSession:
    """By OpenVINO on the CPU, in float32: by default it computes in bfloat16 where the processor has it."""

    def __init__(self, file: str, threads: int) -> None:
        openvino, onnx = need("openvino", "openvino"), need("onnx", "export")
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            self._model = openvino.Core().compile_model(file, "CPU", options)
            read = onnx.load(file, load_external_data=False)
        except Exception as error:  # OpenVINO's are RuntimeErrors of many lines
            raise InputError(f"{file} cannot be run by OpenVINO: {str(error).splitlines()[0]}") from error
        # A port has the names of all tensors that are one to OpenVINO, as behind an Identity; of them we mean the file's own.
        own = {value.name for value in (*read.graph.input, *read.graph.output)}
        self.inputs: Mapping[str, Port]
        self.outputs: Mapping[str, Port]
        self.inputs, self.outputs = (
            {
                (name := min(port.names & own, default=port.any_name)): Port(
                    name,
                    _OV.get(port.element_type.get_type_name(), port.element_type.get_type_name()),
                    tuple(n.get_length() if n.is_static else None for n in port.partial_shape),
                )
                for port in ports
            }
            for ports in (self._model.inputs, self._model.outputs)
        )
        self.metadata: Mapping[str, str] = {one.key: one.value for one in read.metadata_props}
        self.device = "CPU, OpenVINO"

    def run(self, names: Sequence[str], feed: Mapping[str, Any]) -> list[Any]:
        """See :class:`Session`. The arrays are copies: OpenVINO writes the next answer where this one is."""
        found = self._model(dict(feed))
        return [found[name].copy() for name in names]


def open_session(file: str, engine: str, providers: Sequence[str] | None, threads: int) -> Session:
    """A session of one of :data:`ENGINES`.

    Raises:
        InputError: another engine, one that is not installed, or a file that it cannot run.
    """
    if engine == "onnxruntime":
        return OnnxRuntimeSession(file, providers, threads)
    if engine == "openvino":
        return OpenVinoSession(file, threads)
    raise InputError(f"An ONNX file is run by one of {', '.join(ENGINES)}, got {engine!r}.")


_ORT = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(uint8)": "uint8"}
_OV = {"f32": "float32", "i64": "int64", "u8": "uint8"}


def _shape(shape: Sequence[Any]) -> tuple[int | None, ...]:
    return tuple(n if isinstance(n, int) else None for n in shape)
