"""The page at /."""

from __future__ import annotations

from typing import Any


def add_page(app: Any, server: Any) -> None:
    """Add the page's routes."""
