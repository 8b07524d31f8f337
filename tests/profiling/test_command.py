"""``shapleycam profile``, its picture and ``--compare``."""

import json

import pytest

pytest.importorskip("typer")
pytest.importorskip("torchvision")

from shapleycam.cli import profile as command
from shapleycam.cli.app import run
from shapleycam.data.images import Preprocess
from shapleycam.model.zoo import Classifier

from ..helpers import network

QUICK = ["profile", "--model", "mobilenet_v3_small", "--weights", "random", "--size", "32", "--rounds", "3"]


@pytest.fixture
def small(monkeypatch):
    """The command profiles a network of four layers, whatever model it is told."""

    def load(name, **_):
        model = network(curved=name != "resnet18")
        return Classifier(name, model, Preprocess((32, 32), 32), (), "random")

    monkeypatch.setattr(command, "load_classifier", load)


def test_a_table_and_all_files(tmp_path, capfd, small):
    pytest.importorskip("matplotlib")
    files = [tmp_path / name for name in ("p.json", "p.svg", "t.json")]
    status = run([*QUICK, "--batch", "1,2", "--out", str(files[0]), "--picture", str(files[1]), "--trace", str(files[2])])
    out, err = capfd.readouterr()
    assert status == 0, err
    assert out.count("explanation ÷ plain forward") == 2 and out.count("weighted reduce") == 2
    assert "engine reverse_over_reverse, backend native" in out or "engine" in out
    assert all(file.stat().st_size > 1000 for file in files)
    drawn = files[1].read_text()
    assert "physical limit" in drawn and "plain forward passes" in drawn
    assert run(["profile", "--compare", str(files[0]), str(files[0])]) == 0
    out, _ = capfd.readouterr()
    assert "SLOW" not in out and "FAST" not in out and "explanation" in out


def test_json_and_what_cannot_be(capfd):
    assert run([*QUICK, "--batch", "1", "--engine", "auto,closed_form", "--json"]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert [row["case"]["engine"] for row in found["rows"]] == ["auto"]
    assert "left out" in err and "pool-and-linear" in err
    assert (
        run(
            [
                "profile",
                "--model",
                "mobilenet_v3_small",
                "--weights",
                "random",
                "--size",
                "300000",
                "--batch",
                "1",
                "--rounds",
                "3",
            ]
        )
        == 1
    )
    _, err = capfd.readouterr()
    assert "left out" in err and "Traceback" not in err


@pytest.mark.slow
def test_other_ways_to_the_same_maps(capfd, small):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    quick = ["resnet18" if word == "mobilenet_v3_small" else word for word in QUICK]
    assert run([*quick, "--batch", "1", "--mode", "captured,exported", "--json"]) == 0
    out, err = capfd.readouterr()
    rows = json.loads(out)["rows"]
    assert [row["case"]["mode"] for row in rows] == ["captured", "exported"], err
    assert all([stage["name"] for stage in row["stages"]] == ["call"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "float31"], "float31: expected float32"),
        (["--layout", "CHWN"], "CHWN: expected NCHW"),
        (["--mode", "fast"], "fast: expected eager"),
        (["--batch", "0"], "whole numbers from 1"),
        (["--batch", "a"], "whole numbers from 1"),
        (["--picture", "a.gif"], r"a picture is a \.png"),
    ],
)
def test_bad_input(arguments, message, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run([*QUICK, *arguments]) == 2
    _, err = capfd.readouterr()
    import re

    assert re.search(message, " ".join(err.split())), err
