"""A server that the tests of one folder share, and images with their answers."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from .tiny import Known, Live, known, live


@pytest.fixture(scope="package")
def shared() -> Iterator[Live]:
    """A server with one tiny model and the default limits; tests leave it as it is."""
    with live() as found:
        yield found


@pytest.fixture
def client(shared: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared.url, timeout=20) as found:
        yield found


@pytest.fixture(scope="package")
def one() -> Known:
    return known(0)
