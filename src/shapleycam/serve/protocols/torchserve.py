"""TorchServe's inference API, for clients that have not moved on: ``/ping``, ``/predictions/{m}``, ``/explanations/{m}``."""

# No "from __future__ import annotations": FastAPI reads those of the routes, which are defined in a function.

import json
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request, Response

from ..runtime import Question
from ..server import Server
from .explain import DIGITS, label, one_image, responses

_ERROR = {
    "type": "object",
    "required": ["code", "type", "message"],
    "properties": {"code": {"type": "integer"}, "type": {"type": "string"}, "message": {"type": "string"}},
}
_IMAGE = {"schema": {"type": "string", "format": "binary"}}
_BODY = {
    "required": True,
    "content": {
        "application/octet-stream": _IMAGE,
        "multipart/form-data": {
            "schema": {"type": "object", "required": ["data"], "properties": {"data": {"type": "string", "format": "binary"}}}
        },
    },
}
Model = Annotated[str, Path(description="A served model.")]


def add(app: FastAPI, server: Server) -> None:
    """Add the routes."""
    limits = server.config.limits
    tags: list[Any] = ["torchserve"]
    healthy = {"application/json": {"example": {"status": "Healthy"}}}
    predicted = {"application/json": {"schema": {"type": "object", "additionalProperties": {"type": "number"}}}}
    mapped = {"application/json": {"schema": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}}}

    @app.get(
        "/ping",
        tags=tags,
        summary="Health, in TorchServe's words",
        responses={200: {"content": healthy}, 503: {"description": "Not ready.", "content": healthy}},
    )
    async def ping() -> Response:
        good = server.ready() and server.healthy()
        content = json.dumps({"status": "Healthy" if good else "Unhealthy"})
        return Response(content, 200 if good else 503, media_type="application/json")

    @app.post(
        "/predictions/{model}",
        tags=tags,
        summary="The most probable classes and their probabilities",
        openapi_extra={"requestBody": _BODY},
        responses=responses(predicted, limits, _ERROR),
    )
    async def predictions(request: Request, model: Model) -> Response:
        service = server.service(model)
        [answer] = await server.ask(request, service, [await one_image(request)], Question(explain=False))
        chances, indices = answer.probabilities.topk(min(5, len(answer.logits)))
        best = {label(service, i): p for i, p in zip(indices.tolist(), chances.tolist(), strict=True)}
        return Response(json.dumps(best), media_type="application/json")

    @app.post(
        "/explanations/{model}",
        tags=tags,
        summary="The heatmap of the most probable class, at the size of the network's input",
        openapi_extra={"requestBody": _BODY},
        responses=responses(mapped, limits, _ERROR),
    )
    async def explanations(request: Request, model: Model) -> Response:
        service = server.service(model)
        server.hold(request, DIGITS * service.area("image"))
        [answer] = await server.ask(request, service, [await one_image(request)], Question())

        def work() -> Response:
            rows = [[round(value, 4) for value in row] for row in answer.heatmaps()[0].tolist()]
            return Response(json.dumps(rows, allow_nan=False), media_type="application/json")

        return await server.aside(service, "draw", work)
