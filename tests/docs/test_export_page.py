"""The page about export: its lines run, and the networks' page is made from its results."""

import re
from pathlib import Path

import pytest
import torch

from ..helpers import network

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[2]


def test_the_lines_of_the_page_run(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    names: dict = {"model": network(curved=False), "images": torch.randn(2, 3, 16, 16)}
    for block in blocks:
        exec(compile(block, "export.md", "exec"), names)
    assert names["result"].maps.shape == names["heatmap"].shape == (2, 16, 16)
    torch.testing.assert_close(names["result"].maps, names["heatmap"], rtol=0, atol=1e-4)


def test_the_figures_of_small_numbers_are_the_results():
    import json

    rows = json.loads((ROOT / "bench" / "results" / "precision.json").read_text())["rows"]
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    for row in rows.values():
        rank = row["rank_correlation"]
        assert f"| {row['megabytes']:.1f} | {row['same_class']:.2f} | {rank['median']:.3f} | {rank['least']:.3f} |" in text


def test_the_page_of_networks_is_the_results():
    pytest.importorskip("timm")
    import json

    from bench.export import PAGE, RESULT
    from bench.export_page import page

    assert PAGE.read_text(encoding="utf-8") == page(json.loads(RESULT.read_text()))
