"""The protocols that clients speak, each a file, all over :class:`shapleycam.serve.server.Server`."""

from __future__ import annotations

from typing import Any


def add_all(app: Any, server: Any) -> None:
    """Add every protocol's routes."""
    from . import explain, kserve_v1, open_inference, torchserve

    for protocol in (explain, kserve_v1, open_inference, torchserve):
        protocol.add(app, server)
