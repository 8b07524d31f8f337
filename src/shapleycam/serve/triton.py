"""A model repository for Triton Inference Server, around an exported ONNX file."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..errors import InputError
from ..optional import need
from .config import check_name

_TYPES = {
    "tensor(float)": "TYPE_FP32",
    "tensor(float16)": "TYPE_FP16",
    "tensor(double)": "TYPE_FP64",
    "tensor(int64)": "TYPE_INT64",
    "tensor(int32)": "TYPE_INT32",
    "tensor(uint8)": "TYPE_UINT8",
}


def write_repository(file: str | Path, folder: str | Path, name: str, *, max_batch: int = 8, devices: int = 0) -> Path:
    """Write ``folder/name/config.pbtxt`` and ``folder/name/1/model.onnx``.

    Triton batches what it is sent: the first dimension of every input and output must be free, and is left out of the
    configuration.

    Args:
        file: the ONNX file.
        folder: the repository; made if it is missing.
        name: of the model.
        max_batch: most images of a batch.
        devices: GPUs with an instance each; 0 for one instance on the CPU.

    Returns:
        the path of config.pbtxt.

    Raises:
        InputError: no onnxruntime, a file that cannot be read, with a fixed batch, or a type that Triton lacks; or the
            model's folder is there already.
    """
    ort = need("onnxruntime", "export")
    try:
        session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has an error of its own per way to fail
        raise InputError(f"{file} cannot be run by ONNX Runtime: {str(error).splitlines()[0]}") from error
    if max_batch < 1 or devices < 0:
        raise InputError(f"max_batch is positive, and devices is not negative: {max_batch}, {devices}.")
    parts = [f'name: "{check_name(name)}"', 'platform: "onnxruntime_onnx"', f"max_batch_size: {max_batch}"]
    for what, ports in (("input", session.get_inputs()), ("output", session.get_outputs())):
        for port in ports:
            if port.type not in _TYPES or not port.shape or isinstance(port.shape[0], int):
                raise InputError(f"{file}: {port.name!r} is {port.type} {port.shape}; its first dimension must be free.")
            dims = ", ".join(str(n) if isinstance(n, int) else "-1" for n in port.shape[1:]) or "1"
            # A tensor of the batch alone, such as target [N], is [N, 1] to Triton, which reshapes it.
            reshape = "" if len(port.shape) > 1 else "  reshape { shape: [ ] }\n"
            parts.append(f'{what} {{\n  name: "{port.name}"\n  data_type: {_TYPES[port.type]}\n  dims: [ {dims} ]\n{reshape}}}')
    parts.append("dynamic_batching { }")
    kind = f"KIND_GPU\n    gpus: [ {', '.join(map(str, range(devices)))} ]" if devices else "KIND_CPU"
    parts.append(f"instance_group {{\n    count: 1\n    kind: {kind}\n}}")
    place = Path(folder) / name
    if place.exists():
        raise InputError(f"{place} is there already: choose another name, or remove it.")
    (place / "1").mkdir(parents=True)
    shutil.copyfile(file, place / "1" / "model.onnx")
    config = place / "config.pbtxt"
    config.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return config
