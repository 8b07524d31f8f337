"""The figures of docs/compile.md are the committed measurement, to the digits shown; its lines of Python run."""

import json
import re
from pathlib import Path

import torch

from shapleycam import Explainer

from ..helpers import network

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "compile.md").read_text(encoding="utf-8")


def row(case: dict) -> str:
    return (
        f"| {case['model']} | {case['engine']} | {case['batch']} | {case['explained_over_plain']:.3f} | "
        f"{case['cpu_explained_over_plain']:.3f} | {case['explained_over_eager']:.2f} |"
    )


def test_figures():
    [name] = set(re.findall(r"\(\.\./bench/results/(compiled-[\w.-]+\.json)\)", PAGE))
    found = json.loads((ROOT / "bench" / "results" / name).read_text())
    assert re.findall(r"^\| \w+ \| \w+ \| \d+ \|.*\|$", PAGE, re.MULTILINE) == [row(case) for case in found["cases"]]
    assert not any(case.get("commit", "").endswith("dirty") for case in found["cases"])


def test_lines():
    model, images = network(), torch.randn(3, 3, 8, 8)
    first, *_, last = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {"model": model, "images": images, "targets": torch.tensor([1, -1, 0])}
    exec(compile(first.replace('"layer3"', '"2"'), "compile.md", "exec"), names)
    torch.testing.assert_close(names["explained"].logits, model(images).detach())
    assert isinstance(names["explainer"], Explainer) and names["explained"].targets[[0, 2]].tolist() == [1, 0]
    exec(compile(last, "compile.md", "exec"), names)
    assert "cpu" in names["captured"].reason
