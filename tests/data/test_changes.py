"""Sources that change between the listing and the reading: never the wrong picture, and never a neighbour's failure."""

import io
import os
import pickle
import tarfile
import threading

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("PIL")

import pyarrow
from pyarrow import parquet

from shapleycam import InputError
from shapleycam.data import tables
from shapleycam.data.files import RemoteFiles, _changed
from shapleycam.data.manifest import fingerprint_of, write_manifest
from shapleycam.data.sources import label_of, open_source

from ..attribute.conftest import save

CONTENTS = [bytes([n]) * 700 for n in range(6)]


def later(file):
    """A time of change that is not the one before, whatever the clock's steps."""
    at = os.stat(file)
    os.utime(file, ns=(at.st_atime_ns, at.st_mtime_ns + 10**9))


def write_tar(file, contents):
    with tarfile.open(file, "w") as tar:
        for n, content in enumerate(contents):
            member = tarfile.TarInfo(f"{n}.jpg")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_parquet(file, contents):
    parquet.write_table(pyarrow.table({"image": contents}), file, row_group_size=2, compression="none")


def write_arrow(file, contents):
    table = pyarrow.table({"image": contents})
    with pyarrow.ipc.new_file(str(file), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS = {"t.tar": write_tar, "t.parquet": write_parquet, "t.arrow": write_arrow}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("opened", [False, True])
def test_a_rewritten_shard_gives_no_other_picture(tmp_path, name, opened):
    """Of the same size, so that only the time tells; also where the file was open before."""
    file = tmp_path / name
    WRITERS[name](file, CONTENTS)
    source = open_source(file)
    entries, before = list(source.entries()), fingerprint_of(source)
    if opened:
        assert source.load(entries[1]) == CONTENTS[1]
    os.unlink(file)  # Arrow's files are mapped
    WRITERS[name](file, CONTENTS[::-1])
    later(file)
    with pytest.raises(InputError, match=rf"{name} is not what was listed: it was changed since"):
        source.load(entries[1])
    assert fingerprint_of(source) != before
    assert [source.load(entry) for entry in source.entries()] == CONTENTS[::-1]  # listed anew, it is read anew
    os.unlink(file)
    WRITERS[name](file, CONTENTS * 3)
    with pytest.raises(InputError, match=rf"{name} is not what was listed: it has \d+ bytes"):
        source.load(entries[1])


def test_a_file_that_was_overwritten_by_one_of_its_size(tmp_path):
    save(tmp_path / "a.bmp", 1)
    source = open_source(tmp_path)
    [entry] = source.entries()
    save(tmp_path / "a.bmp", 2)
    later(tmp_path / "a.bmp")
    with pytest.raises(InputError, match=r"a\.bmp is not what was listed: it was changed since"):
        source.load(entry)


@pytest.mark.parametrize("cell", ["path", "struct", "file://"])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_pictures_that_a_table_names_are_part_of_the_fingerprint(tmp_path, cell, kind):
    for n in range(3):
        save(tmp_path / "p" / f"{n}.bmp", n)
    paths = [f"{'file://' + str(tmp_path) + '/' if cell == 'file://' else ''}p/{n}.bmp" for n in range(3)] + [
        "p/gone.bmp",
        None,
    ]
    images = pyarrow.array(paths)
    if cell == "struct":
        kinds = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        images = pyarrow.array([{"bytes": None, "path": path} for path in paths], kinds)
    table = pyarrow.table({"image": images})
    file = tmp_path / f"t.{kind}"
    if kind == "parquet":
        parquet.write_table(table, file, row_group_size=2)
    else:
        with pyarrow.ipc.new_file(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    source = open_source(file)
    entries = list(source.entries())
    manifest = write_manifest(source, tmp_path / "m.parquet", 2)
    assert list(manifest) == entries and manifest.fingerprint == fingerprint_of(source)[0]
    assert [source.load(entry) for entry in entries[:3]] == [(tmp_path / "p" / f"{n}.bmp").read_bytes() for n in range(3)]
    for entry, message in ((entries[3], "gone.bmp cannot be read"), (entries[4], "no bytes and no path")):
        with pytest.raises(InputError, match=message):
            source.load(entry)
    save(tmp_path / "p" / "1.bmp", 11)
    later(tmp_path / "p" / "1.bmp")
    with pytest.raises(InputError, match=r"1\.bmp is not what was listed: it was changed since"):
        source.load(entries[1])
    save(tmp_path / "p" / "0.bmp", 0, (50, 40))
    with pytest.raises(InputError, match=r"0\.bmp is not what was listed: it has"):
        source.load(entries[0])
    assert source.load(entries[2]) and fingerprint_of(source)[0] != manifest.fingerprint


@pytest.mark.parametrize("kind", ["parquet", "parquet without statistics", "arrow"])
def test_a_picture_that_is_named_between_others_that_are_held_is_checked_too(tmp_path, kind):
    """Of the row with both a path and bytes the bytes are the picture, and the file of that name is nobody's."""
    for n in range(3):
        save(tmp_path / f"{n}.bmp", n)
    cells = [
        {"bytes": None, "path": "0.bmp"},
        {"bytes": CONTENTS[0], "path": "1.bmp"},
        {"bytes": CONTENTS[1], "path": None},
        None,
        {"bytes": b"", "path": "2.bmp"},
        {"bytes": CONTENTS[2], "path": "elsewhere.jpg"},
    ]
    table = pyarrow.table(
        {"image": pyarrow.array(cells, pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))}
    )
    file = tmp_path / f"t.{kind[:7].strip()}"
    if kind == "arrow":
        with pyarrow.ipc.new_file(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    else:
        parquet.write_table(table, file, row_group_size=3, write_statistics=kind == "parquet")
    source = open_source(file)
    entries, before = list(source.entries()), fingerprint_of(source)
    assert [entry.length >= 0 for entry in entries] == [True, False, False, False, True, False]
    named = [(tmp_path / f"{n}.bmp").read_bytes() for n in (0, 2)]
    held = [named[0], CONTENTS[0], CONTENTS[1], None, named[1], CONTENTS[2]]
    save(tmp_path / "1.bmp", 11, (50, 40))
    assert fingerprint_of(source) == before
    for entry, content in zip(entries, held, strict=True):
        if content is not None:
            assert source.load(entry) == content
    for n in (0, 2):
        save(tmp_path / f"{n}.bmp", 20 + n)
        later(tmp_path / f"{n}.bmp")
    for n in (0, 4):
        with pytest.raises(InputError, match=r"\.bmp is not what was listed: it was changed since"):
            source.load(entries[n])
    assert source.load(entries[1]) == CONTENTS[0] and fingerprint_of(source) != before


@pytest.mark.parametrize("order", [None, [3, 1, 0, 2]])
def test_pictures_that_a_data_set_of_hugging_face_names_are_checked(tmp_path, order):
    datasets = pytest.importorskip("datasets")
    for n in range(3):
        save(tmp_path / f"{n}.bmp", n)
    cells = [
        {"bytes": None, "path": str(tmp_path / "0.bmp")},
        {"bytes": CONTENTS[0], "path": None},
        {"bytes": None, "path": str(tmp_path / "2.bmp")},
        None,
    ]
    data = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image()}))
    places = order or [0, 1, 2, 3]
    source = open_source(data if order is None else data.select(order))
    assert (source._rows._indices is None) == (order is None)
    entries = dict(zip(places, source.entries(), strict=True))
    before = fingerprint_of(source)
    assert {n: entry.length >= 0 for n, entry in entries.items()} == {0: True, 1: False, 2: True, 3: False}
    assert source.load(entries[0]) == (tmp_path / "0.bmp").read_bytes() and source.load(entries[1]) == CONTENTS[0]
    for n in (0, 1):
        save(tmp_path / f"{n}.bmp", 20 + n)
        later(tmp_path / f"{n}.bmp")
    save(tmp_path / "2.bmp", 2, (50, 40))
    for n, said in ((0, "it was changed since"), (2, "it has")):
        with pytest.raises(InputError, match=rf"{n}\.bmp is not what was listed: {said}"):
            source.load(entries[n])
    assert source.load(entries[1]) == CONTENTS[0] and fingerprint_of(source) != before


def test_pictures_in_a_table_are_not_read_to_list_them(tmp_path, monkeypatch):
    """Also where no statistics say that every row has one, and a name that is no file's stands beside it."""
    cells = [{"bytes": content, "path": f"{n}.jpg"} for n, content in enumerate(CONTENTS)]
    kinds = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    parquet.write_table(
        pyarrow.table({"image": pyarrow.array(cells, kinds)}), tmp_path / "t.parquet", row_group_size=2, write_statistics=False
    )
    source, read, asked = open_source(tmp_path / "t.parquet"), tables._Pieces.read, []
    monkeypatch.setattr(
        tables._Pieces, "read", lambda self, index, columns: asked.append(columns) or read(self, index, columns)
    )
    assert [entry.length for entry in source.entries()] == [-1] * 6 and asked == [["image.path"]] * 3


def test_addresses_in_a_table_are_asked_for_at_reading_only(tmp_path):
    pytest.importorskip("fsspec")
    parquet.write_table(pyarrow.table({"path": ["nonsense://x/1.jpg"]}), tmp_path / "t.parquet")
    source = open_source(tmp_path / "t.parquet")
    [entry] = source.entries()
    with pytest.raises(InputError, match="fsspec cannot open it"):
        source.load(entry)


@pytest.mark.parametrize("name", ["p", "t.tar", "t.parquet"])
def test_what_a_store_says_of_a_file_is_part_of_the_fingerprint(tmp_path, name):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")

    def put(contents):
        if name == "p":
            for n, content in enumerate(contents):
                memory.pipe(f"/changes/p/{n}.jpg", content)
        else:
            WRITERS[name](tmp_path / name, contents)
            memory.pipe(f"/changes/{name}", (tmp_path / name).read_bytes())

    put(CONTENTS)
    before = fingerprint_of(open_source(f"memory://changes/{name}"))
    listed = open_source(f"memory://changes/{name}")
    entries, packed = list(listed.entries()), pickle.dumps(listed)
    assert fingerprint_of(open_source(f"memory://changes/{name}")) == before
    put(CONTENTS[::-1])
    source = open_source(f"memory://changes/{name}")
    assert fingerprint_of(source) != before
    if name != "p":  # for each picture it would be one more request
        for each in (source, listed, pickle.loads(packed)):  # a worker; whoever listed it; a worker of a process that did
            with pytest.raises(InputError, match="is not what was listed: it was changed since"):
                each.load(entries[1])
    memory.rm("/changes", recursive=True)


def test_quotes_are_no_change():
    # adlfs gives the ETag in quotes when it is asked for a file, and without in a listing.
    assert _changed({"etag": '"0x8D"'}) == _changed({"etag": "0x8D"}) != _changed({"etag": "0x8E"})


class Store:
    """A file system that is not there, as fsspec's behave."""

    def __getattr__(self, name):
        def fail(*_, **__):
            raise RuntimeError("no credentials")

        return fail


@pytest.mark.parametrize("ask", [RemoteFiles.is_folder, RemoteFiles.find, RemoteFiles.open, RemoteFiles.read])
def test_errors_of_a_store_are_ours(ask):
    with pytest.raises(InputError, match="shop://x cannot be read: RuntimeError: no credentials"):
        ask(RemoteFiles(Store(), "shop"), "x")
    with pytest.raises(InputError, match="no credentials"):
        list(RemoteFiles(Store(), "shop").walk("x"))


def test_a_shard_that_cannot_be_opened(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "x.tar").symlink_to("/nowhere/x.tar")
    with pytest.raises(InputError, match=r"x\.tar cannot be read: No such file"):
        list(open_source(tmp_path / "s").entries())


def test_moved_shards_are_read_where_they_are(tmp_path):
    """Entries name their shard relative to the source."""
    for name in ("t.tar", "t.parquet"):
        folder = tmp_path / name.replace(".", "")
        folder.mkdir()
        WRITERS[name](folder / name, CONTENTS)
        entries = list(open_source(folder).entries())
        assert {entry.path for entry in entries} == {name}
        assert (
            entries == list(open_source(folder / name).entries()) == list(open_source(f"{tmp_path}/{folder.name}/*").entries())
        )
        moved = folder.rename(tmp_path / f"moved-{folder.name}")
        assert [open_source(moved).load(entry) for entry in entries] == CONTENTS
        assert str(moved / name) in open_source(moved).locate(entries[0])


def test_a_slow_row_group_holds_up_nobody_else(tmp_path, monkeypatch):
    write_parquet(tmp_path / "t.parquet", CONTENTS)
    source = open_source(tmp_path / "t.parquet")
    entries, read = list(source.entries()), tables._Pieces.read
    begun, go = threading.Event(), threading.Event()

    def slow(self, index, columns):
        if index == 1:
            begun.set()
            assert go.wait(30)
        return read(self, index, columns)

    monkeypatch.setattr(tables._Pieces, "read", slow)
    found = []
    thread = threading.Thread(target=lambda: found.append(source.load(entries[2])))
    thread.start()
    assert begun.wait(30)
    others = threading.Thread(target=lambda: found.extend(source.load(entries[n]) for n in (0, 4, 5)))
    others.start()
    others.join(30)
    assert found == [CONTENTS[0], CONTENTS[4], CONTENTS[5]]
    go.set()
    thread.join(30)
    assert found[3] == CONTENTS[2]


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (None, None),
        ("7", "7"),
        (1.0, 1),
        (1.5, "1.5"),
        (float("nan"), None),
        (float("inf"), "inf"),
        (True, 1),
        (2**63, str(2**63)),
        (-(2**63), -(2**63)),
        (b"cat", "cat"),
        ([1], "[1]"),
    ],
)
def test_labels_of_any_type(tmp_path, value, label):
    assert label_of(value) == label and type(label_of(value)) is type(label)
    column = pyarrow.array([value], pyarrow.uint64() if value == 2**63 else None)
    parquet.write_table(pyarrow.table({"image": [b"x"], "kind": column}), tmp_path / "t.parquet")
    [entry] = write_manifest(open_source(tmp_path / "t.parquet", label="kind"), tmp_path / "m.parquet", 2)
    assert entry.label == label


def test_a_long_number_in_a_tar(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, content in (
            ("a.jpg", b"x"),
            ("a.cls", b"9" * 40),
            ("b.jpg", b"x"),
            ("b.cls", b" 12\n"),
            ("c.jpg", b"x"),
            ("c.cls", b"elk"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    manifest = write_manifest(open_source(tmp_path / "t.tar"), tmp_path / "m.parquet", 2)
    assert [entry.label for entry in manifest] == ["9" * 40, 12, "elk"]
