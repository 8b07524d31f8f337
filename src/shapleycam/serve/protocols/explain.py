"""``POST /v1/explain``: one image in, one map out, as a picture, as numbers, or as JSON with everything."""

# No "from __future__ import annotations": FastAPI reads those of a route, which name the server's own limits.

import base64
import json
from enum import StrEnum
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response

from ...errors import InputError
from ...model.zoo import Classifier
from ..pictures import grey, npy, png
from ..refusals import Refusal
from ..runtime import Question
from ..server import Server
from ..service import Answer, Service


class Returned(StrEnum):
    """What an answer may be."""

    OVERLAY = "overlay"
    HEATMAP = "heatmap"
    JSON = "json"
    NPY = "npy"
    RAW = "raw"


class Embedded(StrEnum):
    """What a JSON answer may carry besides numbers."""

    VIEW = "view"
    HEATMAP = "heatmap"
    OVERLAY = "overlay"


class Colormap(StrEnum):
    """The colours of an overlay."""

    JET = "jet"
    TURBO = "turbo"
    VIRIDIS = "viridis"
    MAGMA = "magma"


TOP = 5  # classes named in every JSON answer


def add(app: FastAPI, server: Server) -> None:
    """Add the route, and the list of models that the page reads."""
    limits = server.config.limits
    first = next(iter(server.services.values()))
    methods, utilities, engines = (
        sorted({name for one in server.services.values() for name in getattr(one.runtime, what)})
        for what in ("methods", "utilities", "engines")
    )

    @app.post(
        "/v1/explain",
        tags=["explain"],
        summary="Explain one image",
        openapi_extra={"requestBody": _BODY},
        responses=responses(_ANSWERS, limits),
        response_class=Response,
    )
    async def explain(
        request: Request,
        model: Annotated[
            str | None,
            Query(description="A served model; the first by default.", json_schema_extra={"enum": list(server.services)}),
        ] = None,
        method: Annotated[str | None, Query(description="Attribution method.", json_schema_extra={"enum": methods})] = None,
        utility: Annotated[str | None, Query(description="What is explained.", json_schema_extra={"enum": utilities})] = None,
        engine: Annotated[str | None, Query(description="Derivative engine.", json_schema_extra={"enum": engines})] = None,
        target: Annotated[
            list[int] | None, Query(description="Class index; repeat for several. The most probable class by default.")
        ] = None,
        topk: Annotated[int, Query(ge=1, le=limits.classes, description="Explain the k most probable classes.")] = 1,
        gap: Annotated[bool, Query(description="Also the completeness gap (JSON only).")] = False,
        returned: Annotated[Returned, Query(alias="return", description="What comes back.")] = Returned.OVERLAY,
        embed: Annotated[list[Embedded] | None, Query(description="Pictures in a JSON answer, as base64 PNG.")] = None,
        size: Annotated[
            str,
            Query(
                pattern=r"^(image|layer|[1-9][0-9]{0,4}(x[1-9][0-9]{0,4})?)$",
                description="Of a heatmap: image (the network's input), layer, N, or HEIGHTxWIDTH.",
            ),
        ] = "image",
        colormap: Annotated[Colormap, Query(description="Of the overlay.")] = Colormap.JET,
        alpha: Annotated[float, Query(ge=0, le=1, description="Weight of the heatmap in the overlay.")] = 0.5,
        timeout: Annotated[
            float | None, Query(gt=0, le=3600, description="Seconds after which the answer is worth nothing.")
        ] = None,
    ) -> Response:
        service = server.service(model)
        shape = read_size(size, limits.side)
        several = (len(target) if target else topk) > 1
        if returned in (Returned.OVERLAY, Returned.HEATMAP) and several:
            raise InputError(f"return={returned.value} is one picture: ask for one class, or for json, npy or raw.")
        question = Question(method or "", utility or "", engine or "", tuple(target or ()), topk, gap)
        question = service.check(question)  # before the body is looked at
        server.hold(request, answer_size(service, returned, len(target or ()) or topk, shape, embed or ()))
        image = await one_image(request)
        [answer] = await server.ask(request, service, [image], question, timeout)
        if returned is Returned.RAW and not answer.signed:
            raise InputError(f"{service.name!r} runs a program without signed maps: ask for npy.")

        def work() -> tuple[bytes, str]:
            if returned is Returned.OVERLAY:
                return png(answer.overlay(colormap.value, alpha)[0]), "image/png"
            if returned is Returned.HEATMAP:
                return png(grey(answer.heatmaps(shape)[0])), "image/png"
            if returned is Returned.NPY:
                return npy(answer.heatmaps(shape)), "application/x-npy"
            if returned is Returned.RAW:
                return npy(answer.raw), "application/x-npy"
            content = as_json(service, answer, embed or (), shape, colormap.value, alpha)
            return json.dumps(content, allow_nan=False).encode(), "application/json"

        content, kind = await server.aside(service, "draw", work)
        headers = {
            "x-shapleycam-model": service.name,
            "x-shapleycam-classes": ",".join(map(str, answer.targets)),
            "x-shapleycam-engine": answer.made["engine"],
        }
        return Response(content, 200, headers, kind)

    @app.get("/v1/info", tags=["explain"], summary="What is served", responses={200: {"content": {"application/json": {}}}})
    async def info() -> dict[str, Any]:
        return {
            "default": first.name,
            "limits": {
                "body": limits.body,
                "pixels": limits.pixels,
                "formats": list(limits.formats),
                "classes": limits.classes,
            },
            "models": {name: about(one) for name, one in server.services.items()},
        }


def about(service: Service) -> dict[str, Any]:
    """What a client may want to know of a model."""
    runtime = service.runtime
    classifier: Classifier | None = getattr(runtime, "classifier", None)
    return {
        "state": service.state,
        "network": classifier.name if classifier is not None else None,
        "device": runtime.device,
        "input": list(runtime.preprocess.crop),
        "preprocess": str(runtime.preprocess),
        "classes": service.count,
        "methods": list(runtime.methods),
        "utilities": list(runtime.utilities),
        "engines": list(runtime.engines),
        "gap": runtime.gap,
        "max_batch": service.max_batch,
    }


def read_size(size: str, most: int) -> str | tuple[int, int]:
    """ "image", "layer", or (height, width) from "N" or "HxW".

    Raises:
        InputError: larger than ``most``.
    """
    if size in ("image", "layer"):
        return size
    height, _, width = size.partition("x")
    shape = int(height), int(width or height)
    if max(shape) > most:
        raise InputError(f"size {size} is larger than the {most} pixels a side that are served.")
    return shape


async def one_image(request: Request) -> bytes:
    """The image of a request: the only file of a multipart form, or the body itself.

    Raises:
        Refusal: no file, several, or a form that cannot be read.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        return await request.body()
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser

    parser = MultiPartParser(request.headers, request.stream(), max_files=2, max_fields=8)
    parser.spool_max_size = 2**31  # the body is bounded already, and no image goes to a disk
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise Refusal(400, "form", f"The form cannot be read: {getattr(error, 'message', 'no boundary')}.") from error
    files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    if len(files) != 1:
        raise Refusal(400, "form", f"The form must have one file, got {len(files)}.")
    try:
        return await files[0].read()
    finally:
        await form.close()


#: Bytes of a number in a JSON answer, at most.
DIGITS = 25


def answer_size(service: Service, returned: Returned, classes: int, shape: str | tuple[int, int], embed: Any) -> int:
    """About how many bytes the answer will have; a picture as many as it would have without compression."""
    if returned is not Returned.JSON:
        drawn = {Returned.OVERLAY: "image", Returned.RAW: "layer"}
        return 4 * classes * service.area(drawn.get(returned, shape))
    pictures = {
        Embedded.VIEW: service.area("image"),
        Embedded.HEATMAP: classes * service.area(shape),
        Embedded.OVERLAY: classes * service.area("image"),
    }
    return DIGITS * classes * service.area("layer") + 4 * sum(pictures[one] for one in set(embed))


def label(service: Service, index: int) -> str:
    """The name of a class, "class 7" where names are unknown."""
    names = service.runtime.classes
    return names[index][0] if 0 <= index < len(names) else f"class {index}"


def top(service: Service, answer: Answer, count: int = TOP) -> list[dict[str, Any]]:
    """The most probable classes."""
    chances, indices = answer.probabilities.topk(min(count, len(answer.logits)))
    return [
        {"class": index, "label": label(service, index), "probability": round(chance, 6)}
        for chance, index in zip(chances.tolist(), indices.tolist(), strict=True)
    ]


def as_json(
    service: Service,
    answer: Answer,
    embed: Any,
    shape: str | tuple[int, int],
    colormap: str = "jet",
    alpha: float = 0.5,
) -> dict[str, Any]:
    """The JSON answer."""
    assert answer.explanation is not None
    gaps = answer.explanation.gap
    heatmaps = answer.heatmaps(shape) if Embedded.HEATMAP in embed else None
    drawn = answer.overlay(colormap, alpha) if Embedded.OVERLAY in embed else None
    explanations = []
    for m, index in enumerate(answer.targets):
        one: dict[str, Any] = {
            "class": index,
            "label": label(service, index),
            "probability": round(float(answer.probabilities[index]), 6),
            "logit": float(answer.logits[index]),
            "map": answer.raw[m].tolist() if answer.signed else None,
        }
        if gaps is not None:
            one["completeness_gap"] = float(gaps[0, m])
            one["utility_gain"] = _gain(answer, m)
        if heatmaps is not None:
            one["heatmap"] = _base64(png(grey(heatmaps[m])))
        if drawn is not None:
            one["overlay"] = _base64(png(drawn[m]))
        explanations.append(one)
    content: dict[str, Any] = {
        "model": service.name,
        **answer.made,
        "image": None if answer.size is None else {"width": answer.size[0], "height": answer.size[1]},
        "input": list(service.runtime.preprocess.crop),
        "explanations": explanations,
        "top": top(service, answer),
    }
    if Embedded.VIEW in embed and answer.view is not None:
        content["view"] = _base64(png(answer.view.permute(1, 2, 0)))
    return content


def _gain(answer: Answer, m: int) -> float | None:
    """U(A) - U(B), by the gap and the sum of the attributions; None where the map's sum is not theirs.

    The rows that multiply elementwise sum A·w. Those that pool w over the positions first do where w is constant, as the closed
    form's is.
    """
    assert answer.explanation is not None and answer.explanation.gap is not None
    summed = ("shapleycam-h", "hirescam") + (("shapleycam", "gradcam") if answer.made["engine"] == "closed_form" else ())
    if answer.made["method"] not in summed or not answer.signed:
        return None
    return float(answer.explanation.gap[0, m].double() + answer.raw[m].double().sum())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


# ------------------------------------------------------------------------------------------------------- the document

#: One orange pixel, a PNG in base64.
EXAMPLE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mM4EaABAAMkAUEj5ExoAAAAAElFTkSuQmCC"
_IMAGE = {"type": "string", "format": "binary", "description": "A PNG, JPEG or WebP file."}
_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": {"type": "object", "required": ["image"], "properties": {"image": _IMAGE}}},
        "image/png": {"schema": _IMAGE},
        "image/jpeg": {"schema": _IMAGE},
        "image/webp": {"schema": _IMAGE},
        "application/octet-stream": {"schema": _IMAGE},
    },
}
_JSON_EXAMPLE = {
    "model": "default",
    "method": "shapleycam",
    "utility": "rest",
    "engine": "closed_form",
    "backend": "native",
    "layer": "features",
    "image": {"width": 451, "height": 300},
    "input": [224, 224],
    "explanations": [
        {"class": 282, "label": "tiger cat", "probability": 0.41, "logit": 8.1, "map": [[0.1, 0.2], [-0.1, 0.0]]},
    ],
    "top": [{"class": 282, "label": "tiger cat", "probability": 0.41}],
}
_ANSWERS = {
    "image/png": {"schema": {"type": "string", "format": "binary"}},
    "application/x-npy": {"schema": {"type": "string", "format": "binary"}},
    "application/json": {
        "schema": {
            "type": "object",
            "required": ["model", "method", "explanations", "top"],
            "properties": {
                "model": {"type": "string"},
                "method": {"type": "string"},
                "explanations": {
                    "type": "array",
                    "items": {"type": "object", "required": ["class", "label", "probability", "map"]},
                },
                "top": {"type": "array", "items": {"type": "object", "required": ["class", "label", "probability"]}},
            },
        },
        "example": _JSON_EXAMPLE,
    },
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["kind", "message", "request_id"],
            "properties": {name: {"type": "string"} for name in ("kind", "message", "request_id")},
        }
    },
}


def responses(content: dict[str, Any], limits: Any, error: dict[str, Any] | None = None) -> dict[int | str, dict[str, Any]]:
    """What a route may answer, for the document."""
    body = {"application/json": {"schema": error or _ERROR}}
    retry = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return {
        200: {"description": "The answer.", "content": content},
        400: {"description": "An empty image, or a body that cannot be read.", "content": body},
        401: {"description": "A token is needed.", "content": body},
        404: {"description": "No such model.", "content": body},
        408: {"description": f"The body took longer than {limits.body_time:g} s.", "content": body},
        413: {"description": f"More than {limits.body} bytes, {limits.pixels} pixels, or too many images.", "content": body},
        415: {"description": f"Not one of {', '.join(limits.formats)}.", "content": body},
        422: {"description": "A damaged image, or a question that cannot be answered.", "content": body},
        500: {"description": "The model failed.", "content": body},
        503: {"description": "Too busy, or not ready.", "content": body, "headers": retry},
        504: {"description": "The deadline has passed; the work was dropped.", "content": body},
    }
