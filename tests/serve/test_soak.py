"""The soak test, in short; ``make soak`` takes a minute and 128 clients."""

from __future__ import annotations

from pathlib import Path

import pytest

from .soak import soak


@pytest.mark.slow
def test_more_clients_than_can_be_served(tmp_path: Path) -> None:
    told = soak(4.0, 96, tmp_path)
    assert told["outcomes"].keys() >= {"right", "refused", "bad image"}
