"""The pages of bench.growth, bench.overhead and bench.peers are made of the committed results."""

import json

import pytest

pytest.importorskip("timm")

from bench import growth, peers, performance_page
from bench.peers_page import page, summary

RESULTS = growth.ROOT / "bench" / "results"


def test_pages_are_made_of_the_committed_results():
    measured = (json.loads((RESULTS / name).read_text()) for name in ("growth-cpu.json", "overhead.json"))
    assert performance_page.PAGE.read_text() == performance_page.page(*measured)
    assert peers.PAGE.read_text() == page(json.loads((RESULTS / "peers-cpu.json").read_text()))


def test_every_engine_grew_along_every_axis():
    rows = json.loads((RESULTS / "growth-cpu.json").read_text())["rows"]
    assert {(row["engine"], row["axis"]) for row in rows} == {(e, a) for e in growth.ENGINES for a in growth.AXES}


def test_where_we_lose_is_said():
    def row(over_ours):
        return {"rival": "captum LayerGradCam", "network": "a", "batch": 1, "over_ours": over_ours}

    assert "Ours is slower in 1 of them" in summary([row(0.9), row(1.5)])
    assert "Ours is slower in none of them" in summary([row(1.1)])
