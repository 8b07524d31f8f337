"""What a server is told: a TOML file, or the options of the command line. Models are named here, and nowhere else.

host = "127.0.0.1"
token_file = "token"          # relative to this file

[limits]
body = 10_000_000

[models.pets]
model = "resnet50"
weights = "pets.pth"
classes = "pets.txt"
max_batch = 8
"""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InputError
from .pictures import FORMATS

C = TypeVar("C")


def _check_numbers(told: Any, *zero: str) -> None:
    """Numbers are finite and positive; 0 goes for those that are named."""
    for one in dataclasses.fields(told):
        value, least = getattr(told, one.name), "0 or more" if one.name in zero else "positive"
        if type(value) in (int, float) and not (math.isfinite(value) and (value > 0 or (value == 0 and one.name in zero))):
            raise InputError(f"{one.name} must be {least}, and finite, got {value}.")


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients may cost. Sizes are bytes, times seconds; all are positive.

    Attributes:
        body: of one request.
        answer: of one answer, as estimated before it is computed.
        bodies: of all requests that are being read or answered, and of their answers.
        header_time, body_time: for a request's headers, and its whole body, to arrive.
        answer_time: for a client to take its answer.
        request_time: from admission to the answer; clients may ask for less.
        pixels: of a picture, width times height.
        formats: of pictures, some of PNG, JPEG and WEBP.
        instances: images of one request of the protocols that take several.
        classes: explained classes of one image.
        side: longest side of a map that is asked for, in pixels.
        connections: open at once; of more, those that have waited a second for their clients are closed, the longest first, and
            of more than twice as many younger ones too.

    Raises:
        InputError: a number that is no such thing.
    """

    body: int = 10_000_000
    answer: int = 50_000_000
    bodies: int = 256_000_000
    header_time: float = 10.0
    body_time: float = 20.0
    answer_time: float = 60.0
    request_time: float = 10.0
    pixels: int = 50_000_000
    formats: tuple[str, ...] = FORMATS
    instances: int = 16
    classes: int = 10
    side: int = 2048
    connections: int = 512

    def __post_init__(self) -> None:
        _check_numbers(self)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One served model.

    Attributes:
        model, weights, classes: as for ``shapleycam explain``.
            The demo's network where no model is named.
        runtime: "explainer"; "program", "compiled" or "captured" for the explainer's program, which has the first method,
            utility and engine alone; or "onnx" (ONNX Runtime) or "openvino" for ``file``. A file that does not say how its
            pictures are prepared needs ``model``, which then gives nothing but preprocessing and class names.
        file: the ONNX file, as ``shapleycam export`` writes it.
        layer, baseline, backend, nodes: of the explainer.
        device: "auto", "cpu", "cuda", …
        methods, utilities, engines: what clients may ask for, the default first; None for all that cost about a prediction.
        check: the fraction of the calls of fused operators that are compared with the reference; a wrong one is replaced by it,
            logged and counted.
        max_batch: most images of a batch; None measures at the start.
        queue: most requests admitted and not answered.
        wait: seconds that a batch waits for more.
        decoders: threads that decode pictures; each may hold 30 bytes per pixel of ``limits.pixels``.

    Raises:
        InputError: a number that makes no sense.
    """

    model: str | None = None
    weights: str | None = None
    classes: str | None = None
    runtime: str = "explainer"
    file: str | None = None
    layer: str = "auto"
    baseline: str = "zero"
    backend: str = "auto"
    nodes: int | None = None
    device: str = "auto"
    methods: tuple[str, ...] | None = None
    utilities: tuple[str, ...] | None = None
    engines: tuple[str, ...] | None = None
    check: float | None = None
    max_batch: int | None = None
    queue: int = 64
    wait: float = 0.0
    decoders: int = 2

    def __post_init__(self) -> None:
        _check_numbers(self, "wait", "check")
        if self.check is not None and self.check > 1:
            raise InputError(f"check is a fraction, at most 1, got {self.check}.")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """A server.

    Attributes:
        host, port: where it listens; loopback unless told otherwise.
        token: what clients must send as ``Authorization: Bearer …``; None for no such thing. It does not stand in the file:
            ``token_file`` does, or the environment variable SHAPLEYCAM_TOKEN has it.
        open_metrics: whether /metrics needs no token.
        page: whether the page is served at /.
        pre_stop: seconds between SIGTERM and the end of listening, in which /readyz says no and requests are still served.
        grace: seconds after which what is not answered is dropped, in all.
        stall: seconds after which a batch that still runs makes /healthz say no.
        limits, models: see there.

    Raises:
        InputError: a number that makes no sense.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    open_metrics: bool = False
    page: bool = True
    pre_stop: float = 0.0
    grace: float = 20.0
    stall: float = 60.0
    limits: Limits = Limits()
    models: Mapping[str, ModelConfig] = field(default_factory=lambda: {"default": ModelConfig()})

    def __post_init__(self) -> None:
        _check_numbers(self, "port", "pre_stop", "grace")
        if self.port > 65535:
            raise InputError(f"port is 0 (any) to 65535, got {self.port}.")


def read_config(file: str | os.PathLike[str]) -> ServerConfig:
    """Read a TOML file; the paths in it are relative to it.

    Raises:
        InputError: it cannot be read, or names something that does not exist, or has a value of another type.
    """
    path = Path(file)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"--config {path} cannot be read: {error}.") from error

    def resolved(value: Any) -> Any:
        return str(path.parent / value) if isinstance(value, str) else value

    if "token" in content:
        raise InputError(f"{path}: the token does not stand in the file: give token_file, or SHAPLEYCAM_TOKEN.")
    token_file = content.pop("token_file", None)
    limits = _fill(Limits, content.pop("limits", {}), f"{path}: [limits]")
    tables = content.pop("models", None)
    if tables is not None and (not isinstance(tables, dict) or not tables):
        raise InputError(f"{path}: models are tables, such as [models.pets].")
    models = {}
    for name, table in (tables or {"default": {}}).items():
        check_name(name)
        if not isinstance(table, dict):
            raise InputError(f"{path}: models are tables, such as [models.pets]; {name!r} is not.")
        for key in ("weights", "classes", "file"):
            if key in table and not (key == "weights" and not (path.parent / str(table[key])).exists()):
                table[key] = resolved(table[key])  # a set of torchvision's weights stays a name
        models[name] = _fill(ModelConfig, table, f"{path}: [models.{name}]")
    told = _fill(ServerConfig, {**content}, str(path))
    token = read_token(resolved(token_file)) if token_file is not None else None
    return dataclasses.replace(told, limits=limits, models=models, token=token)


def read_token(file: str | os.PathLike[str]) -> str:
    """The token in a file, without white space around it.

    Raises:
        InputError: it cannot be read, or is shorter than 16 characters.
    """
    try:
        token = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The token file {file} cannot be read: {error}.") from error
    return check_token(token)


def check_token(token: str) -> str:
    """The token, if it is one that is worth having.

    Raises:
        InputError: it is shorter than 16 characters, or holds other than printable ASCII.
    """
    if len(token) < 16 or not all("!" <= c <= "~" for c in token):
        raise InputError("A token has at least 16 printable ASCII characters and no white space.")
    return token


def check_name(name: str) -> str:
    """A model's name, which is part of addresses.

    Raises:
        InputError: it has other than letters, digits, dots, dashes and underscores.
    """
    if not name or not all(c.isascii() and (c.isalnum() or c in "._-") for c in name) or name.startswith("."):
        raise InputError(f"A model's name has letters, digits, '.', '_' and '-', got {name!r}.")
    return name


def _fill(kind: type[C], table: Any, where: str) -> C:
    if not isinstance(table, dict):
        raise InputError(f"{where} must be a table.")
    types_ = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind) if f.name not in ("token", "limits", "models")]  # type: ignore[arg-type]
    values = {}
    for key, value in table.items():
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}; expected {', '.join(known)}.")
        values[key] = _typed(value, types_[key], f"{where}: {key}")
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _typed(value: Any, wanted: Any, where: str) -> Any:
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    for option in options:
        if typing.get_origin(option) is tuple:
            if isinstance(value, list) and all(isinstance(part, str) for part in value):
                return tuple(value)
        elif option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        elif option in (str, int, float, bool) and type(value) is option:
            return value
    names = " or ".join(
        "a list of strings" if typing.get_origin(o) is tuple else o.__name__ for o in options if o is not type(None)
    )
    raise InputError(f"{where} must be {names}, got {value!r}.")
