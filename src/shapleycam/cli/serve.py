"""``shapleycam serve``: the options of the command, or its file, as the server's configuration."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import InputError
from ..optional import need
from ..serve.config import ModelConfig, ServerConfig, check_token, read_config, read_token


def configuration(
    config: Path | None,
    model: dict[str, Any],
    host: str | None,
    port: int | None,
    token_file: Path | None,
) -> ServerConfig:
    """What to serve.

    Args:
        config: the file; None for one model.
        model: the options of one model that were given; others are absent.
        host, port, token_file: None where they were not given.

    Raises:
        InputError: options of one model beside a file, or whatever is wrong in them.
    """
    if config is not None and model:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in model)
        raise InputError(f"{names} and --config exclude each other: models are named in the file.")
    if "file" in model:
        model = {"runtime": "onnx", **model}
    told = read_config(config) if config is not None else ServerConfig(models={"default": ModelConfig(**model)})
    if host is not None:
        told = replace(told, host=host)
    if port is not None:
        told = replace(told, port=port)
    if token_file is not None:
        told = replace(told, token=read_token(token_file))
    elif told.token is None and "SHAPLEYCAM_TOKEN" in os.environ:  # an empty one is a mistake, and not the wish for none
        try:
            told = replace(told, token=check_token(os.environ["SHAPLEYCAM_TOKEN"]))
        except InputError as error:
            raise InputError(f"SHAPLEYCAM_TOKEN is set, and is none: {error} Unset it to serve without one.") from error
    return told


def run_serve(told: ServerConfig, log_level: str, notes: Console) -> int:
    """Serve; returns the exit status, but ends the process itself where some thread of it does not end.

    Raises:
        ShapleyCamError: the extra is missing, a model cannot be loaded, or the address cannot be had.
    """
    for module in ("fastapi", "uvicorn", "httptools", "prometheus_client", "python_multipart"):
        need(module, "serve")
    from ..serve.logs import set_up
    from ..serve.run import serve

    if told.host not in ("127.0.0.1", "::1", "localhost") and told.token is None:
        notes.print(f"[yellow]warning:[/] {told.host} can be reached by others, and no token is asked of them (--token-file).")
    if notes.is_terminal:
        notes.print(f"shapleycam serves {', '.join(told.models)} at http://{told.host}:{told.port}/ — Ctrl-C ends it")
    set_up(log_level)
    status = serve(told)
    if status:  # a decoder may hang, and Python would wait for it
        logging.shutdown()
        os._exit(status)
    return status
