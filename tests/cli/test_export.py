"""``shapleycam export`` as a user meets it."""

import json

import pytest

pytest.importorskip("typer")
pytest.importorskip("efficientnet_lite_pytorch")

import torch
from PIL import Image
from typer.testing import CliRunner

from shapleycam.cli.app import app, run
from shapleycam.export import load
from shapleycam.models import load_classifier

pytestmark = pytest.mark.slow


def test_the_demos_network_as_a_file(tmp_path, capsys):
    path = tmp_path / "explained.pt2"
    arguments = ["export", str(path), "--resize", "--targets", "given", "--maps", "layer"]
    assert run([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(path) and told["bytes"] == path.stat().st_size
    assert told["model"] == "efficientnet-lite0" and told["classes"][560] == "football helmet" and told["format"] == "pt2"
    assert told["checks"]["torch"]["maps"] < 1e-4
    assert [port["name"] for port in told["inputs"]] == ["image", "target"]

    artefact, classifier = load(path), load_classifier()
    pixels = torch.randint(0, 256, (300, 400, 3), dtype=torch.uint8)
    result = artefact.explain(pixels[None], 7)
    view = classifier.preprocess.normalise(classifier.preprocess.view(Image.fromarray(pixels.numpy())))
    with torch.no_grad():
        torch.testing.assert_close(result.logits, classifier.model(view[None]), rtol=1e-3, atol=1e-3)
    assert result.maps.shape == (1, 7, 7) and artefact.class_name(7) == classifier.class_name(7)

    assert run(arguments) == 2  # before any work
    assert "exists: give another name, or overwrite=True (--overwrite)" in " ".join(capsys.readouterr().err.split())


def test_any_size(tmp_path, capsys):
    path = tmp_path / "explained.pt2"
    assert run(["export", str(path), "--dynamic-size", "--maps", "layer"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "[n, 3, height, width]" in told and "[n, grid_height, grid_width]" in told and "299x181, 181x337" in told
    assert load(path).explain(torch.randn(1, 3, 100, 260)).maps.shape == (1, 3, 8)
    assert run(["export", str(tmp_path / "a.pt2"), "--dynamic-size", "--resize"]) == 2
    assert "leave out dynamic_size=True" in " ".join(capsys.readouterr().err.split())


def test_mistakes_are_one_line(tmp_path, capsys):
    assert run(["export", str(tmp_path / "explained.tflite")]) == 2
    assert "end it in .onnx or .pt2" in capsys.readouterr().err
    assert run(["export", str(tmp_path / "a.pt2"), "--outputs", "prediction,heat"]) == 2
    assert "'heat'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help():
    result = CliRunner().invoke(app, ["export", "--help"], env={"COLUMNS": "120"})
    assert result.exit_code == 0 and "--resize" in result.output and "float64" in result.output
