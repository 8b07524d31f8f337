"""What docs/data_sets.md says: its example runs, its figures are those of the committed result."""

import json
import re
from pathlib import Path

import pytest
from bench.attribute_loops import BEGIN, END, section

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data_sets.md").read_text(encoding="utf-8")
SCALE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    for module in ("pyarrow", "PIL", "efficientnet_lite_pytorch", "skimage"):
        pytest.importorskip(module)
    from PIL import Image

    from shapleycam.cli.demo import photographs

    (tmp_path / "photos").mkdir()
    for file in photographs()[:2]:
        with Image.open(file) as photo:
            photo.convert("RGB").save(tmp_path / "photos" / f"{file.stem}.png")
    monkeypatch.chdir(tmp_path)
    [block] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict = {}
    exec(compile(block, "data_sets.md", "exec"), names)
    assert capsys.readouterr().out.splitlines()[0] == "2 0 {'ok': 2}"
    assert names["heat"].shape == (224, 224) and names["over"].shape == (224, 224, 3) and "torch.Size([7, 7])" not in PAGE


def test_the_statuses_and_columns_are_those_of_the_code():
    pytest.importorskip("pyarrow")
    from shapleycam.attribute.part import schema

    for name in schema((7, 7), 1, {}).names:
        assert f"`{name}`" in PAGE, name
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "src/shapleycam/attribute").glob("*.py"))
    for status in [*re.findall(r'Failure\("(.*?)"', sources), "unreadable", "undecodable", "not finite"]:
        assert f"`{status}`" in PAGE, status


def test_the_figures_are_those_of_the_result():
    [name] = set(re.findall(r"bench/results/(attribute-cpu-[\w-]+\.json)", PAGE))
    result = json.loads((ROOT / "bench" / "results" / name).read_text(encoding="utf-8"))
    for row in result["price"].values():
        assert f"{row['of_plain']:.3f}" in PAGE
    assert f"{BEGIN}{section(result)}{END}" in PAGE
    for row in result["decoders"].values():
        assert f"{row['times']:.2f}" in PAGE
    large = json.loads((ROOT / "bench" / "results" / "large-pictures-cpu.json").read_text(encoding="utf-8"))["decoders"]
    for name, row in large.items():
        figures = f"{row['times_torchcodec']:.2f} | {row['levels_mean']:.3f} ({row['levels_most']})"
        assert f"| {name} | {figures} | {row['maps_off_median']:.3f} ({row['maps_off']:.3f}) |" in PAGE
    assert f"{100 * result['memory']['growth']:.1f} %" in PAGE
    assert f"{result['files']['random_map_ms']:.1f} ms" in PAGE
    assert f"{result['files']['bytes_per_row']:.0f} bytes" in SCALE
