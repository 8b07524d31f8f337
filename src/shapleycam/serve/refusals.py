"""Every way in which a request ends without an answer: its status, its kind for metrics and clients, and its words."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..errors import DerivativeError, ShapleyCamError
from .batching import DeadlinePassed, OutOfMemory, Overloaded, Stopped
from .pictures import BadImage

_MOST_BRACKETS = 1_000_000  # 16 instances of [224, 224, 3] have 0.8 million


class Refusal(ShapleyCamError):
    """A request that the server does not serve.

    Attributes:
        status, kind: of the answer.
        headers: it also has.
    """

    def __init__(self, status: int, kind: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def check_instances(count: int, most: int) -> None:
    """Refuse a request of more images than are taken, before anything is made of them.

    Raises:
        Refusal: 413.
    """
    if count > most:
        raise Refusal(413, "instances", f"At most {most} images are taken in one request, got {count}.")


def read_json(body: bytes) -> Any:
    """A request's JSON.

    Raises:
        Refusal: 400, it is none; 413, it has too many lists and objects.
    """
    # Python reads JSON in one go, in which no other thread runs, the event loop neither, and these take longest.
    if body.count(b"[") + body.count(b"{") > _MOST_BRACKETS:
        raise Refusal(
            413, "json", f"At most {_MOST_BRACKETS} lists and objects are taken in JSON: send pictures, or binary tensors."
        )
    try:
        return json.loads(body)
    except ValueError as error:
        raise Refusal(400, "json", "The body is no JSON, or does not begin with it.") from error


class Disconnected(ShapleyCamError):
    """The client went away; nobody reads an answer."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an error becomes in HTTP."""

    status: int
    kind: str
    message: str
    headers: dict[str, str]


_IMAGES = {
    "empty": (400, "empty_image"),
    "format": (415, "format"),
    "too_large": (413, "pixels"),
    "scans": (413, "scans"),
    "damaged": (422, "damaged"),
}


def verdict(error: BaseException) -> Verdict:
    """The answer to an error; what the server did not expect says nothing about its inside."""
    message = str(error)
    if isinstance(error, Refusal):
        return Verdict(error.status, error.kind, message, error.headers)
    if isinstance(error, BadImage):
        return Verdict(*_IMAGES[error.reason], message, {})
    if isinstance(error, Overloaded):
        return Verdict(503, "overloaded", message, {"retry-after": str(error.retry_after)})
    if isinstance(error, Stopped):
        return Verdict(503, "not_ready", message, {"retry-after": "5"})
    if isinstance(error, DeadlinePassed):
        return Verdict(504, "deadline", message, {})
    if isinstance(error, OutOfMemory):
        return Verdict(503, "out_of_memory", "One image alone does not fit the device's memory.", {})
    # The server's own question was answered when it started: for derivatives that a model lacks, the client has asked.
    if isinstance(error, ShapleyCamError) and isinstance(error, (ValueError, DerivativeError)):
        return Verdict(422, "invalid", message, {})
    if isinstance(error, ShapleyCamError):
        return Verdict(500, "model", message, {})
    return Verdict(500, "internal", "The model failed on this request; the server's log says why.", {})


def body_of(path: str, told: Verdict, request: str) -> bytes:
    """An error in the words of the protocol that the path belongs to."""
    if path.startswith(("/v1/models", "/v2")):
        content: object = {"error": told.message}
    elif path.startswith(("/ping", "/predictions", "/explanations")):
        content = {"code": told.status, "type": told.kind, "message": told.message}
    else:
        content = {"error": {"kind": told.kind, "message": told.message, "request_id": request}}
    return json.dumps(content).encode()
