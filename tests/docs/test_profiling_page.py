"""The lines of docs/profiling.md run, and its options are those of the command."""

import re
from pathlib import Path

import torch

from ..helpers import toy

TEXT = (Path(__file__).parents[2] / "docs" / "profiling.md").read_text(encoding="utf-8")


def test_the_lines_run(tmp_path, monkeypatch, capsys):
    [block] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "profiling.md", "exec"), {"model": toy(), "images": torch.randn(2, 3, 16, 16)})
    said = capsys.readouterr().out
    assert "weighted reduce" in said and (tmp_path / "before.json").stat().st_size > 0
    assert re.search(r"2 explanation (SAME|UNCLEAR) 1.0 ", said)


def test_the_options_exist():
    source = (Path(__file__).parents[2] / "src" / "shapleycam" / "cli" / "app.py").read_text(encoding="utf-8")
    command = source[source.index("def profile(") : source.index("from .profile import")]
    named = set(re.findall(r"`--(\w+)", TEXT))
    assert len(named) > 8
    for name in named:
        assert re.search(rf"\b{name}: ", command), name
