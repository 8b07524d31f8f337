"""Log lines of one JSON object each: what happened to which request, and never what was in it."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any, TextIO

from ..errors import InputError

LOGGER = logging.getLogger("shapleycam.serve")


class JsonLines(logging.Formatter):
    """A record as one line of JSON: time (UTC), level, logger, event, and the fields given as ``extra={"fields": {...}}``."""

    def format(self, record: logging.LogRecord) -> str:
        """See :class:`logging.Formatter`."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        content: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            content["error"] = f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
            content["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        return json.dumps(content, default=str)


def set_up(level: str = "info", stream: TextIO | None = None) -> None:
    """Have this process log as JSON lines, also uvicorn and Python's warnings; a program around a server has its own way."""
    if level not in ("debug", "info", "warning", "error"):
        raise InputError(f"The log level is debug, info, warning or error, got {level!r}.")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    logging.captureWarnings(True)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    LOGGER.setLevel(level.upper())
    logging.getLogger("uvicorn.error").setLevel(logging.INFO)


def log(event: str, error: BaseException | None = None, level: int | None = None, **fields: Any) -> None:
    """One line; with an error, its traceback, at level ERROR unless told otherwise."""
    if level is None:
        level = logging.INFO if error is None else logging.ERROR
    info = None if error is None else (type(error), error, error.__traceback__)
    LOGGER.log(
        level, event, exc_info=info, extra={"fields": {name: value for name, value in fields.items() if value is not None}}
    )
