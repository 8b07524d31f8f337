"""The maps read back: here, in other readers of Parquet, and in other libraries."""

import pickle

import pytest
import torch

pytest.importorskip("pyarrow")
pytest.importorskip("PIL")

from PIL import Image

from shapleycam import InputError
from shapleycam.attribute import attribute, open_maps
from shapleycam.data.images import Preprocess
from shapleycam.data.sources import open_source
from shapleycam.model.zoo import Classifier

from ..helpers import network
from .conftest import NAMES, SETTINGS, SMALL


@pytest.fixture
def out(classifier, folder, tmp_path):
    attribute(classifier, folder, tmp_path / "maps", SETTINGS, shard_size=8)
    return tmp_path / "maps"


def test_rows_by_key_and_by_number(out):
    maps = open_maps(out)
    keys = list(maps.keys())
    assert len(maps) == len(keys) == 23 and [row.key for row in maps] == keys
    for n in (22, 0, 8, 7, 15, 16, 3):  # across parts, in no order
        assert maps[n].key == keys[n] and maps.index(keys[n]) == n and maps[keys[n]].path == maps[n].path
    assert maps[-1].key == keys[-1] and keys[4] in maps and "absent.jpg" not in maps and 3 not in maps
    with pytest.raises(InputError, match=r"has no picture 'absent.jpg'"):
        maps["absent.jpg"]
    with pytest.raises(IndexError, match="Row 23 is out of range"):
        maps[23]
    assert maps.statuses == {"ok": 21, "undecodable": 2} and maps.grid == (10, 12) and "23 of 23" in repr(maps)


def test_hashes_that_agree(out, monkeypatch):
    from shapleycam.attribute import rows

    monkeypatch.setattr(rows, "key_hash", lambda key: 7)
    maps = open_maps(out)
    assert [maps.index(key) for key in list(maps.keys())] == list(range(23)) and "absent.jpg" not in maps


def test_parts_that_are_not_there_yet(out):
    (out / "part-000001.parquet").unlink()
    keys = list(open_maps(out.parent / "maps").keys())
    maps = open_maps(out)
    assert len(maps) == 15 == len(keys) and [row.key for row in maps] == keys
    missing = [e.key for e in maps.manifest.shard(1)]
    assert not any(key in maps for key in missing)
    for file in out.glob("part-*"):
        file.unlink()
    with pytest.raises(InputError, match="no finished part yet"):
        open_maps(out)


def test_a_part_that_is_damaged(out):
    file = out / "part-000001.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    maps = open_maps(out)
    assert maps[0].key
    with pytest.raises(InputError, match=r"part-000001\.parquet cannot be read: .*run shapleycam attribute again"):
        maps[9]
    (out / "part-000001.parquet").write_bytes((out / "part-000002.parquet").read_bytes())
    with pytest.raises(InputError, match="not its rows"):
        open_maps(out)[9]


def test_a_data_set_of_torch(out):
    maps = open_maps(out)
    loader = torch.utils.data.DataLoader(maps, batch_size=5, collate_fn=lambda rows: torch.stack([row.raw for row in rows]))
    everything = torch.cat(list(loader))
    batches = torch.cat([raws for _, raws in maps.batches()])
    assert torch.equal(everything.nan_to_num(9.0), batches.nan_to_num(9.0)) and everything.shape == (23, 10, 12)
    assert pickle.loads(pickle.dumps(maps))["cat/04.png"].raw.equal(maps["cat/04.png"].raw)
    assert maps.numpy("map").dtype == "float16" and maps.numpy("scale").shape == (23,)
    assert list(maps.numpy("status")).count("ok") == 21


def test_heatmaps_in_both_frames(out):
    maps = open_maps(out)
    assert maps.heatmap("cat/04.png").shape == (20, 24) and maps.heatmap("cat/04.png", 7).shape == (7, 7)
    whole = maps.heatmap("cat/04.png", frame="image")
    assert whole.shape == (30, 40) and float(whole.max()) == pytest.approx(1)
    left, top, right, bottom = (round(side) for side in SMALL.box(40, 30))
    inside = torch.zeros(30, 40, dtype=torch.bool)
    inside[top:bottom, left:right] = True
    assert float(whole[~inside].abs().max()) == 0
    torch.testing.assert_close(whole[top:bottom, left:right], maps.heatmap("cat/04.png", (bottom - top, right - left)))
    assert maps.heatmap("cat/cut.png").isnan().all()
    with pytest.raises(InputError, match="no size: undecodable"):
        maps.heatmap("cat/cut.png", frame="image")
    for size in (0, (3, -1), (1, 2, 3), "big"):
        with pytest.raises(InputError, match="size must be"):
            maps.heatmap("cat/04.png", size)
    with pytest.raises(InputError, match="frame must be"):
        maps.heatmap("cat/04.png", frame="crop")


def test_the_frame_of_the_whole_picture_is_where_the_content_is(tmp_path):
    """A bright spot, left of the middle of a wide picture: in the whole picture's frame the map is where the spot is."""
    model = network(curved=False)
    with torch.no_grad():
        for module in (model[0], model[2], model[-1]):
            module.weight.abs_()
    image = Image.new("RGB", (90, 30))
    image.paste((255, 255, 255), (34, 6, 40, 12))
    (tmp_path / "p").mkdir()
    image.save(tmp_path / "p" / "spot.png")
    recipe = Preprocess((28, 28), 28, "bilinear", (0, 0, 0), (1, 1, 1))
    attribute(Classifier("toy", model, recipe, NAMES, "seeded"), tmp_path / "p", tmp_path / "m", SETTINGS)
    heat = open_maps(tmp_path / "m").heatmap("spot.png", frame="image")
    y, x = torch.meshgrid(torch.arange(30) + 0.5, torch.arange(90) + 0.5, indexing="ij")
    weight = (heat > 0.5).float()
    centre = float((weight * x).sum() / weight.sum()), float((weight * y).sum() / weight.sum())
    assert centre[0] == pytest.approx(37, abs=2.5) and centre[1] == pytest.approx(9, abs=2.5)


def test_overlays_read_the_source_again(out, folder, tmp_path):
    maps = open_maps(out)
    drawn = maps.overlay("cat/04.png", alpha=0.0)
    assert torch.equal(drawn, maps.view("cat/04.png").permute(1, 2, 0)) and not torch.equal(drawn, maps.overlay("cat/04.png"))
    with pytest.raises(InputError, match="not an image|undecodable|cannot be read"):
        maps.overlay("cat/cut.png")
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"no such folder.*open_maps\(.*source="):
        open_maps(out).overlay("cat/04.png")
    assert torch.equal(open_maps(out, source=moved).overlay("cat/04.png", alpha=0.0), drawn)


def test_readers_of_parquet(out):
    pandas, polars, duckdb = (pytest.importorskip(name) for name in ("pandas", "polars", "duckdb"))
    from pyarrow import dataset

    maps = open_maps(out)
    row = maps["cat/04.png"]
    expected, scale = row.raw, float(maps.numpy("scale")[maps.index("cat/04.png")])
    files = [str(file) for file in sorted(out.glob("part-*"))]

    frame = pandas.concat([pandas.read_parquet(file) for file in files], ignore_index=True)
    found = frame[frame.key == "cat/04.png"].iloc[0]
    assert found.target == row.target and len(frame) == 23
    torch.testing.assert_close(torch.from_numpy(found["map"].astype("float32")).view(10, 12) * scale, expected)

    table = dataset.dataset(files).to_table(filter=dataset.field("key") == "cat/04.png")
    stored = torch.from_numpy(table.column("map").combine_chunks().to_numpy_ndarray().astype("float32"))
    torch.testing.assert_close(stored[0] * scale, expected)

    other = polars.concat([polars.read_parquet(file) for file in files]).filter(polars.col("key") == "cat/04.png")
    values = torch.tensor(other["map"].ext.storage().to_list()[0])
    torch.testing.assert_close(values.view(10, 12) * scale, expected)

    [(target, values)] = duckdb.sql(f"SELECT target, map FROM read_parquet({files}) WHERE key = 'cat/04.png'").fetchall()
    assert target == row.target
    torch.testing.assert_close(torch.tensor(values).view(10, 12) * scale, expected)
    counted = duckdb.sql(f"SELECT status, count(*) FROM read_parquet({files}) GROUP BY status").fetchall()
    assert dict(counted) == maps.statuses


@pytest.mark.slow
def test_hugging_face(out, tmp_path, classifier, folder):
    datasets = pytest.importorskip("datasets")
    maps = open_maps(out)
    memory = maps.to_hf()
    written = maps.to_hf(tmp_path / "hf")
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "hf" / "*.parquet"), split="train", cache_dir=str(tmp_path / "c")
    )
    for data in (memory, written, loaded):
        assert len(data) == 23 and data["key"][:23] == list(maps.keys())
        assert data is loaded or data.features["map"].shape == (10, 12)
        row = data.with_format("torch")[maps.index("cat/04.png")]
        torch.testing.assert_close(row["map"].float() * row["scale"], maps["cat/04.png"].raw)
        assert data[maps.index("cat/cut.png")]["target"] is None
    # There and back: a data set's own pictures, with its labels.
    cells = [{"bytes": (folder / key).read_bytes(), "path": None} for key in ("cat/04.png", "bee/00.png")]
    data = datasets.Dataset.from_dict({"image": cells, "id": ["a", "b"]}).cast_column("image", datasets.Image())
    attribute(classifier, open_source(data, key="id"), tmp_path / "again", SETTINGS)
    again = open_maps(tmp_path / "again", source=data)
    torch.testing.assert_close(again["a"].raw, maps["cat/04.png"].raw)
    assert torch.equal(again.overlay("a"), maps.overlay("cat/04.png"))


def test_quantus_s_a_batch(out):
    maps = open_maps(out)
    batch = maps.to_quantus(["cat/04.png", "bee/00.png"])
    assert batch.shape == (2, 1, 20, 24) and batch.dtype == "float32" and float(batch.max()) == pytest.approx(1)
    torch.testing.assert_close(torch.from_numpy(batch[1, 0]), maps.heatmap("bee/00.png"))
    assert maps.to_quantus().shape == (21, 1, 20, 24)
    with pytest.raises(InputError, match="has no map"):
        maps.to_quantus(["cat/cut.png"])


class Collected:
    """In the place of a data set of FiftyOne's, which needs a MongoDB server; the samples in it are FiftyOne's own."""

    def __init__(self):
        self.samples, self.info, self.saved = [], {}, 0

    def __len__(self):
        return 0

    def add_samples(self, samples):
        self.samples += samples

    def save(self):
        self.saved += 1


@pytest.mark.slow
def test_fiftyone(out, tmp_path):
    fiftyone = pytest.importorskip("fiftyone")
    maps, collected = open_maps(out), Collected()
    assert maps.to_fiftyone(tmp_path / "png", dataset=collected) is collected and collected.saved == 1
    assert len(collected.samples) == 23 and all(isinstance(sample, fiftyone.Sample) for sample in collected.samples)
    samples = {sample.filepath: sample for sample in collected.samples}
    row = maps["cat/04.png"]
    sample = samples[row.path]
    assert sample["ground_truth"].label == "cat" and sample["shapleycam_prediction"].label == maps.class_name(row.target)
    heat = sample["shapleycam"]
    assert isinstance(heat, fiftyone.Heatmap) and heat.range == [0, 255]
    with Image.open(heat.map_path) as png:
        assert png.mode == "L" and png.size == (40, 30)
        values = torch.frombuffer(bytearray(png.tobytes()), dtype=torch.uint8).view(30, 40).float() / 255
    torch.testing.assert_close(values, maps.heatmap("cat/04.png", frame="image"), atol=0.002, rtol=0)
    bad = samples[maps["cat/cut.png"].path]
    assert bad["shapleycam_status"] == "undecodable" and not bad.has_field("shapleycam")
