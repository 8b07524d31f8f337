"""The evaluation of a data set: broken pictures, labels, parquet, interruption, reports."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("torchmetrics")
pytest.importorskip("typer")
pytest.importorskip("PIL")

from PIL import Image

from shapleycam import Explainer, InputError
from shapleycam.cli import progress
from shapleycam.cli.app import run
from shapleycam.data.images import Preprocess, read_image
from shapleycam.data.samples import open_samples, spread
from shapleycam.evaluate.run import Protocol, evaluate
from shapleycam.metrics import ADCC, measure
from shapleycam.model.zoo import Classifier

from ..helpers import network

SMALL = Preprocess((20, 24), (20, 24))
NAMES = (("ant",), ("bee", "honey bee"), ("cat",), ("dog",), ("eel",), ("fox",), ("gnu",))


@pytest.fixture
def classifier():
    return Classifier("toy", network(), SMALL, NAMES, "seeded")


def picture(seed, size=(40, 30)):
    noise = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(seed)).mul(255).byte()
    return Image.frombytes("RGB", (5, 4), bytes(noise.permute(1, 2, 0).flatten().tolist())).resize(size)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    for n in range(11):
        file = root / ("bee", "cat", "unicorn")[n % 3] / f"{n:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(n).save(file)
    (root / "bee" / "01-text.jpg").write_text("not a picture")
    (root / "cat" / "cut.png").write_bytes((root / "cat" / "01.png").read_bytes()[:60])
    picture(50, (3, 2)).save(root / "cat" / "tiny.png")  # smaller than the crop
    (root / "notes.txt").write_text("no picture, no complaint")
    return root


PROTOCOL = Protocol(methods=("shapleycam", "layercam", "randomcam"), layer="2", batch_size=3, save_every=1)


def test_a_folder_with_broken_files(classifier, folder):
    outcome = evaluate(classifier, open_samples(folder, SMALL), PROTOCOL)
    assert outcome.images == 12 and outcome.skipped == 0 and outcome.done == outcome.batches == 5
    assert {name: reason.split(":")[0] for name, reason in outcome.unreadable} == {
        "bee/01-text.jpg": "is not an image in a format that Pillow reads.",
        "cat/cut.png": "cannot be read",
    }
    assert outcome.unknown_labels == {"unicorn": 3} and outcome.labelled == 9
    # The same from the files one after the other, by hand.
    files = sorted(p for p in folder.rglob("*.png") if p.name != "cut.png")
    images = SMALL.normalise(torch.stack([SMALL.view(read_image(file)) for file in files]))
    explainer = Explainer(classifier.model, layer="2")
    for name in ("shapleycam", "layercam"):
        table = ADCC()
        table.update(*measure(explainer, images, methods=[name])[name].tensors)
        expected = {key: pytest.approx(float(value), abs=1e-6) for key, value in table.compute().items()}
        assert outcome.rows[name] == expected
    predicted = classifier.model(images).argmax(1).tolist()
    labels = [{"bee": 1, "cat": 2}.get(file.parent.name) for file in files]
    assert outcome.correct == sum(p == label for p, label in zip(predicted, labels, strict=True))


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3, 4])
def test_interrupted_and_resumed_is_the_same_to_the_last_digit(classifier, folder, tmp_path, after):
    samples, state = open_samples(folder, SMALL), tmp_path / "state.json"
    whole = evaluate(classifier, samples, PROTOCOL)

    def progress(done, of):
        if done == after:
            raise Stop

    with pytest.raises(Stop):
        evaluate(classifier, samples, PROTOCOL, state, progress=progress)
    resumed = evaluate(classifier, samples, PROTOCOL, state)
    assert resumed.resumed == after
    for name in ("rows", "images", "unreadable", "labelled", "correct", "unknown_labels"):
        assert getattr(resumed, name) == getattr(whole, name), name
    again = evaluate(classifier, samples, PROTOCOL, state)  # nothing is left to do
    assert again.resumed == again.batches and again.rows == whole.rows


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
def test_what_is_done_is_kept_whenever_it_is_interrupted(classifier, folder, tmp_path, monkeypatch, kind):
    """In the middle of a batch, with the tables of some methods changed and those of others not, and long before a save."""
    samples, state = open_samples(folder, SMALL), tmp_path / "state.json"
    whole = evaluate(classifier, samples, PROTOCOL)
    calls, update = [], ADCC.update

    def interrupted(self, *tensors):
        calls.append(1)
        if len(calls) == 3 * 3 + 2:  # the second of three methods, in the fourth batch
            raise kind
        update(self, *tensors)

    monkeypatch.setattr(ADCC, "update", interrupted)
    with pytest.raises(kind):
        evaluate(classifier, samples, replace(PROTOCOL, save_every=100), state)
    monkeypatch.setattr(ADCC, "update", update)
    resumed = evaluate(classifier, samples, PROTOCOL, state)
    assert resumed.resumed == 3
    for name in ("rows", "images", "unreadable", "labelled", "correct", "unknown_labels"):
        assert getattr(resumed, name) == getattr(whole, name), name


def test_a_state_of_other_settings_is_refused(classifier, folder, tmp_path):
    state = tmp_path / "state.json"
    samples = open_samples(folder, SMALL)
    evaluate(classifier, samples, PROTOCOL, state)
    with pytest.raises(InputError, match="another utility"):
        evaluate(classifier, samples, Protocol(("shapleycam", "layercam", "randomcam"), "logit", "2", batch_size=3), state)
    with torch.no_grad():
        classifier.model[0].weight[0, 0, 0, 0] += 1
    with pytest.raises(InputError, match="another weights"):
        evaluate(classifier, samples, PROTOCOL, state)
    picture(3).save(folder / "more.png")
    with pytest.raises(InputError, match="pictures"):
        evaluate(classifier, open_samples(folder, SMALL), PROTOCOL, state)
    state.write_text("{")
    with pytest.raises(InputError, match="not the state"):
        evaluate(classifier, samples, PROTOCOL, state)


def test_nothing_to_read(classifier, tmp_path):
    with pytest.raises(InputError, match="no image files"):
        open_samples(tmp_path, SMALL)
    with pytest.raises(InputError, match="no such folder"):
        open_samples(tmp_path / "absent", SMALL)
    (tmp_path / "a.jpg").write_text("no")
    with pytest.raises(InputError, match=r"None of the 1 pictures can be read; the first is a\.jpg"):
        evaluate(classifier, open_samples(tmp_path, SMALL), PROTOCOL)
    with pytest.raises(InputError, match="neither a folder"):
        open_samples(tmp_path / "a.jpg", SMALL)


def test_wordnet_folders_are_imagenet_s_classes(classifier, tmp_path):
    for n in range(7):
        (tmp_path / f"n0000000{n}").mkdir()
        picture(n).save(tmp_path / f"n0000000{n}" / "a.png")
    outcome = evaluate(classifier, open_samples(tmp_path, SMALL), Protocol(("gradcam",), layer="2"))
    images = SMALL.normalise(torch.stack([SMALL.view(picture(n)) for n in range(7)]))
    assert outcome.labelled == 7
    assert outcome.correct == int((classifier.model(images).argmax(1) == torch.arange(7)).sum())


def test_limit_is_spread_evenly():
    assert list(spread(10, 4)) == [0, 2, 5, 7] and list(spread(3, 9)) == [0, 1, 2]


@pytest.mark.parametrize("shape", ["struct", "binary"])
def test_parquet_is_the_folder(classifier, folder, tmp_path, shape):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    files = sorted(folder.rglob("*.[pj][np]g"))
    cells = [file.read_bytes() for file in files]
    if shape == "struct":
        cells = [{"bytes": cell, "path": file.name} for cell, file in zip(cells, files, strict=True)]
    labels = [{"bee": 1, "cat": 2, "unicorn": 99}[file.parent.name] for file in files]
    table = arrow.table({"image": cells, "label": labels})
    shards = tmp_path / "shards"
    shards.mkdir()
    parquet.write_table(table.slice(0, 8), shards / "a.parquet", row_group_size=3)
    parquet.write_table(table.slice(8), shards / "b.parquet")
    expected = evaluate(classifier, open_samples(folder, SMALL), PROTOCOL)
    got = evaluate(classifier, open_samples(shards, SMALL), PROTOCOL)
    assert got.rows == expected.rows and got.labelled == expected.labelled == 9 and got.correct == expected.correct
    assert got.unknown_labels == {"99": 3} and len(got.unreadable) == 2
    assert got.unreadable[0][0].startswith("a.parquet:") and len(open_samples(shards / "b.parquet", SMALL)) == 6


def test_parquet_that_cannot_serve(tmp_path, monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "a.parquet"
    file.write_text("no")
    with pytest.raises(InputError, match="not a table"):
        open_samples(file, SMALL)
    parquet.write_table(arrow.table({"text": ["a"]}), file)
    with pytest.raises(InputError, match="needs one column of encoded images"):
        open_samples(file, SMALL)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"shapleycam\[attribute\]"):
        open_samples(file, SMALL)


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def photographs(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("skimage")
    from shapleycam.cli.demo import photographs

    root = tmp_path / "photographs"
    root.mkdir()
    for file in photographs():
        read_image(file).save(root / f"{file.stem}.png")
    return root


def numbers(folder):
    content = json.loads((folder / "table.json").read_text())
    return [(network["images"], network["rows"]) for network in content["networks"]]


@pytest.mark.slow
def test_killed_and_resumed(photographs, tmp_path, capsys):
    arguments = ["evaluate", str(photographs), "--methods", "gradcam,randomcam", "--batch-size", "1", "--save-every", "1"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    code = "import sys; from shapleycam.cli.app import run; sys.exit(run(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, "--output", str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    state = killed / "state-efficientnet-lite0.json"
    deadline = time.monotonic() + 100
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = json.loads(state.read_text())["done"]
    assert 1 <= done < 5 and not (killed / "table.json").exists()
    assert run([*arguments, "--output", str(killed)]) == 0
    assert "batches were done before" in capsys.readouterr().err
    assert run([*arguments, "--output", str(whole)]) == 0
    assert numbers(killed) == numbers(whole)
    assert (killed / "table.csv").read_text() == (whole / "table.csv").read_text()
    assert run([*arguments, "--utility", "logit", "--output", str(killed)]) == 2
    assert "--restart" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done_and_says_so(photographs, tmp_path):
    """With workers, in a process of its own; progress is a line after every batch, so that the interrupt falls into one."""
    code = """
import signal, sys
from shapleycam.cli import progress
from shapleycam.cli.app import run
signal.signal(signal.SIGINT, signal.default_int_handler)
progress.INTERVAL = 0
sys.exit(run(sys.argv[1:]))
"""
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", code, *interruptible(photographs, out, workers=2)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        line = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate(timeout=100)
    kept_and_said(out, process.returncode, printed, line + said)


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_a_batch(photographs, tmp_path, monkeypatch, capfd):
    calls, update = [], ADCC.update

    def interrupts(self, *tensors):
        calls.append(1)
        if len(calls) == 2 * 2 + 2:  # the second of two methods, in the third batch
            signal.raise_signal(signal.SIGINT)
        update(self, *tensors)

    monkeypatch.setattr(ADCC, "update", interrupts)
    monkeypatch.setattr(progress, "INTERVAL", 0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = run(interruptible(photographs, tmp_path / "out", workers=0))
    finally:
        signal.signal(signal.SIGINT, before)
    assert kept_and_said(tmp_path / "out", status, *capfd.readouterr()) == 2


def interruptible(photographs, out, workers):
    return [
        *("evaluate", str(photographs), "--methods", "gradcam,randomcam", "--batch-size", "1", "--json"),
        *("--workers", str(workers), "--output", str(out)),
    ]


def kept_and_said(out, status, printed, said):
    """How many batches were done."""
    assert said.startswith("efficientnet-lite0: 1 of 5 batches, about ")
    assert status == 130 and printed == "" and "Traceback" not in said
    done = json.loads((out / "state-efficientnet-lite0.json").read_text())["done"]
    assert 1 <= done < 5
    assert f"{done} of 5 batches are done" in said and "the same command goes on" in said
    assert not (out / "table.json").exists()
    return done


@pytest.mark.slow
def test_json_is_the_file(photographs, tmp_path, capsys):
    assert run(["evaluate", str(photographs), "--methods", "gradcam", "--limit", "1", "--json", "--output", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads((tmp_path / "table.json").read_text())
    assert "table.csv" in captured.err


@pytest.mark.slow
def test_the_command_s_table(photographs, tmp_path, capsys):
    (photographs / "broken.jpg").write_text("no")
    arguments = [
        "evaluate",
        str(photographs),
        "--methods",
        "ShapleyCAM,gradcam",
        "--limit",
        "4",
        "--output",
        str(tmp_path / "o"),
    ]
    assert run(arguments) == 1
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[1].split() == ["method", "AD", "↓", "Coh", "↑", "Com", "↓", "ADCC", "↑", "IC", "↑", "ADD", "↑"]
    assert "3 of 4 pictures" in captured.out and "1 unreadable" in captured.out and "broken.jpg" in captured.err
    rows = list(csv.DictReader(io.StringIO((tmp_path / "o" / "table.csv").read_text())))
    assert [row["method"] for row in rows] == ["ShapleyCAM", "GradCAM"]
    assert lines[2].split()[1:] == [f"{float(rows[0][c]):.2f}" for c in ("AD", "Coh", "Com", "ADCC", "IC", "ADD")]
    with Image.open(tmp_path / "o" / "table.png") as plot:
        assert plot.width > 500


@pytest.mark.slow
def test_paper_table_beside_the_paper_s_numbers(photographs, tmp_path, capsys):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    weights = tmp_path / "weights"
    weights.mkdir()
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), weights / "resnet18.pth")
    out = tmp_path / "out"
    arguments = ["evaluate", str(photographs), "--paper-table", "--network", "ResNet-18", "--network", "Swin-T"]
    arguments += ["--weights", str(weights), "--methods", "gradcam,hirescam", "--limit", "2", "--output", str(out)]
    assert run(arguments) == 1  # Swin-T has no weights
    captured = capsys.readouterr()
    assert "left out: Swin-T" in captured.err
    row = next(line.split() for line in captured.out.splitlines() if line.startswith("GradCAM"))
    assert row[2] == "18.73" and float(row[3]) == pytest.approx(float(row[1]) - 18.73, abs=0.011)
    [found] = json.loads((out / "table.json").read_text())["networks"]
    assert found["layers"] == ["layer4.1"] and found["rows"]["gradcam"]["paper"]["ADCC"] == 77.10
    assert found["rows"]["hirescam"] == found["rows"]["gradcam"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--methods", "gradcam,gradcam"], "each once"),
        (["--methods", "gradcma"], "Did you mean"),
        (["--network", "ResNet-18"], "--paper-table"),
        (["--paper-table", "--model", "resnet18"], "exclude"),
        (["--paper-table", "--weights", "absent"], "folder"),
    ],
)
def test_refusals(tmp_path, capsys, extra, message):
    assert run(["evaluate", str(tmp_path), *extra]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
