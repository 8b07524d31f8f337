"""The README's benchmark tables are the committed benchmarks, to the digits shown."""

import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_explanations():
    readme = (ROOT / "README.md").read_text()
    [name] = set(re.findall(r"\(bench/results/(explain-[\w.-]+\.json)\)", readme))
    cases = json.loads((ROOT / "bench" / "results" / name).read_text())["cases"]
    for case in cases:
        row = (
            f"| {case['model']} | {case['layout']} | {case['batch']} | {case['ours_over_forward']:.3f} | "
            f"{case['quadrature_over_ours']:.3f} | {case['autograd_over_forward']:.3f} | {case['grad_cam_over_forward']:.2f} | "
            f"{case['grad_cam_over_ours']:.2f} | {case['peak_over_forward']:.2f} |"
        )
        assert row in readme, row


def test_peers():
    readme = (ROOT / "README.md").read_text()
    rows = json.loads((ROOT / "bench" / "results" / "peers-cpu.json").read_text())["rows"]
    for package, name in (("grad-cam", "pytorch-grad-cam"), ("torchcam", "torch-cam"), ("captum", "captum")):
        ratios = [row["over_ours"] for row in rows if row["rival"].startswith(package) and "failed" not in row]
        assert f"{name} {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" in readme


def test_evaluation():
    readme = (ROOT / "README.md").read_text()
    [name] = set(re.findall(r"\(bench/results/(metrics-cpu-[\w.-]+\.json)\)", readme))
    case = json.loads((ROOT / "bench" / "results" / name).read_text())["case"]
    assert case["freed_memory_is_kept"]
    one, eleven = case["authors_over_ours"], case["authors_eleven_over_ours_eleven"]
    assert f"{one:.1f} times as fast as the authors' loop for one method, and {eleven:.1f} times for all eleven" in readme


def test_operators():
    readme = (ROOT / "README.md").read_text()
    [name] = set(re.findall(r"\(bench/results/(ops-cpu-[\w.-]+\.json)\)", readme))
    found = json.loads((ROOT / "bench" / "results" / name).read_text())
    assert found["cases_left_out"] == 0 and not found["conditions"]["commit"].endswith("dirty")
    rows = {row["case"]: row for row in found["results"]}
    shown = re.findall(r"^\| (\w+ \d+x\d+x\d+ \w+ \w+) \|(.*)\|$", readme, re.MULTILINE)
    assert len(shown) >= 10
    for case, figures in shown:
        row = {key: value["native"] for key, value in rows[case].items() if isinstance(value, dict) and "native" in value}
        assert figures.split(" | ") == [
            f" {row['seconds'] * 1e6:.0f}",
            f"{row['of_copy']:.0%}",
            f"{row['over_eager']:.1f}",
            f"{row['over_compile']:.2f} ",
        ]
    large = [row for row in found["results"] if row["bytes"] > 50 << 20]
    met = [
        sum(row[column]["native"] >= aim for row in large)
        for column, aim in (("of_copy", 0.85), ("over_eager", 15), ("over_compile", 1.5))
    ]
    said = re.search(
        r"Of the (\d+) cases that do not fit the cache, (\d+) reach .* (\d+) reach .* and (\d+) that", readme, re.S
    )
    assert said is not None and [int(figure) for figure in said.groups()] == [len(large), *met]
