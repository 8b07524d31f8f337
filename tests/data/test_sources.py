"""Sources: what is listed, in what order, under which key, and that its bytes come back."""

import io
import os
import pickle
import tarfile

import pytest
import torch

pytest.importorskip("pyarrow")
pytest.importorskip("PIL")

import pyarrow
from pyarrow import parquet

from shapleycam import InputError
from shapleycam.data import files as files_module
from shapleycam.data.files import LocalFiles, files_of, matches, shown
from shapleycam.data.images import Preprocess, image_files
from shapleycam.data.manifest import fingerprint_of, write_manifest
from shapleycam.data.samples import open_samples
from shapleycam.data.sources import Entry, open_source

from ..attribute.conftest import save


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    for n, name in enumerate(("b/2.jpg", "b-c/1.png", "b/10.jpg", "a.jpg", "B/x.webp", "b/deep/er/3.bmp")):
        save(root / name, n)
    (root / "b" / "notes.txt").write_text("no")
    save(root / ".hidden" / "h.jpg", 9)
    save(root / "b" / ".h.jpg", 9)
    return root


KEYS = ["B/x.webp", "a.jpg", "b-c/1.png", "b/10.jpg", "b/2.jpg", "b/deep/er/3.bmp"]


def contents(source):
    return {entry.key: source.load(entry) for entry in source.entries()}


def test_a_folder_by_relative_path(folder):
    source = open_source(folder)
    entries = list(source.entries())
    assert [entry.key for entry in entries] == KEYS == sorted(KEYS)
    assert [entry.label for entry in entries] == ["B", None, "b-c", "b", "b", "b"]
    assert contents(source) == {key: (folder / key).read_bytes() for key in KEYS}
    assert all(entry.size == (folder / entry.key).stat().st_size for entry in entries)
    assert [path.as_posix() for path in image_files(folder, recursive=True)] == KEYS
    assert [path.as_posix() for path in image_files(folder)] == ["a.jpg"]
    assert list(pickle.loads(pickle.dumps(source)).entries()) == entries
    assert [entry.key for entry in open_source(folder, recursive=False).entries()] == ["a.jpg"]


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("**/*.jpg", ["a.jpg", "b/10.jpg", "b/2.jpg"]),
        ("b/*", ["b/10.jpg", "b/2.jpg"]),
        ("*/*.{png,webp}", ["B/x.webp", "b-c/1.png"]),
        ("b/{1..10}.jpg", ["b/10.jpg", "b/2.jpg"]),
        ("[a-b]/?.jpg", ["b/2.jpg"]),
        ("b/**/*", ["b/10.jpg", "b/2.jpg", "b/deep/er/3.bmp"]),
        ("b/**", ["b/10.jpg", "b/2.jpg", "b/deep/er/3.bmp"]),
        ("*", ["a.jpg"]),
    ],
)
def test_patterns(folder, pattern, keys):
    assert [entry.key.removeprefix("b/") for entry in open_source(f"{folder}/{pattern}").entries()] == [
        key.removeprefix("b/") for key in keys
    ]
    assert set(contents(open_source(f"{folder}/{pattern}")).values()) == {(folder / key).read_bytes() for key in keys}


def test_what_matches():
    assert matches("a\nb.jpg", "*.jpg") and matches("a]b", "a[]]b") and matches("s-007.tar", "s-{000..010}.tar")
    assert not matches("s-011.tar", "s-{000..010}.tar") and not matches("a/b.jpg", "*.jpg") and not matches("a1", "[!a]?")
    assert matches("a.b", "a.b") and not matches("axb", "a.b") and matches("(a)+$", "(a)+$")
    assert matches("a/b.jpg", "**") and matches("a.jpg", "**") and matches("a/b/c.jpg", "a/**") and not matches("b/c", "a/**")


def test_a_pattern_is_worked_out_once(monkeypatch):
    """Braces of a thousand names, for each of a thousand names, would take minutes."""
    calls = []
    braces = files_module._braces
    monkeypatch.setattr(files_module, "_braces", lambda pattern: calls.append(pattern) or braces(pattern))
    assert all(matches(f"once-{n:04}.tar", "once-{0000..1200}.tar") for n in range(0, 1200, 100))
    assert calls.count("once-{0000..1200}.tar") == 1


HOSTILE = [
    "new\nline.jpg",
    "quote'\".jpg",
    "<script>alert(1)</script>.jpg".replace("/", "∕"),
    "comma,;tab\t.jpg",
    "ümläut 猫.jpg",
    "=1+1.jpg",
]


def test_hostile_names(tmp_path):
    for n, name in enumerate(HOSTILE):
        save(tmp_path / "p" / name, n)
    raw = os.path.join(os.fsencode(tmp_path), b"p", b"\xff\xfe.jpg")
    with open(raw, "wb") as file:
        file.write((tmp_path / "p" / HOSTILE[0]).read_bytes())
    source = open_source(tmp_path / "p")
    manifest = write_manifest(source, tmp_path / "m.parquet", 3)
    entries = list(manifest)
    assert entries == list(source.entries())
    assert {entry.key for entry in entries} == {*HOSTILE, r"\xff\xfe.jpg"}
    for entry in entries:
        assert source.load(entry)
        entry.key.encode()  # every key is text that every encoding has
        source.locate(entry).encode()
    assert shown("a\udcffb") == r"a\xffb" and shown("ü\n") == "ü\n"


def test_links(folder, tmp_path):
    (folder / "again").symlink_to(folder / "b-c")  # another way to the same files: both are listed
    (folder / "b-c" / "loop").symlink_to(folder)  # a way back: not followed
    (folder / "self.jpg").symlink_to(folder / "self.jpg")
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    source = open_source(folder)
    found = {entry.key: entry for entry in source.entries()}
    assert set(found) == {*KEYS, "again/1.png", "self.jpg", "gone.jpg"}
    assert source.load(found["again/1.png"]) == (folder / "b-c" / "1.png").read_bytes()
    for key in ("self.jpg", "gone.jpg"):
        assert found[key].size == -1
        with pytest.raises(InputError, match="cannot be read"):
            source.load(found[key])


def test_what_happens_between_listing_and_reading(folder, tmp_path):
    source = open_source(folder)
    gone, grown, piped = [next(e for e in source.entries() if e.key == key) for key in ("a.jpg", "b/2.jpg", "b/10.jpg")]
    (folder / "a.jpg").unlink()
    with open(folder / "b/2.jpg", "ab") as file:
        file.write(b"more")
    (folder / "b/10.jpg").unlink()
    os.mkfifo(folder / "b/10.jpg")  # opening it would wait for ever
    with pytest.raises(InputError, match="a.jpg cannot be read: No such file"):
        source.load(gone)
    with pytest.raises(InputError, match=r"b/2\.jpg is not what was listed: it has \d+ bytes, and had \d+"):
        source.load(grown)
    with pytest.raises(InputError, match="no regular file"):
        source.load(piped)
    assert "b/10.jpg" not in {entry.key for entry in source.entries()}


def rows(folder):
    return [(folder / key).read_bytes() for key in KEYS]


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "arrow file"])
@pytest.mark.parametrize("cell", ["bytes", "struct", "paths", "struct of paths"])
def test_tables(folder, tmp_path, kind, cell):
    images = {
        "bytes": rows(folder),
        "struct": [{"bytes": content, "path": key} for content, key in zip(rows(folder), KEYS, strict=True)],
        "paths": [f"pictures/{key}" for key in KEYS],
        "struct of paths": [{"bytes": None, "path": str(folder / key)} for key in KEYS],
    }[cell]
    table = pyarrow.table({"text": ["t"] * 6, "image": images, "label": [3, 1, 2, 0, 1, None], "name": KEYS})
    if cell == "struct of paths":
        kinds = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        table = table.set_column(1, "image", pyarrow.array(images, kinds))
    file = tmp_path / f"t.{'parquet' if kind == 'parquet' else 'arrow'}"
    if kind == "parquet":
        parquet.write_table(table, file, row_group_size=4)
    else:
        new = pyarrow.ipc.new_stream if kind == "arrow stream" else pyarrow.ipc.new_file
        with new(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    source = open_source(file)
    entries = list(source.entries())
    assert [entry.key for entry in entries] == [f"{file.name}:{n}" for n in range(6)]
    assert [entry.label for entry in entries] == [3, 1, 2, 0, 1, None]
    assert [source.load(entry) for entry in reversed(entries)] == rows(folder)[::-1]
    copy = pickle.loads(pickle.dumps(source))
    assert copy.load(entries[5]) == rows(folder)[5]
    named = open_source(file, key="name", image="image", label="text")
    assert [(entry.key, entry.label) for entry in named.entries()] == [(key, "t") for key in KEYS]


def test_a_folder_of_tables(folder, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    table = pyarrow.table({"image": rows(folder)})
    parquet.write_table(table.slice(0, 4), shards / "b.parquet", row_group_size=3)
    parquet.write_table(table.slice(4), shards / "c.parquet")
    expected = ["b.parquet:0", "b.parquet:1", "b.parquet:2", "b.parquet:3", "c.parquet:0", "c.parquet:1"]
    for address in (shards, f"{shards}/*.parquet", f"{shards}/{{b..c}}.parquet".replace("{b..c}", "{b,c}")):
        source = open_source(address)
        assert [entry.key for entry in source.entries()] == expected
        assert list(contents(source).values()) == rows(folder)
    parquet.write_table(pyarrow.table({"other": rows(folder)}), shards / "d.parquet")
    with pytest.raises(InputError, match="has other columns than"):
        open_source(shards)


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ({"a": [b"x"], "b": [b"y"]}, {}, "needs one column of encoded images"),
        ({"a": [1]}, {}, "needs one column of encoded images"),
        ({"image": [b"x"]}, {"key": "name"}, "no column 'name'; it has"),
        ({"image": [b"x"]}, {"image": "picture"}, "no column 'picture'"),
    ],
)
def test_tables_that_cannot_serve(tmp_path, table, options, message):
    parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=message):
        open_source(tmp_path / "t.parquet", **options)


def test_cells_without_a_picture(tmp_path):
    parquet.write_table(pyarrow.table({"image": [b"", None, b"x"]}), tmp_path / "t.parquet")
    source = open_source(tmp_path / "t.parquet")
    first, second, third = source.entries()
    for entry in (first, second):
        with pytest.raises(InputError, match="no bytes and no path"):
            source.load(entry)
    assert source.load(third) == b"x"


def pack(file, members):
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_tars_in_webdataset_s_manner(folder, tmp_path):
    one, two, three = rows(folder)[:3]
    pack(
        tmp_path / "s-0.tar",
        [("n/000.jpg", one), ("n/000.cls", b"7\n"), ("n/000.json", b"{}"), ("n/001.cls", b"5"), ("n/001.seg.png", two)],
    )
    pack(
        tmp_path / "s-1.tar", [("dir.with.dots/002.png", three), ("readme", b"no"), ("003.txt", b"no picture"), (".x.jpg", one)]
    )
    for address in (tmp_path, f"{tmp_path}/s-{{0..1}}.tar", f"{tmp_path}/*.tar"):
        source = open_source(address)
        entries = list(source.entries())
        assert [(entry.key, entry.label) for entry in entries] == [("n/000", 7), ("n/001", 5), ("dir.with.dots/002", None)]
        assert [source.load(entry) for entry in entries[::-1]] == [three, two, one]
    webdataset = pytest.importorskip("webdataset")
    read = list(webdataset.WebDataset([str(tmp_path / "s-0.tar")], shardshuffle=False))
    assert [sample["__key__"] for sample in read] == ["n/000", "n/001"] and read[0]["jpg"] == one
    with open(tmp_path / "s-0.tar", "r+b") as file:
        file.truncate(600)
    with pytest.raises(InputError, match=r"s-0\.tar is not what was listed: it has 600 bytes"):
        source.load(entries[0])
    with pytest.raises(InputError, match=r"s-0\.tar ends before byte"):
        source.load(entries[0]._replace(size=-1, changed=0))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar_with_a_damaged_header_is_no_shorter_tar(tmp_path, form):
    """Python's tarfile takes such a header for the end."""
    with tarfile.open(tmp_path / "t.tar", "w", format=form) as tar:
        for n in range(4):
            member = tarfile.TarInfo("d" * 60 + f"/{n:060}.jpg")
            member.size = 700
            tar.addfile(member, io.BytesIO(bytes([n]) * 700))
    source = open_source(tmp_path / "t.tar")
    entries = list(source.entries())
    assert len(entries) == 4
    content = (tmp_path / "t.tar").read_bytes()
    third = entries[2].offset - 512
    # Behind a header of its own for a long name, tarfile does raise.
    said = (
        r"t\.tar is not a plain tar file"
        if form != tarfile.USTAR_FORMAT
        else rf"t\.tar is damaged: .* at byte {third}, and no end"
    )
    for damaged in (content[: third + 148] + b"XXXXXXXX" + content[third + 156 :], content[: third + 100]):  # a checksum; a cut
        (tmp_path / "t.tar").write_bytes(damaged)
        with pytest.raises(InputError, match=said):
            list(source.entries())
    (tmp_path / "t.tar").write_bytes(content.rstrip(b"\0") + bytes(-len(content.rstrip(b"\0")) % 512))  # written without an end
    assert len(list(source.entries())) == 4


def test_tars_that_cannot_serve(folder, tmp_path):
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.add(folder / "a.jpg", "a.jpg")
    with pytest.raises(InputError, match="not a plain tar file"):
        list(open_source(tmp_path / "z.tar").entries())
    parquet.write_table(pyarrow.table({"image": rows(folder)}), tmp_path / "z.parquet")
    with pytest.raises(InputError, match=r"mixes parquet and tar files"):
        open_source(f"{tmp_path}/z.*")


@pytest.mark.parametrize("kind", ["tar", "table"])
def test_keys_that_stand_twice_are_refused(folder, tmp_path, kind):
    one, two = rows(folder)[:2]
    if kind == "tar":
        pack(tmp_path / "a.tar", [("x.jpg", one), ("y.jpg", two)])
        pack(tmp_path / "b.tar", [("y.jpg", one)])
        source = open_source(f"{tmp_path}/*.tar")
    else:
        parquet.write_table(pyarrow.table({"image": [one, two, one], "id": ["x", "y", "y"]}), tmp_path / "t.parquet")
        source = open_source(tmp_path / "t.parquet", key="id")
    with pytest.raises(InputError, match=r"1 pictures have the key of another \('y'\)"):
        write_manifest(source, tmp_path / "m.parquet", 2)
    assert not (tmp_path / "m.parquet").exists() and not list(tmp_path.glob(".m*"))


def test_fsspec(folder, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for key in KEYS:
        memory.pipe(f"/bucket/pictures/{key}", (folder / key).read_bytes())
    parquet.write_table(pyarrow.table({"image": rows(folder)}), tmp_path / "t.parquet", row_group_size=4)
    pack(tmp_path / "t.tar", [(f"{n}.jpg", content) for n, content in enumerate(rows(folder))])
    for name in ("t.parquet", "t.tar"):
        memory.pipe(f"/bucket/{name}", (tmp_path / name).read_bytes())
    local = contents(open_source(folder))
    assert contents(open_source("memory://bucket/pictures")) == contents(open_source(f"file://{folder}")) == local
    assert set(contents(open_source("memory://bucket/pictures/**/*.jpg"))) == {"a.jpg", "b/10.jpg", "b/2.jpg"}
    assert list(contents(open_source("memory://bucket/t.parquet")).values()) == rows(folder)
    assert list(contents(open_source("memory://bucket/t.tar")).values()) == rows(folder)
    source = open_source("memory://bucket/pictures")
    assert [entry.label for entry in source.entries()] == ["B", None, "b-c", "b", "b", "b"]
    with pytest.raises(InputError, match="memory://.*cannot be read"):
        source.load(Entry("x", "absent.jpg"))
    with pytest.raises(InputError, match="no such folder or file"):
        open_source("memory://bucket/absent")
    with pytest.raises(InputError, match="fsspec cannot open"):
        files_of("nonsense://x")
    memory.rm("/bucket", recursive=True)


def test_hugging_face(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"]), "id": datasets.Value("string")}
    )
    cells = [{"bytes": content, "path": None} for content in rows(folder)]
    data = datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 0, 1, 0, 1], "id": KEYS}, features=features)
    source = open_source(data)
    assert [(entry.key, entry.label) for entry in source.entries()][:2] == [("00000000", "cat"), ("00000001", "dog")]
    assert list(contents(source).values()) == rows(folder)
    assert list(contents(open_source(data, key="id"))) == KEYS
    assert fingerprint_of(open_source(data)) != fingerprint_of(open_source(data.select(range(5))))
    # As it saves them: Parquet, and a folder of Arrow files.
    data.to_parquet(tmp_path / "hf.parquet")
    data.save_to_disk(tmp_path / "saved", num_shards=2)
    assert list(contents(open_source(tmp_path / "hf.parquet")).values()) == rows(folder)
    saved = open_source(tmp_path / "saved")
    assert list(contents(saved).values()) == rows(folder) and [entry.label for entry in saved.entries()] == [0, 1, 0, 1, 0, 1]
    with pytest.raises(InputError, match="random access"):
        open_source(data.to_iterable_dataset())
    with pytest.raises(InputError, match="no column 'nothing'"):
        open_source(data, key="nothing")
    with pytest.raises(InputError, match="Name the column"):
        open_source(datasets.Dataset.from_dict({"x": [1]}))
    assert [entry.label for entry in open_source(data, label="id").entries()] == KEYS
    with pytest.raises(InputError, match="no column 'fine'"):
        open_source(data, label="fine")
    swapped = data.select([1, 0])
    with pytest.raises(InputError, match="is not what was listed: the row is"):
        open_source(swapped, key="id").load(next(open_source(data, key="id").entries()))


def test_evaluation_reads_the_same_sources(folder, tmp_path):
    small = Preprocess((20, 24), 28)
    pack(tmp_path / "t.tar", [(f"{n:03}.{key.rpartition('.')[2]}", (folder / key).read_bytes()) for n, key in enumerate(KEYS)])
    files, tar = open_samples(folder, small), open_samples(tmp_path / "t.tar", small)
    assert all(
        torch.equal(a.view, b.view) for a, b in zip((files[i] for i in range(6)), (tar[i] for i in range(6)), strict=True)
    )
    assert files.labels == ("B", "b", "b-c") and tar[0].name == "000"


@pytest.mark.parametrize("address", ["absent", "absent/*.jpg", "a.txt", ""])
def test_nothing_there(tmp_path, address, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="no such folder|nothing matches|neither a folder"):
        open_source(address)
    assert LocalFiles().find("nul\0byte") is None
