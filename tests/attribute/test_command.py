"""``shapleycam attribute`` as it is called: what it prints where, its exit status, and what it refuses."""

import json

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("PIL")
pytest.importorskip("typer")

from shapleycam.attribute import open_maps
from shapleycam.cli import attribute as command
from shapleycam.cli.app import run

from .driver import toy


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    monkeypatch.setattr(command, "load_classifier", toy)


def call(*arguments):
    return run(["attribute", *map(str, arguments), "--layer", "3", "--batch-size", "4"])


def test_a_run_and_the_same_again(folder, tmp_path, capsys):
    out = tmp_path / "maps"
    assert call(folder, "--out", out, "--shard-size", 8) == 3
    captured = capsys.readouterr()
    assert captured.out.startswith("21 of 23 pictures explained, 2 without a map; ") and str(out) in captured.out
    assert "undecodable: bee/01-text.jpg: is not an image" in captured.err
    assert call(folder, "--out", out, "--shard-size", 8, "--json") == 3
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["pictures"], found["explained"], found["failed"], found["resumed"]) == (23, 21, 2, 23)
    assert (found["parts"], found["parts_done"], found["interrupted"]) == (3, 3, False)
    assert found["statuses"] == {"ok": 21, "undecodable": 2} and "23 of them done before" in captured.err


def test_all_well_is_status_0(folder, tmp_path, capsys):
    for name in ("bee/01-text.jpg", "cat/cut.png"):
        (folder / name).unlink()
    assert call(folder, "--out", tmp_path / "maps") == 0
    assert call(f"{folder}/**/*.jpg", "--out", tmp_path / "jpegs", "--topk", 2, "--norms", "--no-gap") == 0
    maps = open_maps(tmp_path / "jpegs")
    row = maps[0]
    assert len(maps) == 10 and len(row.target) == len(row.hvp_ratio) == 2 and row.completeness_gap == [None] * 2
    assert call(folder, "--out", tmp_path / "label", "--target", "label") == 3  # no class is called unicorn
    assert call(folder, "--out", tmp_path / "six", "--target", "6") == 0
    assert open_maps(tmp_path / "six")[3].target == 6


def test_lines_where_there_is_no_terminal(folder, tmp_path, capsys, monkeypatch):
    from shapleycam.cli import progress

    monkeypatch.setattr(progress, "INTERVAL", 0)
    assert call(folder, "--out", tmp_path / "maps") == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("attribute: ")]
    assert lines and all("of 23 pictures, about " in line and "/s" in line for line in lines)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--method", "gradcma"], "gradcma"),
        (["--engine", "magic"], "Unknown engine 'magic'"),
        (["--scheduler", "slurm"], "Unknown scheduler 'slurm'"),
        (["--device", "cpu", "--devices", "cpu,cpu"], "exclude each other"),
        (["--devices", ","], "expected names"),
        (["--devices", "cpu,warp:1"], "warp:1"),
        (["--decoder", "magic"], "Unknown decoder"),
        (["--target", "uniqorn"], "no class 'uniqorn'"),
        (["--topk", "2", "--target", "1"], "exclude"),
        (["--image-column", "x"], "is no table, so it has no columns 'x'"),
    ],
)
def test_refusals(folder, tmp_path, capsys, extra, message):
    status = call(folder, "--out", tmp_path / "maps", *extra)
    captured = capsys.readouterr()
    assert status == 2 and message in " ".join(captured.err.split()) and captured.out == ""
    assert not list(tmp_path.glob("maps/part-*"))


def test_another_job_s_folder(folder, tmp_path, capsys):
    assert call(folder, "--out", tmp_path / "maps") == 3
    assert call(folder, "--out", tmp_path / "maps", "--utility", "logit") == 2
    assert "another utility (rest there, logit now): use --restart" in " ".join(capsys.readouterr().err.split())
    (folder / "cat" / "04.png").unlink()
    assert call(folder, "--out", tmp_path / "maps") == 2
    assert "has changed since" in " ".join(capsys.readouterr().err.split())
    assert call(folder, "--out", tmp_path / "maps", "--restart") == 3


def test_names_that_terminals_would_obey(folder, tmp_path, capsys):
    (folder / "a\x1b[2J[red]\n\u202eb.jpg").write_text("no")
    assert call(folder, "--out", tmp_path / "maps") == 3
    said = capsys.readouterr().err
    assert r"a\x1b[2J[red]\n\u202eb.jpg: is not an image" in said and "\x1b" not in said and "\u202e" not in said


def test_no_pictures(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert call(tmp_path / "empty", "--out", tmp_path / "maps") == 2
    assert call(tmp_path / "absent", "--out", tmp_path / "maps") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "holds no image files" in said and "no such folder or file" in said
