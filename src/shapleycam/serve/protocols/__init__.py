"""The protocols that clients speak, each a file, all over :class:`shapleycam.serve.app.Server`."""

from __future__ import annotations

from typing import Any


def add_all(app: Any, server: Any) -> None:
    """Add every protocol's routes."""
    from . import explain

    explain.add(app, server)
