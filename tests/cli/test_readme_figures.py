"""The README's benchmark table is the committed benchmark, to the digits shown."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_is_the_committed_file():
    readme = (ROOT / "README.md").read_text()
    [name] = set(re.findall(r"\(bench/results/(explain-[\w.-]+\.json)\)", readme))
    cases = json.loads((ROOT / "bench" / "results" / name).read_text())["cases"]
    for case in cases:
        row = (
            f"| {case['model']} | {case['layout']} | {case['batch']} | {case['ours_over_forward']:.3f} | "
            f"{case['autograd_over_forward']:.3f} | {case['grad_cam_over_forward']:.2f} | "
            f"{case['grad_cam_over_ours']:.2f} | {case['peak_over_forward']:.2f} |"
        )
        assert row in readme, row
