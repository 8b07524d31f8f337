"""The folder of a result: what it never touches, what belongs to a job, and what a job is."""

import errno
import fcntl
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("pyarrow")
pytest.importorskip("PIL")

import pyarrow
from pyarrow import parquet

from shapleycam import InputError, JobError, ShapleyCamWarning
from shapleycam.attribute import attribute, open_maps, processes
from shapleycam.data.sources import open_source

from .conftest import SETTINGS, SMALL, save
from .test_job import same


def foreign(file):
    """A table of somebody's own."""
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"mine": [1, 2, 3]}), file)
    return file, file.read_bytes()


@pytest.mark.parametrize("name", ["part-000000.parquet", "part-000077.parquet", "manifest.parquet"])
@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_tables_of_somebody_s_own_stay(classifier, folder, tmp_path, name, restart, begun):
    out = tmp_path / "maps"
    if begun:
        attribute(classifier, folder, out, SETTINGS, shard_size=6)
    before = {file.name: file.read_bytes() for file in out.glob("part-*")}
    file, content = foreign(out / name)
    with pytest.raises(InputError) as caught:
        attribute(classifier, folder, out, SETTINGS, shard_size=6, restart=restart)
    assert "choose another --out" in str(caught.value) or (begun and name == "manifest.parquet")
    assert "--restart" not in str(caught.value) and file.read_bytes() == content
    assert {file.name: file.read_bytes() for file in out.glob("part-*")} == {
        **before,
        **({} if "man" in name else {name: content}),
    }


def test_a_description_of_something_else_stays(classifier, folder, tmp_path):
    out = tmp_path / "maps"
    out.mkdir()
    (out / "job.json").write_text('{"steps": 3}')
    with pytest.raises(InputError, match="not the description of a result"):
        attribute(classifier, folder, out, SETTINGS, restart=True)
    assert (out / "job.json").read_text() == '{"steps": 3}'


def test_half_written_files_of_others_stay(classifier, folder, tmp_path):
    out = tmp_path / "maps"
    out.mkdir()
    kept = ["part-list.part", "job.json.part", "part-000000.parquet.part", "manifest.part"]
    gone = [".part-000003.parquet.77.part", ".manifest.parquet.77.part", "job.json.77.part"]
    for name in (*kept, *gone):
        (out / name).write_text("half")
    attribute(classifier, folder, out, SETTINGS, restart=True)
    assert sorted(name for name in os.listdir(out) if name.endswith(".part")) == sorted(kept)


def pictures_and_tables(folder, tmp_path):
    tables = tmp_path / "tables"
    tables.mkdir()
    contents = [file.read_bytes() for file in sorted(folder.rglob("*.png"))]
    parquet.write_table(pyarrow.table({"image": contents}), tables / "part-000000.parquet")
    return tables


def test_the_result_is_not_put_where_it_would_be_listed(classifier, folder, tmp_path):
    tables = pictures_and_tables(folder, tmp_path)
    (tmp_path / "link").symlink_to(folder)
    before = (tables / "part-000000.parquet").read_bytes()
    for source, out in (
        (tables, tables),
        (f"{tables}/*.parquet", tables),
        (f"{tmp_path}/**/*.parquet", tables / "maps"),
        (folder, folder),
        (folder, folder / "maps"),
        (folder, tmp_path / "link" / "a" / "b"),
        (f"{folder}/**", folder / "maps"),
    ):
        for restart in (False, True):
            with pytest.raises(InputError, match=r"is among the pictures of .*choose another --out"):
                attribute(classifier, source, out, SETTINGS, restart=restart)
        assert not (out / "job.json").exists()
    assert (tables / "part-000000.parquet").read_bytes() == before
    with pytest.raises(InputError, match="was not written by shapleycam attribute"):
        attribute(classifier, tables / "part-000000.parquet", tables, SETTINGS)
    (tables / "part-000000.parquet").rename(tables / "train.parquet")
    for source, out in (  # where nothing of it is listed, it may be near
        (folder, folder / ".maps" / "a"),
        (tables, tables / "maps"),
        (f"{folder}/bee/*.png", folder / "bee" / "maps"),
        (folder, tmp_path),
        (tables / "train.parquet", tables),
    ):
        for _ in range(2):
            assert attribute(classifier, source, out, SETTINGS).explained


def test_a_footer_that_cannot_be_read_now_is_not_damaged(classifier, folder, tmp_path, monkeypatch):
    out = tmp_path / "maps"
    attribute(classifier, folder, out, SETTINGS, shard_size=6)
    damaged = out / "part-000000.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    read = parquet.read_metadata

    def busy(file, *rest):
        if "000002" in str(file):
            raise OSError(errno.EMFILE, "Too many open files")
        return read(file, *rest)

    monkeypatch.setattr(parquet, "read_metadata", busy)
    with pytest.raises(JobError, match=r"part-000002\.parquet cannot be read: Too many open files\. Nothing was removed"):
        attribute(classifier, folder, out, SETTINGS, shard_size=6)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    monkeypatch.undo()
    assert attribute(classifier, folder, out, SETTINGS, shard_size=6).resumed == 17


def test_errors_of_the_system_have_a_number_in_pyarrow(tmp_path):
    """What the last test stands on: damage has none."""
    with pytest.raises(OSError) as caught:
        parquet.read_metadata(tmp_path / "absent")
    assert caught.value.errno == errno.ENOENT
    parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "t")
    whole = (tmp_path / "t").read_bytes()
    for content in (whole[:-9], whole[:2], b"", whole[:-40] + b"\xff" * 32 + whole[-8:], b"text, and a lot of it"):
        (tmp_path / "t").write_bytes(content)
        with pytest.raises((OSError, ValueError)) as caught:
            parquet.read_metadata(tmp_path / "t")
        assert getattr(caught.value, "errno", None) is None


def test_a_part_under_another_s_number_is_done_again(classifier, folder, tmp_path):
    out = tmp_path / "maps"
    attribute(classifier, folder, out, SETTINGS, shard_size=6)
    good = {file.name: file.read_bytes() for file in out.glob("part-*")}
    shutil.copy(out / "part-000000.parquet", out / "part-000001.parquet")  # of as many rows
    with pytest.raises(InputError, match="not its rows"):
        open_maps(out)[7]
    assert attribute(classifier, folder, out, SETTINGS, shard_size=6).resumed == 17
    assert {file.name: file.read_bytes() for file in out.glob("part-*")} == good


def test_a_restart_that_dies_leaves_no_result(classifier, folder, tmp_path, monkeypatch):
    out, unlink = tmp_path / "maps", Path.unlink
    attribute(classifier, folder, out, SETTINGS, shard_size=6)

    def once(self, *rest, **options):
        unlink(self, *rest, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", once)
    with pytest.raises(KeyboardInterrupt):
        attribute(classifier, folder, out, SETTINGS, shard_size=6, restart=True)
    monkeypatch.undo()
    with pytest.raises(InputError, match="holds no result"):
        open_maps(out)
    assert attribute(classifier, folder, out, SETTINGS, shard_size=6, restart=True).resumed == 0


def test_class_names_and_columns_belong_to_the_job(classifier, folder, tmp_path):
    out = tmp_path / "maps"
    settings = replace(SETTINGS, target="bee")
    attribute(classifier, folder, out, settings, shard_size=6)
    with pytest.raises(InputError, match="another classes"):
        attribute(replace(classifier, classes=classifier.classes[::-1]), folder, out, settings, shard_size=6)
    contents = [file.read_bytes() for file in sorted(folder.rglob("*.png"))]
    parquet.write_table(pyarrow.table({"image": contents, "mirror": contents[::-1]}), tmp_path / "t.parquet")
    attribute(classifier, open_source(tmp_path / "t.parquet", image="mirror"), tmp_path / "m", SETTINGS)
    with pytest.raises(InputError, match="another columns"):
        attribute(classifier, tmp_path / "t.parquet", tmp_path / "m", SETTINGS)


def test_a_file_system_without_locks(classifier, folder, tmp_path, monkeypatch):
    def no(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no)
    with pytest.warns(ShapleyCamWarning, match="cannot be locked .*Function not implemented.*no other run"):
        assert attribute(classifier, folder, tmp_path / "maps", SETTINGS).rows == 23


def test_devices_belong_to_the_job_by_their_type(classifier, folder, tmp_path, monkeypatch):
    used = []

    def elsewhere(work, shards, devices, stop):
        used.append(list(devices))
        yield from ()

    monkeypatch.setattr(processes, "on_devices", elsewhere)
    for devices, message in ((["cpu", "cuda:0"], "must be of one type"), (["warp:1"], "devices: ")):
        with pytest.raises(InputError, match=message):
            attribute(classifier, folder, tmp_path / "maps", SETTINGS, devices=devices)
    assert not (tmp_path / "maps").exists()
    attribute(classifier, folder, tmp_path / "maps", SETTINGS, devices=["cuda:1"])  # one, and not the model's
    assert used == [["cuda:1"]] and json.loads((tmp_path / "maps" / "job.json").read_text())["key"]["device"] == "cuda"
    with pytest.raises(InputError, match=r"another device \(cuda there, cpu now\)"):
        attribute(classifier, folder, tmp_path / "maps", SETTINGS, devices=["cpu", "cpu"])
    attribute(classifier, folder, tmp_path / "here", SETTINGS, devices=["cpu"])  # the model's own
    assert len(used) == 1 and len(open_maps(tmp_path / "here")) == 23


def test_a_model_that_cannot_be_pickled(classifier, folder, tmp_path):
    classifier.model.shape = lambda: 3
    assert attribute(classifier, folder, tmp_path / "one", SETTINGS).rows == 23
    with pytest.raises(InputError, match=r"cannot be pickled \(.*lambda.*importable module"):
        attribute(classifier, folder, tmp_path / "two", SETTINGS, devices=["cpu", "cpu"])
    del classifier.model.shape
    torch.nn.utils.parametrizations.weight_norm(next(m for m in classifier.model.modules() if isinstance(m, torch.nn.Conv2d)))
    assert attribute(classifier, folder, tmp_path / "three", SETTINGS, devices=["cpu:0"]).rows == 23  # the model's own
    with pytest.raises(InputError, match=r"cannot be pickled \(.*arametriz"):
        attribute(classifier, folder, tmp_path / "four", SETTINGS, devices=["cpu", "cpu"])


@pytest.mark.parametrize("name", ["job.json", "manifest.parquet"])
def test_a_damaged_description_says_what_to_do(classifier, folder, tmp_path, name):
    out = tmp_path / "maps"
    attribute(classifier, folder, out, SETTINGS)
    (out / name).write_bytes(b"{")
    with pytest.raises(InputError, match="remove it, or choose another --out|Use --restart to begin anew, or another --out"):
        attribute(classifier, folder, out, SETTINGS)
    if name == "manifest.parquet":
        assert attribute(classifier, folder, out, SETTINGS, restart=True).rows == 23
    else:
        (out / name).unlink()
        part = next(out.glob("part-*"))
        part.write_bytes(part.read_bytes()[:-9])
        with pytest.raises(InputError, match="is damaged, and may be somebody's own.*remove it"):
            attribute(classifier, folder, out, SETTINGS, restart=True)


def test_a_moved_result_says_how_to_show_copies(classifier, folder, tmp_path):
    out = tmp_path / "maps"
    attribute(classifier, folder, out, SETTINGS)
    file = sorted(folder.rglob("*.png"))[0]
    os.utime(file, (1, 1))
    key = file.relative_to(folder).as_posix()
    with pytest.raises(InputError, match=r"it was changed since\. Of a copy only sizes are compared: open_maps\(.*source="):
        open_maps(out).view(key)
    assert open_maps(out, source=folder).view(key).shape[0] == 3


def test_the_fingerprint_sees_buffers_that_are_not_saved(classifier):
    classifier.model.register_buffer("shift", torch.zeros(1), persistent=False)
    before = classifier.fingerprint()
    classifier.model.shift.fill_(5)
    assert classifier.fingerprint() != before


def test_large_seeds(classifier, folder, tmp_path):
    def run(name, seed):
        attribute(classifier, folder, tmp_path / name, replace(SETTINGS, method="randomcam", seed=seed))
        return tmp_path / name

    assert same(run("a", 2**62), run("b", 2**62)) and not same(tmp_path / "a", run("c", 2**62 + 1))


@pytest.mark.parametrize("factor", [1e-30, 1e-38, 1e-42])
def test_maps_of_any_size_keep_their_digits(classifier, folder, tmp_path, factor):
    """Down to numbers that float32 has with fewer digits only."""
    from shapleycam import Explainer

    with torch.no_grad():
        classifier.model[-1].weight.mul_(factor)
    attribute(classifier, folder, tmp_path / "maps", replace(SETTINGS, utility="logit", method="gradcam"))
    maps = open_maps(tmp_path / "maps")
    explainer = Explainer(classifier.model, layer="2", method="gradcam", utility="logit")
    expected = explainer(SMALL.normalise(maps.view("cat/04.png"))[None]).raw[0].double()
    found, largest = maps["cat/04.png"].raw.double(), float(expected.abs().max())
    assert largest > 0 and float((found - expected).abs().max()) <= 2**-11 * largest + 2 * 2**-149


# ------------------------------------------------------------------------------------------------- the pictures, read again


def test_a_picture_that_was_replaced_gets_no_map_of_another(classifier, tmp_path):
    for n in range(3):
        save(tmp_path / "p" / f"{n}.bmp", n)
    attribute(classifier, tmp_path / "p", tmp_path / "maps", SETTINGS)
    assert open_maps(tmp_path / "maps").overlay("1.bmp").shape == (20, 24, 3)
    save(tmp_path / "p" / "1.bmp", 9)
    os.utime(tmp_path / "p" / "1.bmp", (1, 1))
    with pytest.raises(InputError, match=r"1\.bmp is not what was listed: it was changed since"):
        open_maps(tmp_path / "maps").overlay("1.bmp")
    os.utime(save(tmp_path / "p" / "2.bmp", 2), (1, 1))  # as in a copy: where the source is named, its size must do
    assert open_maps(tmp_path / "maps", source=tmp_path / "p").overlay("2.bmp").shape == (20, 24, 3)
    save(tmp_path / "p" / "2.bmp", 2, (50, 40))
    with pytest.raises(InputError, match="it has"):
        open_maps(tmp_path / "maps", source=tmp_path / "p").overlay("2.bmp")


def test_a_source_that_is_named_again_is_read_by_the_job_s_columns(classifier, folder, tmp_path, capsys):
    pytest.importorskip("typer")
    from shapleycam.cli.app import run

    contents = [file.read_bytes() for file in sorted(folder.rglob("*.jpg"))][1:7]
    parquet.write_table(pyarrow.table({"image": contents, "mirror": contents[::-1]}), tmp_path / "t.parquet")
    attribute(classifier, open_source(tmp_path / "t.parquet", image="mirror"), tmp_path / "maps", SETTINGS)
    view = open_maps(tmp_path / "maps").view(0)
    moved = (tmp_path / "t.parquet").rename(tmp_path / "moved.parquet")
    moved = moved.rename(moved.parent / "t.parquet")
    assert torch.equal(open_maps(tmp_path / "maps", source=moved).view(0), view)
    assert run(["maps", str(tmp_path / "maps"), "--source", str(moved)]) == 0
    assert "without pictures" not in capsys.readouterr().err
    assert run(["maps", str(tmp_path / "maps"), "--source", str(tmp_path / "absent")]) == 2
    assert "no such folder or file" in " ".join(capsys.readouterr().err.split())


def test_a_relative_source_is_found_from_elsewhere(classifier, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    attribute(classifier, "bee/*.png", tmp_path / "maps", SETTINGS)
    monkeypatch.chdir("/")
    assert open_maps(tmp_path / "maps").overlay(0).shape == (20, 24, 3)


def test_rows_by_other_libraries_numbers(classifier, folder, tmp_path):
    numpy = pytest.importorskip("numpy")
    attribute(classifier, folder, tmp_path / "maps", SETTINGS)
    maps = open_maps(tmp_path / "maps")
    assert maps[numpy.int64(3)].key == maps[3].key and maps[numpy.int64(-1)].key == maps[22].key
    assert "a\udcff.jpg" not in maps
    with pytest.raises(InputError, match="has no picture"):
        maps["a\udcff.jpg"]
    with pytest.raises(InputError, match=r"by key \(a text\) and by number, got 1\.5"):
        maps[1.5]


def test_cores_where_the_system_does_not_say(monkeypatch):
    pytest.importorskip("typer")
    from shapleycam.cli.attribute import _cores

    assert _cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert _cores() == os.cpu_count()
