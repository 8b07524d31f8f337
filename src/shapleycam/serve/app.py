"""The application: the protocols over the served models, health, metrics, the page, and the guard around all of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from .._version import __version__
from ..errors import ShapleyCamError
from ..optional import need
from .guard import Guard
from .logs import log
from .refusals import Disconnected, Refusal, body_of, verdict
from .server import Server

need("fastapi", "serve")
need("python_multipart", "serve")

from fastapi import FastAPI, Request, Response  # noqa: E402 - the line above says which extra is missing
from fastapi.exceptions import RequestValidationError  # noqa: E402
from fastapi.responses import JSONResponse  # noqa: E402
from starlette.exceptions import HTTPException  # noqa: E402


def create_app(server: Server, *, manage: bool = True) -> FastAPI:
    """The FastAPI application.

    Args:
        server: the models.
        manage: start the server's models when the application starts and stop them when it ends; False where the program
            around it does.
    """
    from . import protocols

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if manage:
            server.start()
        yield
        if manage:
            await asyncio.to_thread(server.stop, server.config.grace)

    app = FastAPI(
        title="shapleycam",
        version=__version__,
        description="Attribution maps of image classifiers.",
        lifespan=lifespan,
        redirect_slashes=False,  # to wherever the client's Host header says
        docs_url=None,
        redoc_url=None,
        openapi_tags=[
            {"name": "explain", "description": "This server's own protocol."},
            {"name": "kserve", "description": "KServe V1."},
            {"name": "open inference", "description": "Open Inference Protocol, V2."},
            {"name": "torchserve", "description": "TorchServe's inference API."},
            {"name": "operation", "description": "Health and metrics."},
        ],
    )
    app.state.server = server

    def told(request: Request, error: BaseException) -> Response:
        one = verdict(error)
        request.scope["shapleycam.kind"] = one.kind
        if one.kind in ("internal", "model"):
            log("failed", error=error, request_id=request.scope["shapleycam.request_id"])
        content = body_of(request.url.path, one, request.scope["shapleycam.request_id"])
        return Response(content, one.status, {**one.headers}, "application/json")

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        kind = {404: "not_found", 405: "method"}.get(error.status_code, "http")
        return told(request, Refusal(error.status_code, kind, str(error.detail), **dict(error.headers or {})))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return told(request, Refusal(422, "invalid", f"{where}: {first['msg']}"))

    @app.exception_handler(ShapleyCamError)
    async def known(request: Request, error: ShapleyCamError) -> Response:
        if isinstance(error, Disconnected):
            raise error
        return told(request, error)

    protocols.add_all(app, server)
    tags: list[Any] = ["operation"]

    @app.get("/healthz", summary="Whether the process should live", tags=tags, responses=_HEALTH)
    async def healthz() -> Response:
        return _state(server.healthy())

    @app.get("/readyz", summary="Whether requests are wanted", tags=tags, responses=_HEALTH)
    async def readyz() -> Response:
        return _state(server.ready(), {name: one.state for name, one in server.services.items()})

    @app.get("/metrics", summary="Prometheus metrics", tags=tags, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        content, kind = server.metrics.text()
        return Response(content, headers={"content-type": kind})

    def _state(good: bool, models: Mapping[str, str] | None = None) -> Response:
        content: dict[str, Any] = {"status": "ok" if good else "draining" if server.draining else "not ready"}
        if models is not None:
            content["models"] = models
        return JSONResponse(content, 200 if good else 503)

    if server.config.page:
        from .page import add_page

        add_page(app, server)

    def is_open(path: str) -> bool:
        return path in PROBES or path == "/" or path.startswith("/page/") or (path == "/metrics" and server.config.open_metrics)

    for route in [one for one in app.routes if getattr(one, "path", "") in PROBES]:  # load balancers ask with HEAD
        app.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)  # type: ignore[attr-defined]

    app.add_middleware(
        Guard, limits=server.config.limits, token=server.config.token, open_paths=is_open, metrics=server.metrics
    )
    return app


#: Answered without a token, and to HEAD.
PROBES = ("/healthz", "/readyz", "/ping", "/v2/health/live", "/v2/health/ready")
_HEALTH: dict[int | str, dict[str, Any]] = {
    200: {"description": "Yes", "content": {"application/json": {"example": {"status": "ok"}}}},
    503: {"description": "No", "content": {"application/json": {"example": {"status": "not ready"}}}},
}
