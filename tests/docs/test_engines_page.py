"""The page on the engines is the committed result of its study, and its sentences hold in it."""

import json

import pytest

pytest.importorskip("numpy")
pytest.importorskip("skimage")

import numpy as np
from bench import engines

RESULT = json.loads(engines.RESULT.read_text())


def test_the_page_is_made_of_the_committed_result():
    assert engines.PAGE.read_text() == engines.page(RESULT)


def test_another_result_would_make_another_page():
    changed = json.loads(json.dumps(RESULT))
    for image in changed["results"][0]["parts"]:
        image[0] = 0.9
    assert engines.page(changed) != engines.page(RESULT)


def test_the_comparisons_are_those_of_the_committed_parts():
    again = engines.comparisons(RESULT["results"])
    assert len(again) == len(RESULT["comparisons"])
    for mine, theirs in zip(again, RESULT["comparisons"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-7)


def test_every_row_is_there():
    count = len(RESULT["conditions"]["photographs"])
    assert len({picture["view"] for picture in RESULT["conditions"]["photographs"]}) == count
    for layer in engines.LAYERS:
        for utility in engines.UTILITIES:
            found = [(r["engine"], r["method"]) for r in RESULT["results"] if (r["layer"], r["utility"]) == (layer, utility)]
            assert sorted(found) == sorted((e, m) for e, methods in engines.rows_of(layer).items() for m in methods)
    for row in RESULT["results"]:
        parts = np.array(row["parts"])
        assert parts.shape == (count, 5)
        assert (parts >= 0).all() and (parts <= 1).all()


def test_the_second_order_moves_nothing_from_itself_and_the_path_does():
    for row in RESULT["results"]:
        assert (max(row["moved"]) == 0) == (row["engine"] == "expansion" and row["method"] in engines.FIRST)


def test_the_sentences_hold():
    text = engines.reading(RESULT)
    assert text.startswith("**There is no general yes.**")
    for against in ("second order", "first order"):
        found = engines.of_path(RESULT, against)
        up, down = sum(c["low"] > 0 for c in found), sum(c["high"] < 0 for c in found)
        assert f"higher in {up}, lower in {down}, not distinguishable in {len(found) - up - down} of {len(found)}" in text
    assert not any(c["low"] > 0 for c in engines.of_path(RESULT, "first order"))


def test_adcc_and_its_interval_by_hand():
    def row(engine, method, parts):
        place = {"layer": "auto", "utility": "rest", "family": "shapleycam"}
        return {**place, "engine": engine, "method": method, "parts": parts}

    # AD, Coh, Com: 3 / (1/0.5 + 1/0.5 + 1/0.5) = 0.5 for the means, though no image has them all
    worse = [[0.4, 0.4, 0.6, 0, 0], [0.6, 0.6, 0.4, 0, 0]]
    better = [[0.25, 0.75, 0.25, 0, 0]] * 2
    assert engines.scores(np.array(worse)) == pytest.approx(0.5)
    rows = [
        row("expansion", "gradcam", worse),
        row("expansion", "shapleycam", worse),
        row("quadrature 8", "shapleycam", better),
    ]
    found = {(c["engine"], c["method"], c["against"]): c for c in engines.comparisons(rows)}
    assert len(found) == 4
    same = found["expansion", "shapleycam", "first order"]
    assert (same["difference"], same["low"], same["high"]) == (0, 0, 0)
    assert engines.verdict(same) == "not distinguishable"
    mine = found["quadrature 8", "shapleycam", "second order"]
    assert mine["difference"] == pytest.approx(0.25)
    # A quarter of the resamples has the first image twice, a quarter the second: 1 - 0.6, 0.4, 0.4 or 0.4, 0.6, 0.6 remain.
    twice = [0.75 - 3 / (1 / 0.4 + 1 / 0.4 + 1 / 0.6), 0.75 - 3 / (1 / 0.6 + 1 / 0.6 + 1 / 0.4)]
    assert (mine["low"], mine["high"]) == pytest.approx((min(twice), max(twice)))
    assert engines.verdict(mine) == "higher"
