"""The Open Inference Protocol, V2, over HTTP, with the binary extension: health, metadata, ``infer``.

Inputs: ``image``, BYTES [N] (encoded pictures), UINT8 [N, 3, H, W] (crops) or FP32 [N, 3, H, W] (as the network takes them);
and, if classes are named, ``target``, INT64 [N] or [N, M]. Outputs: ``prediction`` FP32 [N, K], ``target_class`` INT64 [N, M],
``raw`` and ``saliency_map`` [N, M, h, w]. The maps are FP16 where the request's parameter ``map_datatype`` says so. V2 has no
word for "explain": the maps are outputs like any other, with the names that the exported programs have.

gRPC is not served: it needs generated code and grpcio beside the HTTP server, and a second set of limits; every client of the
protocol speaks HTTP too.
"""

# No "from __future__ import annotations": FastAPI reads those of the routes, which are defined in a function.

import json
from typing import Any, NamedTuple

import torch
from fastapi import FastAPI, Request, Response
from torch import Tensor

from ..._version import __version__
from ..refusals import Refusal
from ..runtime import Question
from ..server import Server
from ..service import Answer, Service
from . import tensors
from .explain import DIGITS, EXAMPLE, responses
from .kserve_v1 import question

OUTPUTS = ("prediction", "target_class", "raw", "saliency_map")
_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}


def add(app: FastAPI, server: Server) -> None:
    """Add the routes."""
    tags: list[Any] = ["open inference"]
    limits = server.config.limits
    unknown: dict[int | str, dict[str, Any]] = {
        404: {"description": "No such model.", "content": {"application/json": {"schema": _ERROR}}}
    }
    answer = {
        "application/json": {"schema": {"type": "object", "required": ["model_name", "outputs"]}},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    }

    @app.get("/v2", tags=tags, summary="The server")
    async def server_metadata() -> dict[str, Any]:
        return {"name": "shapleycam", "version": __version__, "extensions": ["binary_tensor_data"]}

    def state(key: str) -> dict[int | str, dict[str, Any]]:
        content = {"application/json": {"schema": {"type": "object", "required": [key]}, "example": {key: True}}}
        return {200: {"content": content}, 503: {"description": "No.", "content": content}}

    def said(good: bool, **content: Any) -> Response:
        # The status is the protocol's word; the body is KServe's, whose client reads it.
        return Response(json.dumps(content), 200 if good else 503, media_type="application/json")

    @app.get("/v2/health/live", tags=tags, summary="Whether the process should live", responses=state("live"))
    async def live() -> Response:
        return said(server.healthy(), live=server.healthy())

    @app.get("/v2/health/ready", tags=tags, summary="Whether requests are wanted", responses=state("ready"))
    async def ready() -> Response:
        return said(server.ready(), ready=server.ready())

    @app.get("/v2/models/{model}/ready", tags=tags, summary="Whether a model is ready", responses={**state("ready"), **unknown})
    async def model_ready(model: str) -> Response:
        good = server.service(model).state == "ready" and not server.draining
        return said(good, name=model, ready=good)

    @app.get("/v2/models/{model}", tags=tags, summary="A model's inputs and outputs", responses=unknown)
    async def model_metadata(model: str) -> dict[str, Any]:
        return metadata(server.service(model))

    @app.post(
        "/v2/models/{model}/infer",
        tags=tags,
        summary="Predictions and maps",
        openapi_extra={"requestBody": _BODY},
        responses=responses(answer, limits, _ERROR),
    )
    async def infer(request: Request, model: str) -> Response:
        service = server.service(model)
        body, size = await request.body(), request.headers.get("inference-header-content-length")

        def parsed() -> Asked:  # the JSON, which takes many times the memory of its bytes, is not kept
            return _asked(*tensors.read(body, size, limits.instances), service)

        asked = await server.parse(service, parsed)
        server.hold(request, _size(asked, service))
        answers = await server.ask(request, service, asked.images, asked.questions)

        def work() -> Response:
            return tensors.write(service.name, asked.id, _outputs(answers, asked.wanted, asked.narrow), asked.wanted)

        return await server.aside(service, "draw", work)


def metadata(service: Service) -> dict[str, Any]:
    """A model in V2's words."""
    height, width = service.runtime.preprocess.crop
    return {
        "name": service.name,
        "versions": ["1"],
        "platform": "shapleycam",
        "inputs": [
            {"name": "image", "datatype": "BYTES", "shape": [-1]},
            {"name": "target", "datatype": "INT64", "shape": [-1, -1], "parameters": {"optional": True}},
        ],
        "outputs": [
            {"name": "prediction", "datatype": "FP32", "shape": [-1, service.count or -1]},
            {"name": "target_class", "datatype": "INT64", "shape": [-1, -1]},
            {"name": "raw", "datatype": "FP32", "shape": [-1, -1, -1, -1]},
            {"name": "saliency_map", "datatype": "FP32", "shape": [-1, -1, height, width]},
        ],
    }


class Asked(NamedTuple):
    """A request: what to explain, and which outputs are wanted, as binary or not, and in FP16 or not."""

    id: str
    images: list[bytes | Tensor]
    questions: list[Question]
    wanted: dict[str, bool]
    narrow: bool


def _asked(head: dict[str, Any], given: dict[str, list[bytes] | Tensor], service: Service) -> Asked:
    images, wanted, parameters = _images(given, service), _wanted(head), head.get("parameters", {})
    told = head.get("id", "")
    if not isinstance(told, str) or len(told) > 256:
        raise Refusal(400, "inputs", '"id" is a string of at most 256 characters.')
    if wanted.keys() <= {"prediction"}:
        questions = [Question(explain=False)] * len(images)
    else:
        one = question(None, {k: v for k, v in parameters.items() if k in ("method", "utility", "engine", "topk")})
        questions = [
            service.check(Question(one.method, one.utility, one.engine, targets, 1 if targets else one.topk))
            for targets in _targets(given, len(images))
        ]
    return Asked(told, images, questions, wanted, _narrow(head))


def _size(asked: Asked, service: Service) -> int:
    """About how many bytes the answer will have."""
    classes = sum(len(one.targets) or one.topk for one in asked.questions)
    numbers = {
        "prediction": len(asked.images) * (service.count or 0),
        "target_class": classes,
        "raw": classes * service.area("layer"),
        "saliency_map": classes * service.area("image"),
    }
    return sum(numbers[name] * (4 if binary else DIGITS) for name, binary in asked.wanted.items())


def _images(given: dict[str, list[bytes] | Tensor], service: Service) -> list[bytes | Tensor]:
    unknown = given.keys() - {"image", "target"}
    if "image" not in given or unknown:
        raise Refusal(400, "inputs", f"The inputs are 'image' and, if wanted, 'target'; got {sorted(given)}.")
    images = given["image"]
    if isinstance(images, list):
        return list(images)
    wanted = [3, *service.runtime.preprocess.crop]
    if images.ndim != 4 or list(images.shape[1:]) != wanted or images.dtype not in (torch.uint8, torch.float32, torch.float16):
        raise Refusal(
            400,
            "inputs",
            f"'image' is BYTES [N], or UINT8, FP16 or FP32 {['N', *wanted]}; got {images.dtype} {list(images.shape)}.",
        )
    return list(images.unbind(0))


def _targets(given: dict[str, list[bytes] | Tensor], count: int) -> list[tuple[int, ...]]:
    target = given.get("target")
    if target is None:
        return [()] * count
    if isinstance(target, list) or target.dtype not in (torch.int64, torch.int32) or target.ndim not in (1, 2):
        raise Refusal(400, "inputs", "'target' is INT64 [N] or [N, M].")
    if len(target) != count:
        raise Refusal(400, "inputs", f"'target' is of {len(target)} images, and 'image' of {count}.")
    return [tuple(row) for row in target.reshape(count, -1).tolist()]


def _wanted(head: dict[str, Any]) -> dict[str, bool]:
    """The outputs that are asked for, and which of them as binary."""
    parameters = head.get("parameters", {})
    everything = bool(parameters.get("binary_data_output", False))
    asked = head.get("outputs")
    if not asked:
        return dict.fromkeys(OUTPUTS, everything)
    wanted = {}
    for one in asked:
        name = one.get("name") if isinstance(one, dict) else None
        if name not in OUTPUTS:
            raise Refusal(400, "outputs", f"There is no output {name!r}: expected some of {', '.join(OUTPUTS)}.")
        told = one.get("parameters") or {}
        wanted[name] = bool(told.get("binary_data", everything)) if isinstance(told, dict) else everything
    return wanted


def _narrow(head: dict[str, Any]) -> bool:
    told = head.get("parameters", {}).get("map_datatype", "FP32")
    if told not in ("FP16", "FP32"):
        raise Refusal(400, "outputs", f"map_datatype is FP16 or FP32, got {told!r}.")
    return bool(told == "FP16")


def _outputs(answers: list[Answer], wanted: dict[str, bool], narrow: bool) -> dict[str, Tensor]:
    """The tensors of a request."""
    found = {}
    for name in wanted:
        if name == "prediction":
            found[name] = torch.stack([one.logits for one in answers])
        elif name == "target_class":
            found[name] = torch.tensor([one.targets for one in answers])
        else:
            if name == "raw" and not answers[0].signed:
                raise Refusal(400, "outputs", "This model runs a program without signed maps: ask for saliency_map.")
            maps = torch.stack([one.raw if name == "raw" else one.heatmaps() for one in answers])
            if narrow and float(maps.abs().max()) > torch.finfo(torch.float16).max:
                raise Refusal(422, "outputs", f"{name!r} has values above 65504, which FP16 has not: ask for it in FP32.")
            found[name] = maps.half() if narrow else maps
    return found


_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["inputs"],
                "properties": {
                    "id": {"type": "string"},
                    "parameters": {"type": "object"},
                    "inputs": {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "type": "object",
                            "required": ["name", "shape", "datatype"],
                            "properties": {
                                "name": {"type": "string"},
                                "shape": {
                                    "type": "array",
                                    "maxItems": 8,
                                    "items": {"type": "integer", "minimum": 1, "maximum": 2**31 - 1},
                                },
                                "datatype": {"type": "string", "enum": ["BYTES", "UINT8", "FP16", "FP32", "INT32", "INT64"]},
                                "parameters": {"type": "object"},
                                "data": {"type": "array"},
                            },
                        },
                    },
                    "outputs": {
                        "type": "array",
                        "items": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
                    },
                },
            },
            "example": {
                "inputs": [
                    {"name": "image", "shape": [1], "datatype": "BYTES", "data": [EXAMPLE]},
                    {"name": "target", "shape": [1], "datatype": "INT64", "data": [0]},
                ],
                "outputs": [{"name": "saliency_map"}],
            },
        },
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    },
}
