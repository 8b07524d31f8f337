"""KServe V1: ``:predict`` and ``:explain`` with ``instances``, as KServe's SDK sends them.

An instance is an encoded picture in base64, as ``{"b64": "…"}``, ``{"image": {"b64": "…"}}``, ``{"image_bytes": {"b64": "…"}}``
or the bare string; or numbers, [3, H, W] as the network takes them, or whole ones in 0..255, [H, W, 3], which are a crop.
"""

# No "from __future__ import annotations": FastAPI reads those of the routes, which are defined in a function.

import base64
import binascii
import json
from typing import Any

import torch
from fastapi import FastAPI, Request, Response
from torch import Tensor

from ...errors import InputError
from ..refusals import Refusal, check_instances, read_json
from ..runtime import Question
from ..server import Server
from ..service import Answer, Service
from .explain import DIGITS, EXAMPLE, label, responses, top

_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}


def add(app: FastAPI, server: Server) -> None:
    """Add the routes."""
    limits = server.config.limits
    tags: list[Any] = ["kserve"]

    def document(key: str) -> dict[int | str, dict[str, Any]]:
        schema = {"type": "object", "required": [key], "properties": {key: {"type": "array", "items": {"type": "object"}}}}
        return responses({"application/json": {"schema": schema}}, limits, _ERROR)

    @app.get("/v1/models", tags=tags, summary="The models")
    async def models() -> dict[str, list[str]]:
        return {"models": list(server.services)}

    @app.get("/v1/models/{model}", tags=tags, summary="Whether a model is ready", responses=_READY)
    async def model_ready(model: str) -> Response:
        service = server.service(model)
        ready = service.state == "ready" and not server.draining
        return Response(json.dumps({"name": model, "ready": ready}), 200 if ready else 503, media_type="application/json")

    @app.post(
        "/v1/models/{model}:predict",
        tags=tags,
        summary="Probabilities of the most probable classes",
        openapi_extra={"requestBody": _BODY},
        responses=document("predictions"),
    )
    async def predict(request: Request, model: str) -> Response:
        service = server.service(model)
        answers = await server.ask(request, service, *await parsed(request, service, explain=False))
        return _json({"predictions": [prediction(service, one) for one in answers]})

    @app.post(
        "/v1/models/{model}:explain",
        tags=tags,
        summary="Maps of the most probable class, or of those that are named",
        openapi_extra={"requestBody": _BODY},
        responses=document("explanations"),
    )
    async def explain(request: Request, model: str) -> Response:
        service = server.service(model)
        images, questions = await parsed(request, service, explain=True)
        classes = sum(len(one.targets) or one.topk for one in questions) + len(questions)  # the first of each comes twice
        server.hold(request, DIGITS * classes * service.area("layer"))
        answers = await server.ask(request, service, images, questions)

        def work() -> Response:
            return _json(
                {
                    "explanations": [explanation(service, one) for one in answers],
                    "predictions": [prediction(service, one) for one in answers],
                }
            )

        return await server.aside(service, "draw", work)

    async def parsed(request: Request, service: Service, explain: bool) -> tuple[list[bytes | Tensor], list[Question]]:
        """What is asked; the JSON, which takes many times the memory of its bytes, is not kept."""
        body = await request.body()

        def work() -> tuple[list[bytes | Tensor], list[Question]]:
            instances, parameters = read(body, limits.instances)
            told = [question(one, parameters) if explain else Question(explain=False) for one in instances]
            questions = [service.check(one) for one in told]
            return [image_of(one, n, service) for n, one in enumerate(instances)], questions

        return await server.parse(service, work)


def _json(content: Any) -> Response:
    return Response(json.dumps(content, allow_nan=False), media_type="application/json")


def read(body: bytes, most: int) -> tuple[list[Any], dict[str, Any]]:
    """The instances, at most so many, and the parameters of a request.

    Raises:
        Refusal: 400, the body is no such thing; 413, too many, or too much JSON.
    """
    content = read_json(body)
    if not isinstance(content, dict) or not isinstance(content.get("instances"), list) or not content["instances"]:
        raise Refusal(400, "json", 'The body must be {"instances": [...]} with at least one instance.')
    check_instances(len(content["instances"]), most)
    parameters = content.get("parameters", {})
    if not isinstance(parameters, dict):
        raise Refusal(400, "json", '"parameters" must be an object.')
    return content["instances"], parameters


def image_of(instance: Any, n: int, service: Service) -> bytes | Tensor:
    """What to explain: the bytes of a picture, or a tensor.

    Raises:
        Refusal: 400 or 422; the message says which instance.
    """
    for key in ("image", "image_bytes", "data", "b64"):
        if isinstance(instance, dict) and key in instance:
            instance = instance[key]
    if isinstance(instance, str):
        try:
            return base64.b64decode(instance.partition("base64,")[2] or instance, validate=True)
        except (binascii.Error, ValueError) as error:
            raise Refusal(400, "base64", f"Instance {n} is a string that is no base64.") from error
    if isinstance(instance, list):
        try:
            tensor = torch.tensor(instance, dtype=torch.float32)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise Refusal(422, "invalid", f"Instance {n} is no array of numbers.") from error
        crop = service.runtime.preprocess.crop
        if tuple(tensor.shape) == (*crop, 3) and bool(((tensor >= 0) & (tensor <= 255) & (tensor == tensor.round())).all()):
            return tensor.to(torch.uint8).permute(2, 0, 1).contiguous()
        if tuple(tensor.shape) != (3, *crop):
            raise Refusal(
                422,
                "invalid",
                f"Instance {n} has the shape {list(tensor.shape)}; expected {[3, *crop]}, or pixels {[*crop, 3]}.",
            )
        return tensor
    raise Refusal(400, "json", f'Instance {n} must be {{"b64": "…"}}, a base64 string, or numbers.')


def question(instance: Any, parameters: dict[str, Any]) -> Question:
    """What is asked of an instance: its own words before the request's.

    Raises:
        InputError: of another type.
    """
    told = {**parameters, **(instance if isinstance(instance, dict) else {})}
    names: dict[str, Any] = {}
    for name in ("method", "utility", "engine"):
        value = told.get(name, "")
        if not isinstance(value, str):
            raise InputError(f"{name} must be a string, got {value!r}.")
        names[name] = value
    target, topk = told.get("target", ()), told.get("topk", 1)
    targets = [target] if isinstance(target, int) else target
    if not isinstance(targets, (list, tuple)) or any(type(one) is not int for one in targets) or type(topk) is not int:
        raise InputError(f"target must be a class index or several, and topk a number; got {target!r} and {topk!r}.")
    return Question(**names, targets=tuple(targets), topk=topk, gap=bool(told.get("gap", False)))


def prediction(service: Service, answer: Answer) -> dict[str, Any]:
    """The most probable classes of an image."""
    best = top(service, answer)
    return {**best[0], "top": best}


def explanation(service: Service, answer: Answer) -> dict[str, Any]:
    """The maps of an image, one per explained class."""
    assert answer.explanation is not None
    gaps = answer.explanation.gap
    shown = answer.raw if answer.signed else answer.heatmaps("layer")
    maps = []
    for m, index in enumerate(answer.targets):
        one = {"class": index, "label": label(service, index), "map": shown[m].tolist(), "shape": list(shown[m].shape)}
        if gaps is not None:
            one["completeness_gap"] = float(gaps[0, m])
        maps.append(one)
    return {**answer.made, **maps[0], "maps": maps}


_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["instances"],
                "properties": {
                    "instances": {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "type": "object",
                            "required": ["b64"],
                            "properties": {"b64": {"type": "string", "description": "A PNG, JPEG or WebP file in base64."}},
                        },
                    },
                    "parameters": {
                        "type": "object",
                        "properties": {
                            "method": {"type": "string"},
                            "utility": {"type": "string"},
                            "engine": {"type": "string"},
                            "target": {"type": "integer"},
                            "topk": {"type": "integer", "minimum": 1},
                        },
                    },
                },
            },
            "example": {"instances": [{"b64": EXAMPLE}], "parameters": {"method": "shapleycam"}},
        }
    },
}
_READY: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Ready.",
        "content": {"application/json": {"example": {"name": "default", "ready": True}}},
    },
    404: {"description": "No such model.", "content": {"application/json": {"schema": _ERROR}}},
    503: {"description": "Not ready.", "content": {"application/json": {"example": {"name": "default", "ready": False}}}},
}
