"""The job: what it writes, that it resumes to the same bits, and what it refuses."""

import json
import threading
from dataclasses import replace

import pytest
import torch

pytest.importorskip("pyarrow")
pytest.importorskip("PIL")

from pyarrow import parquet

from shapleycam import Explainer, InputError, JobError
from shapleycam.attribute import attribute, local, open_maps
from shapleycam.attribute.job import ShardRunner
from shapleycam.attribute.local import Work
from shapleycam.data import decoding
from shapleycam.data.images import read_image
from shapleycam.data.manifest import Manifest
from shapleycam.data.sources import open_source

from .conftest import SETTINGS, SMALL, save


def table(out):
    """The whole result, in its order."""
    import pyarrow

    return pyarrow.concat_tables(parquet.read_table(file) for file in sorted(out.glob("part-*.parquet")))


def same(one, other):
    """To the last bit: NaN included, which no comparison of values would call equal."""
    return [file.read_bytes() for file in sorted(one.glob("part-*"))] == [
        file.read_bytes() for file in sorted(other.glob("part-*"))
    ]


def test_the_rows_are_those_of_the_explainer(classifier, folder, tmp_path):
    out = tmp_path / "maps"
    outcome = attribute(classifier, folder, out, replace(SETTINGS, norms=True, decoder="exact"), shard_size=8)
    assert (outcome.images, outcome.explained, outcome.failed, outcome.parts, outcome.done) == (23, 21, 2, 3, 3)
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".jpg", ".png"))
    rows = table(out).drop(["map"]).to_pylist()
    assert [row["key"] for row in rows] == [file.relative_to(folder).as_posix() for file in files]
    assert [row["path"] for row in rows] == [str(file) for file in files]
    bad = {row["key"]: row for row in rows if row["status"] != "ok"}
    assert set(bad) == {"bee/01-text.jpg", "cat/cut.png"} == {key for key, _, _ in outcome.examples}
    assert bad["bee/01-text.jpg"]["status"] == "undecodable" and "not an image" in bad["bee/01-text.jpg"]["error"]
    assert all(bad["cat/cut.png"][name] is None for name in ("target", "probability", "logit", "scale", "width"))
    maps = open_maps(out)
    explainer = Explainer(classifier.model, layer="2")
    for row in rows:
        if row["status"] != "ok":
            assert maps[row["key"]].raw.isnan().all()
            continue
        image = SMALL.normalise(SMALL.view(read_image(folder / row["key"])))[None]
        expected = explainer(image, with_gap=True, with_norms=True)
        assert (row["width"], row["height"], row["label"]) == (40, 30, row["key"].split("/")[0])
        assert row["target"] == int(expected.targets) == int(classifier.model(image).argmax())
        assert row["probability"] == pytest.approx(classifier.model(image).softmax(1).max().item(), rel=1e-5)
        assert row["logit"] == pytest.approx(classifier.model(image).max().item(), rel=1e-5)
        assert row["completeness_gap"] == pytest.approx(float(expected.gap), rel=1e-3, abs=1e-5)
        assert row["hvp_ratio"] == pytest.approx(float(expected.hvp_ratio), rel=1e-4)
        found = maps[row["key"]].raw
        largest = float(expected.raw.abs().max())
        assert row["scale"] == pytest.approx(largest, rel=1e-4)
        assert float((found - expected.raw[0]).abs().max()) <= largest * (2**-11 + 1e-4)
        torch.testing.assert_close(maps.heatmap(row["key"]), expected.heatmaps()[0], atol=3e-3, rtol=0)


def test_the_fast_resize_moves_a_map_by_little(classifier, folder, tmp_path):
    """One level of 255 in the pixels, at most: a bound for what --decoder exact is the oracle of."""
    for decoder in ("exact", "auto"):
        attribute(classifier, folder, tmp_path / decoder, replace(SETTINGS, decoder=decoder))
    exact, fast = open_maps(tmp_path / "exact"), open_maps(tmp_path / "auto")
    for row in exact:
        if row.status == "ok":
            assert float((fast[row.key].raw - row.raw).abs().max()) <= 0.02 * float(row.raw.abs().max())


def test_what_the_files_say_of_themselves(classifier, folder, tmp_path):
    attribute(classifier, folder, tmp_path / "maps", SETTINGS, shard_size=8)
    meta = parquet.read_metadata(tmp_path / "maps" / "part-000001.parquet")
    said = {k.decode(): v.decode() for k, v in meta.metadata.items() if k.startswith((b"shapleycam:", b"rows:"))}
    job = json.loads(said["shapleycam:job"])
    assert said["shapleycam:layout"] == "1" and said["shapleycam:engine"] == "closed_form" and said["shapleycam:layer"] == "2"
    assert job["method"] == "shapleycam" and job["model"] == "toy" and len(job["weights"]) == len(job["manifest"]) == 64
    assert sum(int(v) for k, v in said.items() if k.startswith("rows:")) == 8
    column = {meta.row_group(0).column(i).path_in_schema: meta.row_group(0).column(i) for i in range(meta.num_columns)}
    assert not column["map.list.element"].is_stats_set and column["key"].is_stats_set
    assert all(c.compression == "ZSTD" and "PLAIN_DICTIONARY" not in c.encodings for c in column.values())


def test_row_groups_are_cut_by_bytes(classifier, folder, tmp_path, monkeypatch):
    from shapleycam.attribute import part

    monkeypatch.setattr(part, "GROUP_BYTES", 2000)
    attribute(classifier, folder, tmp_path / "maps", SETTINGS)
    assert parquet.read_metadata(tmp_path / "maps" / "part-000000.parquet").num_row_groups > 2
    maps = open_maps(tmp_path / "maps")
    assert [row.key for row in maps] == list(maps.keys()) and len(maps) == 23
    assert maps["unicorn/20.png"].key == "unicorn/20.png"


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("after", [1, 2])
def test_resumed_is_the_same_to_the_last_bit(classifier, folder, tmp_path, after):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    attribute(classifier, folder, whole, SETTINGS, shard_size=6)

    def progress(outcome):
        if outcome.done == after and outcome.ahead:
            raise Interrupt

    with pytest.raises(Interrupt):
        attribute(classifier, folder, stopped, SETTINGS, shard_size=6, progress=progress)
    assert len(list(stopped.glob("part-*"))) == after and not list(stopped.glob(".part*"))
    assert len(open_maps(stopped)) == 6 * after
    outcome = attribute(classifier, folder, stopped, SETTINGS, shard_size=6)
    assert outcome.resumed == 6 * after and outcome.rows == 23 and same(whole, stopped)
    assert attribute(classifier, folder, stopped, SETTINGS, shard_size=6).resumed == 23


def test_a_stop_is_heard_at_the_next_batch(classifier, folder, tmp_path):
    stop = threading.Event()

    def progress(outcome):
        if outcome.done == 1:
            stop.set()

    outcome = attribute(classifier, folder, tmp_path / "maps", SETTINGS, shard_size=6, progress=progress, stop=stop)
    assert outcome.interrupted and outcome.done == 1 and outcome.rows == 6
    assert not [file for file in (tmp_path / "maps").iterdir() if file.name.endswith(".part")]


def test_shards_in_any_order_by_any_worker(classifier, folder, tmp_path):
    attribute(classifier, folder, tmp_path / "maps", SETTINGS, shard_size=6)
    before = {file.name: file.read_bytes() for file in (tmp_path / "maps").glob("part-*")}
    job = json.loads((tmp_path / "maps" / "job.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    work = Work(classifier, open_source(folder), other, SETTINGS, job["key"])
    (other / "manifest.parquet").write_bytes((tmp_path / "maps" / "manifest.parquet").read_bytes())
    for shards in ([3, 0], [2], [1, 3]):
        runner = work.runner()
        assert isinstance(runner, ShardRunner)
        for k in shards:
            assert runner.run(k).shard == k
        runner.close()
    assert {file.name: file.read_bytes() for file in other.glob("part-*")} == before


def test_what_is_not_the_same_job_is_refused(classifier, folder, tmp_path):
    out = tmp_path / "maps"
    attribute(classifier, folder, out, SETTINGS)
    for other, message in (
        (replace(SETTINGS, utility="logit"), r"another utility \(rest there, logit now\)"),
        (replace(SETTINGS, batch_size=3), "another batch_size"),
    ):
        with pytest.raises(InputError, match=message):
            attribute(classifier, folder, out, other)
    with pytest.raises(InputError, match="another shard_size"):
        attribute(classifier, folder, out, SETTINGS, shard_size=3)
    attribute(classifier, folder, out, replace(SETTINGS, threads=1, time_limit=None))  # speed is no part of the result
    with torch.no_grad():
        classifier.model[0].weight[0, 0, 0, 0] += 1
    with pytest.raises(InputError, match="another weights"):
        attribute(classifier, folder, out, SETTINGS)
    before = (out / "part-000000.parquet").read_bytes()
    attribute(classifier, folder, out, SETTINGS, restart=True)
    assert (out / "part-000000.parquet").read_bytes() != before


@pytest.mark.parametrize("change", ["more", "fewer", "renamed", "another size", "touched"])
def test_a_changed_source_is_refused(classifier, folder, tmp_path, change):
    out = tmp_path / "maps"
    attribute(classifier, folder, out, SETTINGS)
    file = folder / "cat" / "04.png"
    if change == "more":
        save(folder / "new.png", 3)
    elif change == "fewer":
        file.unlink()
    elif change == "renamed":
        file.rename(folder / "cat" / "4.png")
    elif change == "another size":
        save(file, 4, (50, 40))
    else:
        import os

        os.utime(file, (1, 1))
    with pytest.raises(InputError, match=r"has changed since .* --restart"):
        attribute(classifier, folder, out, SETTINGS)
    attribute(classifier, folder, out, SETTINGS, restart=True)


def test_one_run_at_a_time(classifier, folder, tmp_path):
    out, inside = tmp_path / "maps", []

    def progress(outcome):
        if not inside:
            inside.append(1)
            with pytest.raises(InputError, match=r"is being written by process \d+ on .*another --out"):
                attribute(classifier, folder, out, SETTINGS)

    assert attribute(classifier, folder, out, SETTINGS, progress=progress).rows == 23 and inside


def test_folders_that_are_something_else(classifier, folder, tmp_path):
    out = tmp_path / "maps"
    attribute(classifier, folder, out, SETTINGS)
    (out / "job.json").unlink()
    with pytest.raises(InputError, match="has parts of a result"):
        attribute(classifier, folder, out, SETTINGS)
    (out / "mine.txt").write_text("stays")
    attribute(classifier, folder, out, SETTINGS, restart=True)
    assert (out / "mine.txt").exists()
    (out / "job.json").write_text("{")
    with pytest.raises(InputError, match="not the description"):
        attribute(classifier, folder, out, SETTINGS)
    with pytest.raises(InputError, match="cannot be used"):
        attribute(classifier, folder, out / "mine.txt", SETTINGS)
    with pytest.raises(InputError, match="no result of shapleycam attribute"):
        open_maps(tmp_path)


def test_a_part_that_is_not_whole_is_done_again(classifier, folder, tmp_path):
    out = tmp_path / "maps"
    attribute(classifier, folder, out, SETTINGS, shard_size=6)
    good = {file.name: file.read_bytes() for file in out.glob("part-*")}
    (out / "part-000001.parquet").write_bytes(good["part-000001.parquet"][:-20])
    (out / "part-000002.parquet").write_bytes(good["part-000000.parquet"][:4])
    (out / ".part-000000.parquet.123.part").write_bytes(b"left by a run that was killed")
    assert attribute(classifier, folder, out, SETTINGS, shard_size=6).resumed == 11
    assert {file.name: file.read_bytes() for file in out.glob("part-*")} == good
    assert not list(out.glob(".part-*"))


def test_a_layout_of_the_future_is_refused(classifier, folder, tmp_path):
    out = tmp_path / "maps"
    attribute(classifier, folder, out, SETTINGS)
    job = json.loads((out / "job.json").read_text())
    (out / "job.json").write_text(json.dumps({**job, "layout": "2"}))
    with pytest.raises(InputError, match=r"layout '2'.*reads layout '1'"):
        open_maps(out)
    with pytest.raises(InputError, match="layout '2'"):
        attribute(classifier, folder, out, SETTINGS)


def test_targets(classifier, folder, tmp_path):
    attribute(classifier, folder, tmp_path / "fixed", replace(SETTINGS, target="honeybee"))
    assert set(open_maps(tmp_path / "fixed").numpy("target")[2:8]) == {1}
    attribute(classifier, folder, tmp_path / "label", replace(SETTINGS, target="label"))
    maps = open_maps(tmp_path / "label")
    assert maps.statuses == {"no target": 7, "ok": 14, "undecodable": 2}
    assert maps["bee/00.png"].target == 1 and maps["cat/04.png"].target == 2
    unicorn = maps["unicorn/02.png"]
    assert unicorn.target is None and unicorn.raw.isnan().all() and "'unicorn' is no class of toy" in unicorn.error
    torch.testing.assert_close(maps["bee/00.png"].raw, open_maps(tmp_path / "fixed")["bee/00.png"].raw)


def test_several_classes(classifier, folder, tmp_path):
    attribute(classifier, folder, tmp_path / "maps", replace(SETTINGS, topk=3))
    maps = open_maps(tmp_path / "maps")
    assert maps.grid == (3, 10, 12) and maps.numpy("map").shape == (23, 3, 10, 12)
    row = maps["cat/04.png"]
    view = maps.view("cat/04.png")
    logits = classifier.model(SMALL.normalise(view[None]))
    assert row.target == logits.topk(3).indices[0].tolist()
    expected = Explainer(classifier.model, layer="2")(SMALL.normalise(view[None]), logits.topk(3).indices)
    torch.testing.assert_close(row.raw, expected.raw[0], rtol=2e-3, atol=1e-4)
    assert maps["cat/cut.png"].target is None or set(maps["cat/cut.png"].target) == {None}
    assert maps.heatmap("cat/04.png").shape == (3, 20, 24) and maps.overlay("cat/04.png").shape == (3, 20, 24, 3)
    [(_, raws)] = maps.batches()
    torch.testing.assert_close(raws[list(maps.keys()).index("cat/04.png")], row.raw)


@pytest.mark.parametrize("method", ["randomcam", "gradcam", "eigencam"])
def test_methods(classifier, folder, tmp_path, method):
    settings = replace(SETTINGS, method=method)
    attribute(classifier, folder, tmp_path / "whole", settings, shard_size=6)
    for k in (2, 0):
        attribute(classifier, folder, tmp_path / "again", settings, shard_size=6)
        (tmp_path / "again" / f"part-00000{k}.parquet").unlink()
    attribute(classifier, folder, tmp_path / "again", settings, shard_size=6)
    assert same(tmp_path / "whole", tmp_path / "again")


def test_activations_that_are_not_finite(classifier, folder, tmp_path):
    with torch.no_grad():
        classifier.model[0].bias.fill_(float("inf"))
    with pytest.warns(UserWarning, match="not finite"):
        outcome = attribute(classifier, folder, tmp_path / "maps", SETTINGS)
    assert outcome.kinds == {"not finite": 21, "undecodable": 2}
    row = open_maps(tmp_path / "maps")["cat/04.png"]
    assert row.raw.isnan().all() and row.target is None and (row.width, row.height) == (40, 30)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"time_limit": 0.0}, "time_limit"),
        ({"topk": 2, "target": 1}, "exclude"),
        ({"layer": ["2", "0"]}, "one target layer"),
        ({"decoder": "magic"}, "Unknown decoder"),
        ({"topk": 9}, "topk=9: the model has 7"),
        ({"target": "uniqorn"}, "no class 'uniqorn'"),
    ],
)
def test_bad_settings(classifier, folder, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        attribute(classifier, folder, tmp_path / "maps", replace(SETTINGS, **settings))


def test_nothing_to_explain(classifier, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no image files"):
        attribute(classifier, tmp_path / "empty", tmp_path / "maps", SETTINGS)
    (tmp_path / "empty" / "a.jpg").write_text("no")
    with pytest.raises(InputError, match=r"None of the 1 pictures can be read; the first is a\.jpg"):
        attribute(classifier, tmp_path / "empty", tmp_path / "maps", SETTINGS)
    with pytest.raises(InputError, match="no such folder"):
        attribute(classifier, tmp_path / "absent", tmp_path / "maps", SETTINGS)


def test_the_model_is_left_as_it_was(classifier, folder, tmp_path):
    before = {name: value.clone() for name, value in classifier.model.state_dict().items()}
    attribute(classifier, folder, tmp_path / "maps", SETTINGS)
    assert all(torch.equal(value, before[name]) for name, value in classifier.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in classifier.model.parameters())
    assert not any(module._forward_hooks for module in classifier.model.modules())


def test_the_manifest_cuts_the_same_shards(folder, tmp_path):
    from shapleycam.data.manifest import fingerprint_of, write_manifest

    one = write_manifest(open_source(folder), tmp_path / "a.parquet", 5)
    assert (one.count, one.shards, [one.rows(k) for k in range(5)]) == (23, 5, [5, 5, 5, 5, 3])
    assert (
        list(one)
        == list(open_source(folder).entries())
        == [e for k in range(5) for e in Manifest(tmp_path / "a.parquet").shard(k)]
    )
    assert fingerprint_of(open_source(folder)) == (one.fingerprint, 23)
    assert write_manifest(open_source(folder), tmp_path / "b.parquet", 7).fingerprint == one.fingerprint
    with pytest.raises(InputError, match="Shard 5 is out of range"):
        one.shard(5)
    with pytest.raises(InputError, match="shard_size"):
        write_manifest(open_source(folder), tmp_path / "c.parquet", 0)
    assert JobError.__mro__[1].__name__ == "ShapleyCamError"


def test_pictures_that_a_gpu_decodes(classifier, folder, tmp_path, monkeypatch):
    """A CPU in the place of the GPU, whose pictures are another result's; overlays need no GPU."""
    decode_jpeg = pytest.importorskip("torchcodec.decoders").decode_jpeg
    with pytest.raises(InputError, match="needs the model on a CUDA device, and it is on cpu"):
        attribute(classifier, folder, tmp_path / "cuda", replace(SETTINGS, decoder="cuda"))
    with pytest.raises(InputError, match="Unknown decoder 'gpu'"):
        attribute(classifier, folder, tmp_path / "cuda", replace(SETTINGS, decoder="gpu"))
    assert not (tmp_path / "cuda").exists()
    asked = []
    monkeypatch.setattr(
        decoding, "nvjpeg", lambda device: lambda content: asked.append(1) or decode_jpeg(content, device=device)
    )
    monkeypatch.setattr(local, "_type_of", lambda devices, home: "cuda")
    attribute(classifier, folder, tmp_path / "cuda", replace(SETTINGS, decoder="cuda"))
    assert len(asked) >= 10  # of 21, every other is a PNG
    attribute(classifier, folder, tmp_path / "auto", SETTINGS)
    one, other = open_maps(tmp_path / "cuda"), open_maps(tmp_path / "auto")
    assert one.job["key"]["decoder"] == "cuda" and list(one.keys()) == list(other.keys())
    for a, b in zip(one, other, strict=True):
        assert a.status == b.status and a.raw.nan_to_num().equal(b.raw.nan_to_num())
    monkeypatch.undo()
    assert one.overlay(0).equal(other.overlay(0))
