"""V2's tensors: in JSON, or behind it, in little-endian rows whose sizes the JSON tells."""

from __future__ import annotations

import base64
import json
import struct
from math import prod
from typing import Any

import torch
from fastapi import Response
from torch import Tensor

from ..refusals import Refusal, check_instances, read_json

_TYPES = {
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "FP32": torch.float32,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


def read(body: bytes, json_size: str | None, most: int) -> tuple[dict[str, Any], dict[str, list[bytes] | Tensor]]:
    """The JSON of a request, and its inputs by name: tensors, or the elements of one of BYTES.

    Args:
        body: all of it.
        json_size: the header ``Inference-Header-Content-Length``; None where there is nothing but JSON.
        most: images of one request, the first dimension of every input.

    Raises:
        Refusal: 400, the body is not what it says; 413, too many images, or too much JSON.
    """
    size = len(body)
    if json_size is not None:
        if not json_size.isdecimal() or len(json_size) > 18 or not 0 < int(json_size) <= len(body):
            raise Refusal(
                400, "inputs", f"Inference-Header-Content-Length is {json_size[:20]!r}, and the body has {len(body)} bytes."
            )
        size = int(json_size)
    head = read_json(body[:size])
    inputs = head.get("inputs") if isinstance(head, dict) else None
    if not isinstance(inputs, list) or not inputs or not all(isinstance(one, dict) for one in inputs):
        raise Refusal(400, "inputs", '"inputs" must be a list of at least one tensor.')
    parameters, outputs = head.get("parameters", {}), head.get("outputs", [])
    if not isinstance(parameters, dict) or not (outputs is None or isinstance(outputs, list)):
        raise Refusal(400, "inputs", '"parameters" must be an object, and "outputs" a list.')
    rest, at, found = memoryview(body)[size:], 0, {}
    for one in inputs:
        name, kind, shape = one.get("name"), one.get("datatype"), one.get("shape")
        if not isinstance(name, str) or not isinstance(kind, str) or not _is_shape(shape):
            raise Refusal(400, "inputs", "An input needs a name, a datatype, and a shape of 1 to 8 positive whole numbers.")
        check_instances(prod(shape) if kind == "BYTES" else shape[0], most)
        told = one.get("parameters") or {}
        count = told.get("binary_data_size") if isinstance(told, dict) else None
        if count is not None:
            if type(count) is not int or count < 0 or at + count > len(rest):
                raise Refusal(400, "inputs", f"Input {name!r} says that it has {count!r} bytes; {len(rest) - at} are left.")
            data: Any = rest[at : at + count]
            at += count
        else:
            data = one.get("data")
        found[name] = _tensor(name, kind, shape, data)
    if at != len(rest):
        raise Refusal(400, "inputs", f"{len(rest) - at} bytes follow the inputs.")
    return head, found


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and 1 <= len(shape) <= 8 and all(type(n) is int and 0 < n < 2**31 for n in shape)


def _tensor(name: str, kind: str, shape: list[int], data: Any) -> list[bytes] | Tensor:
    count = prod(shape)
    wrong = Refusal(400, "inputs", f"Input {name!r} does not hold {kind} {shape}.")
    if kind == "BYTES":
        elements = _elements(name, data, count) if isinstance(data, memoryview) else _flat(data)
        if len(elements) != count:
            raise wrong
        return [one if isinstance(one, bytes) else _element(name, one) for one in elements]
    if kind not in _TYPES:
        raise Refusal(400, "inputs", f"Input {name!r} has the datatype {kind!r}: expected BYTES, {', '.join(_TYPES)}.")
    dtype = _TYPES[kind]
    if isinstance(data, memoryview):
        if len(data) != count * dtype.itemsize:
            raise wrong
        return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
    values = _flat(data)
    if len(values) != count or any(
        type(v) is not int and (type(v) is not float or not dtype.is_floating_point) for v in values
    ):
        raise wrong
    try:
        return torch.tensor(values, dtype=dtype).reshape(shape)
    except (RuntimeError, OverflowError, ValueError) as error:
        raise wrong from error


def _flat(data: Any) -> list[Any]:
    """The elements of nested lists, without recursion."""
    if not isinstance(data, list):
        raise Refusal(400, "inputs", "An input's data must be a list.")
    found: list[Any] = []
    left = [iter(data)]
    while left:
        for one in left[-1]:
            if isinstance(one, list):
                left.append(iter(one))
                break
            found.append(one)
        else:
            left.pop()
    return found


def _elements(name: str, data: memoryview, most: int) -> list[bytes]:
    """Rows of four bytes, the length, and so many; of more than ``most`` the first ones, and one."""
    found: list[bytes] = []
    at = 0
    while at < len(data) and len(found) <= most:
        if at + 4 > len(data):
            raise Refusal(400, "inputs", f"Input {name!r} ends within the length of an element.")
        (size,) = struct.unpack_from("<I", data, at)
        at += 4
        if at + size > len(data):
            raise Refusal(400, "inputs", f"Input {name!r} ends within an element.")
        found.append(bytes(data[at : at + size]))
        at += size
    return found


def _element(name: str, text: Any) -> bytes:
    """BYTES in JSON are strings, which cannot hold a picture: base64 is."""
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, TypeError) as error:
        raise Refusal(400, "inputs", f"Elements of {name!r} in JSON must be base64 strings.") from error


def write(model: str, request: str, outputs: dict[str, Tensor], binary: dict[str, bool]) -> Response:
    """The answer: JSON, and behind it the outputs that are wanted as binary.

    Raises:
        Refusal: 400, FP16 in JSON, which the protocol does not have.
    """
    described, parts = [], []
    for name, tensor in outputs.items():
        one: dict[str, Any] = {"name": name, "datatype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
        if binary[name]:
            data = tensor.contiguous().numpy().tobytes()
            one["parameters"] = {"binary_data_size": len(data)}
            parts.append(data)
        elif tensor.dtype == torch.float16:
            raise Refusal(400, "outputs", f"FP16 is binary only: ask for {name!r} with binary_data.")
        else:
            one["data"] = tensor.flatten().tolist()
        described.append(one)
    head = {"model_name": model, "model_version": "1", "outputs": described, **({"id": request} if request else {})}
    text = json.dumps(head, allow_nan=False).encode()
    if not parts:
        return Response(text, media_type="application/json")
    return Response(
        b"".join([text, *parts]),
        headers={"inference-header-content-length": str(len(text))},
        media_type="application/octet-stream",
    )
