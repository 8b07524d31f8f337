"""The study's page is the committed result of the study, and its sentences hold in it."""

import json

import pytest

pytest.importorskip("timm")
pytest.importorskip("matplotlib")

from bench import agreement

RESULT = json.loads(agreement.RESULT.read_text())


def middle(value, **where):
    [row] = [row for row in RESULT["results"] if all(row[key] == wanted for key, wanted in where.items())]
    return agreement.median(row[value])


def test_the_page_is_made_of_the_committed_result():
    assert agreement.PAGE.read_text() == agreement.page(RESULT)
    assert agreement.PICTURE.is_file()


def test_another_result_would_make_another_page():
    changed = json.loads(json.dumps(RESULT))
    changed["results"][-1]["pearson"] = [0.123456] * 5
    assert agreement.page(changed) != agreement.page(RESULT)


def errors(layer, utility, key="error", players="cells", ways=("first order", "second order", "midpoint")):
    return [middle(key, layer=layer, utility=utility, way=way, players=players) for way in ways]


PATH = ("midpoint", "2 nodes", "4 nodes", "8 nodes")


def test_the_sentences_hold():
    for players in ("cells", "positions", "channels"):
        first, second, midpoint = errors("features", "rest", players=players)
        assert midpoint < second < first
        assert max(errors("features", "logit", players=players, ways=agreement.SHOWN)) < 5e-4
        first, second, _ = errors("features", "probability", players=players)
        assert second > first
    one, two, four, eight = errors("features", "rest", ways=PATH)
    assert two < one / 2 and four < two / 2 and eight <= four
    assert min(errors("features", "rest", "pearson", ways=agreement.SHOWN)) > 0.99
    one, two, four, eight = errors("features", "probability", ways=PATH)
    assert two < one / 2 and four < two / 2 and eight > 0.9 * four
    for utility, factor in (("rest", 1.5), ("probability", 5)):
        first, second, _ = errors("features.16", utility)
        assert second > factor * first
    first, second, midpoint = errors("features.16", "logit")
    assert second == pytest.approx(first, rel=1e-4)
    assert midpoint < first
    assert min(errors("features.13", "rest")) > 1
    first, second, *path = errors("features.13", "rest", "pearson", ways=agreement.SHOWN)
    assert max(first, second) < 0.5 < 0.8 < min(path)
    one, two, four, eight = errors("features.13", "rest", ways=PATH)
    assert eight > four / 2 > two / 4, "slowly, and not geometrically"
    first, second, midpoint = errors("features.13", "probability")
    assert midpoint > max(first, second)
    for utility in agreement.UTILITIES:
        first, second, midpoint, two = errors("blocks.5", utility, ways=agreement.SHOWN[:4])
        assert two < midpoint < second < first
    norm = RESULT["layer_norm"]
    assert max(norm["left"][way] for way in agreement.SHOWN[:5]) < 2e-4
    assert min(norm["values_over_total"]) > 0.1


def test_every_comparison_is_there_and_estimates_are_marked():
    rows = RESULT["results"]
    assert len(rows) == (3 + 2 + 1 + 2) * 4 * 8
    assert len({tuple(row[key] for key in ("network", "layer", "players", "utility", "way")) for row in rows}) == len(rows)
    for row in rows:
        assert len(row["error"]) == len(RESULT["conditions"]["photographs"]) == 5
        assert (max(row["noise"]) == 0) == (row["players"] != "positions")


def test_wins_are_counted_by_hand():
    def row(way, error, network="a"):
        return {"network": network, "layer": "l", "players": "cells", "utility": "rest", "way": way, "error": error}

    names = [*agreement.UTILITIES]
    made = [
        {**row(way, error), "utility": name}
        for name in names
        for way, error in (
            ("first order", [1.0, 0.5, 1e-7]),
            ("second order", [0.5, 0.496, 1e-8]),
            ("midpoint", [2.0, 0.1, 0.0]),
        )
    ]
    made.append(row("first order", [9.0], "random"))
    found = agreement.wins({"conditions": {"networks": {"a": [], "random": []}}, "results": made})
    assert found["rest", "second order", "first order"] == (1, 3)  # 0.496 against 0.5 is within a percent, 1e-7 is rounding
    assert found["rest", "midpoint", "first order"] == (1, 3)
