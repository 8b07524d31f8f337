"""The outermost layer: what may come in, how long it may take, what goes out with every answer, and a log line for each."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .config import Limits
from .logs import log
from .metrics import Metrics
from .refusals import Disconnected, Refusal, Verdict, body_of, verdict

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

#: The page loads what the server itself has, and nothing else; pictures are also made in the browser.
_SECURITY = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
_PART = 65_536  # bytes of an answer that are sent at once: what the client does not take is not handed to the connection
_LINGER = 2.0  # seconds in which a refused client may still send, so that it reads the answer and not a reset


class Guard:
    """An ASGI layer around the application.

    The body is read here, whole and bounded, before anything else sees the request.

    Args:
        app: what it guards.
        limits: see there.
        token: what clients must send; None for no such thing.
        open_paths: answered without the token.
        metrics: is told of every request.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        limits: Limits,
        token: str | None,
        open_paths: Callable[[str], bool],
        metrics: Metrics,
    ) -> None:
        self._app, self._limits, self._token = app, limits, token
        self._open, self._metrics = open_paths, metrics
        self._held = 0  # bytes of bodies and answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, send, self._limits.answer_time)

        def hold(size: int) -> None:
            self._held += size
            exchange.held += size
            if self._held > self._limits.bodies:
                raise Refusal(503, "bodies", "The server is reading and answering too much at once.", retry_after="1")

        scope["shapleycam.hold"] = hold
        try:
            body = await self._read(exchange, receive, hold)
            await self._app(scope, _replay(body, receive), exchange.send)
        except Exception as error:
            if isinstance(error, Disconnected):
                exchange.status = 499
            if exchange.status != 499:  # Starlette makes another error of Disconnected where the answer has begun
                told = verdict(error)
                if told.kind in ("internal", "model"):
                    log("failed", error=error, request_id=exchange.id)
                if not exchange.status:
                    with contextlib.suppress(Disconnected):
                        await self._refuse(exchange, told, receive)
        finally:
            self._held -= exchange.held
            self._account(exchange)

    async def _read(self, exchange: _Exchange, receive: Receive, hold: Callable[[int], None]) -> bytes:
        """The whole body."""
        limits, headers = self._limits, exchange.headers
        if self._token is not None and not self._open(exchange.path):
            given = headers.get("authorization", "")
            kind, _, token = given.partition(" ")
            same = hmac.compare_digest(token.strip().encode(), self._token.encode())
            if kind.lower() != "bearer" or not same:
                raise Refusal(401, "unauthorized", "A valid bearer token is needed.", www_authenticate="Bearer")
        if headers.get("content-encoding", "identity") != "identity":
            raise Refusal(415, "encoding", "Compressed requests are not taken.")
        told = headers.get("content-length", "")
        if told.isdecimal() and int(told) > limits.body:
            raise self._too_large()
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(limits.body_time):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Disconnected("The client went away while it sent.")
                    part = message.get("body", b"")
                    exchange.received += len(part)
                    if exchange.received > limits.body:
                        raise self._too_large()
                    hold(len(part))
                    parts.append(part)
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise Refusal(408, "slow_body", f"The body did not arrive within {limits.body_time:g} s.") from None
        return b"".join(parts)

    def _too_large(self) -> Refusal:
        return Refusal(413, "body", f"The body is larger than the {self._limits.body} bytes that are taken.")

    async def _refuse(self, exchange: _Exchange, told: Verdict, receive: Receive) -> None:
        exchange.kind = told.kind
        body = body_of(exchange.path, told, exchange.id)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *((name.encode(), value.encode()) for name, value in told.headers.items()),
        ]
        early = told.kind in ("body", "bodies", "slow_body", "unauthorized", "encoding")
        if early:  # the rest of the body may still come, and the connection is of no more use
            headers.append((b"connection", b"close"))
        await exchange.send({"type": "http.response.start", "status": told.status, "headers": headers})
        await exchange.send({"type": "http.response.body", "body": body, "more_body": early})
        if early:
            if told.kind != "slow_body":
                await self._linger(receive)
            await exchange.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _linger(self, receive: Receive) -> None:
        left = 4 * self._limits.body
        try:
            async with asyncio.timeout(_LINGER):
                while left > 0:
                    message = await receive()
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        break
                    left -= len(message.get("body", b""))
        except TimeoutError:
            pass

    def _account(self, exchange: _Exchange) -> None:
        taken = time.perf_counter() - exchange.began
        route = getattr(exchange.scope.get("route"), "path", "none")
        method = exchange.scope["method"] if exchange.scope["method"] in _METHODS else "OTHER"
        self._metrics.requests.labels(route, method, str(exchange.status)).inc()
        self._metrics.seconds.labels(route).observe(taken)
        kind = exchange.kind or exchange.scope.get("shapleycam.kind", "")
        if exchange.status == 499:
            kind = "disconnected"
        if kind:
            self._metrics.errors.labels(kind).inc()
        if exchange.path in ("/healthz", "/readyz", "/metrics", "/ping") and exchange.status == 200:
            return  # every few seconds, for ever
        log(
            "request",
            request_id=exchange.id,
            method=method,
            path=exchange.path[:200],
            status=exchange.status,
            ms=round(taken * 1e3, 1),
            bytes_in=exchange.received,
            kind=kind or None,
        )


_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, send: Send, patience: float) -> None:
        self.scope, self._send, self._patience = scope, send, patience
        self._until: float | None = None
        self.began = time.perf_counter()
        self.path: str = scope["path"]
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = self.headers.get("x-request-id", "")
        self.id = given if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else uuid.uuid4().hex
        scope["shapleycam.request_id"] = self.id
        self.status = 0
        self.received = self.held = 0  # bytes: of the body so far, and of the budget
        self.kind = ""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            present = {name.lower() for name, _ in message["headers"]}
            more = {**_SECURITY, "x-request-id": self.id, "cache-control": "no-store"}
            message["headers"] = [
                *message["headers"],
                *((name.encode(), value.encode()) for name, value in more.items() if name.encode() not in present),
            ]
        if self._until is None:
            self._until = asyncio.get_running_loop().time() + self._patience
        try:
            async with asyncio.timeout_at(self._until):
                body = memoryview(message.get("body", b""))
                while body:
                    await self._send({**message, "body": body[:_PART], "more_body": True})
                    body = body[_PART:]
                    await asyncio.sleep(0)  # for others, and to learn that the client is gone
                # An empty part is the last, as each waits until the one before it is handed to the system.
                await self._send({**message, "body": b""} if "body" in message else message)
        except TimeoutError:
            self.status = 499
            self.scope.get("shapleycam.abort", lambda: None)()  # or the connection would wait for ever to be rid of the rest
            raise Disconnected("The client did not take its answer in time.") from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body once, and then what comes, which is the client going away."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
