"""The parity report: a network of it computed again, and docs/parity.md tied to bench/results/parity.json."""

import json
import re

import pytest
from bench import parity, parity_page

for name in ("torchvision", "timm", "pytorch_grad_cam", "torchcam"):
    pytest.importorskip(name)

pytestmark = pytest.mark.filterwarnings("ignore::shapleycam.ShapleyCamWarning")


@pytest.fixture(scope="module")
def report():
    return json.loads(parity.RESULT.read_text())


@pytest.mark.slow
def test_one_network_again(report):
    """The figures are not those of one machine: computed here, they are within the tolerances too."""
    rows = list(parity.rows_of("mobilenet_v2", utilities=("rest", "logit")))
    assert [row["utility"] for row in rows] == ["rest"] * 11 + ["logit"] * 11
    assert [row["method"] for row in rows] == list(parity_page.METHOD_ROWS) * 2
    for row in rows:
        assert row["deviation"] > 0.01, row
        assert row.get("formula", 0) < 1e-9, row
        assert row.get("grad_cam", {"ours": 0})["ours"] < parity_page.TOLERANCE["float64"], row
        if row["method"] == "gradcam++":
            # torch-cam does not divide: its map is the undivided one, ours is the paper's.
            assert row["torch_cam"]["ours"] > 1e-3 and row["torch_cam"]["variant_difference"] < 1e-9, row
        elif "torch_cam" in row:
            assert row["torch_cam"]["ours"] < parity_page.TOLERANCE["float64"], row


def test_the_page_is_the_results(report):
    assert parity.TABLE.read_text(encoding="utf-8") == parity_page.page(report)


def test_the_results_are_complete(report):
    cells = {(row["network"], row["method"], row["utility"]) for row in report["cells"]}
    assert len(cells) == len(report["cells"]) == 12 * 11 * 4
    assert {row["network"] for row in report["cells"]} == set(parity.NETWORKS)
    for row in report["cells"]:
        assert ("grad_cam" in row) == (row["method"] in parity_page.GRAD_CAM), row
        assert ("torch_cam" in row) == (row["method"] in parity_page.TORCH_CAM), row


def test_every_difference_is_explained(report):
    """Ours is the formula's, everywhere; where a peer's is not, a change of the formula gives it."""
    for row in report["cells"]:
        bound = report["tolerance"][row["dtype"]]
        assert row.get("formula", 0) <= bound, row
        for peer in ("grad_cam", "torch_cam"):
            if peer in row and not row[peer]["ours"] <= bound:
                assert row[peer]["variant_difference"] <= bound, row


def test_the_page_shows_no_machine(report):
    text = parity.TABLE.read_text(encoding="utf-8")
    assert not re.search(r"/(opt|root|home|work)/", text)
