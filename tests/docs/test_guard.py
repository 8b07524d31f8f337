"""The committed counts of bench.guard cover what it counts, and a count that moved is told."""

import copy
import json

import pytest

pytest.importorskip("torch")

from bench import guard

COMMITTED = json.loads(guard.RESULT.read_text())


def test_everything_is_committed():
    assert set(COMMITTED["kernels"]) == set(guard.KERNELS) and min(COMMITTED["kernels"].values()) > 1000
    assert set(COMMITTED["calls"]) == set(guard.CALLS)
    assert all(set(row) == {"bytecodes", "operators", "allocations"} for row in COMMITTED["calls"].values())
    assert guard.moved(COMMITTED, COMMITTED) == []


def test_what_moved_is_told():
    found = copy.deepcopy(COMMITTED)
    found["kernels"]["overlay"] = int(found["kernels"]["overlay"] * 1.2)
    found["calls"]["closed_form"]["bytecodes"] = int(found["calls"]["closed_form"]["bytecodes"] * 0.8)
    found["calls"]["new"] = {"operators": 7}
    lines = guard.moved(COMMITTED, found)
    assert len(lines) == 3
    assert "closed_form: bytecodes fell" in lines[0] and "-20%" in lines[0]
    assert lines[1] == "new: operators: 7, and no count is committed"
    assert "overlay: instructions grew" in lines[2] and "+20%" in lines[2] and "bound is 10%" in lines[2]


def test_bytecodes_are_the_packages_own():
    assert guard.bytecodes(lambda: sum(range(1000))) == 0
    guard.shapleycam.backends()  # whatever is done once
    one = guard.bytecodes(lambda: guard.shapleycam.backends())
    assert one > 0 and guard.bytecodes(lambda: (guard.shapleycam.backends(), guard.shapleycam.backends())) == 2 * one
