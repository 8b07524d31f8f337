"""What a job must survive: signals, kill -9 at random moments, a full disk, files that hang or vanish."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import ClassVar

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("PIL")
pytest.importorskip("typer")

from shapleycam import JobError
from shapleycam.attribute import attribute, open_maps
from shapleycam.data.sources import PictureFolder, open_source

from . import driver
from .conftest import SETTINGS, save
from .test_job import same, table


def arguments(folder, out, *more):
    return ["attribute", str(folder), "--out", str(out), "--layer", "3", "--batch-size", "4", "--shard-size", "6", *more]


def start(folder, out, *more, sleep=0.0, **options):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "tests.attribute.driver", *arguments(folder, out, *more)]
    environment = {**os.environ, "SHAPLEYCAM_TEST_SLEEP": str(sleep)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options)


def wait_for(condition, process, seconds=100):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM])
def test_signals_end_it_and_it_goes_on(folder, tmp_path, number, monkeypatch):
    """The network sleeps, so that the signal falls between two parts."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with start(folder, stopped, "--json", sleep=0.3) as process:
        wait_for(lambda: (stopped / "part-000000.parquet").exists(), process)
        process.send_signal(number)
        printed, said = process.communicate(timeout=100)
    assert process.returncode == 128 + number and "Traceback" not in said and "the same command goes on" in said
    found = json.loads(printed)
    assert found["interrupted"] and 1 <= found["parts_done"] < found["parts"] == 4
    assert not [file for file in os.listdir(stopped) if file.endswith(".part")]
    monkeypatch.setattr(driver.command, "load_classifier", None)  # put back behind the test
    for out in (stopped, whole):
        assert driver.main(arguments(folder, out)) == 3  # two pictures are broken
    assert same(stopped, whole)


@pytest.mark.slow
def test_a_signal_ends_a_batch_that_takes_for_ever(folder, tmp_path):
    out = tmp_path / "maps"
    with start(folder, out, sleep=3600) as process:
        wait_for(lambda: (out / "job.json").exists(), process)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM


# ------------------------------------------------------------------------------------------------------------- kill -9


def chaos(folder, tmp_path, rounds, more=(), victim=None):
    """Kill a forked run again and again, at random moments; what the last run leaves is what an undisturbed one leaves.

    A fork has all imports behind it, so that the moments fall into the work. Returns how often it was killed at work.
    """
    from .driver import main

    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert run_forked(main, arguments(folder, whole, *more)) == 3
    chance, killed = random.Random(rounds), 0
    for _ in range(rounds):
        pid = fork(main, arguments(folder, out, *more))
        time.sleep(chance.uniform(0.02, 0.5))
        target = victim(pid, chance) if victim else pid
        if target is not None:
            os.kill(target, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            killed += 1
        elif out.exists() and len(list(out.glob("part-*"))) == len(list(whole.glob("part-*"))):
            assert same(whole, out)  # it was quicker
            shutil.rmtree(out)
    assert run_forked(main, arguments(folder, out, *more)) == 3
    assert same(whole, out)
    keys = [row["key"] for row in table(out).select(["key"]).to_pylist()]
    assert sorted(keys) == sorted(entry.key for entry in open_source(folder).entries())
    assert not [file for file in os.listdir(out) if file.endswith(".part")]
    return killed


def fork(main, argv):
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        status = main(argv)
    finally:
        os._exit(status)


def run_forked(main, argv):
    return os.waitstatus_to_exitcode(os.waitpid(fork(main, argv), 0)[1])


@pytest.fixture
def many(folder):
    for n in range(60):
        save(folder / "many" / f"{n:03}.jpg", 100 + n, (90, 70))
    return folder


# In a process of its own: a fork of one that has threads may hang.
CHAOS = """
import pathlib, sys
from tests.attribute.test_faults import chaos
print(chaos(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])))
"""


def chaos_of_its_own(folder, tmp_path, rounds, code=CHAOS):
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path), str(rounds)],
        capture_output=True,
        text=True,
        timeout=30 + 5 * rounds,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout)


@pytest.mark.slow
def test_kill_9_of_the_driver(many, tmp_path):
    assert chaos_of_its_own(many, tmp_path, 5) >= 2


@pytest.mark.long
def test_kill_9_of_the_driver_a_hundred_times(many, tmp_path):
    assert chaos_of_its_own(many, tmp_path, 100) >= 50


# ---------------------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("needs the right to mount a file system; the quota stands in for it in the next test")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(classifier, many, small_disk, tmp_path):
    out = small_disk / "maps"
    filler = small_disk / "filler"
    filler.write_bytes(b"0" * 20_000)
    with pytest.raises(JobError, match=r"part-.*cannot be written: .*No space left.*the same command goes on"):
        attribute(classifier, many, out, SETTINGS, shard_size=6)
    parts = list(out.glob("part-*"))
    assert 0 < len(parts) < 14 and not list(out.glob(".part-*"))
    assert len(open_maps(out)) == 6 * len(parts)
    filler.unlink()
    shutil.copytree(out, tmp_path / "maps")  # to a disk with room
    assert attribute(classifier, many, tmp_path / "maps", SETTINGS, shard_size=6).resumed == 6 * len(parts)
    attribute(classifier, many, tmp_path / "whole", SETTINGS, shard_size=6)
    assert same(tmp_path / "maps", tmp_path / "whole")


def test_no_room_for_the_manifest(classifier, many, small_disk):
    (small_disk / "filler").write_bytes(b"0" * 57_000)
    with pytest.raises(JobError, match="cannot be written: No space left"):
        attribute(classifier, many, small_disk / "maps", SETTINGS)
    assert set(os.listdir(small_disk / "maps")) <= {".lock", "manifest.parquet"}
    (small_disk / "filler").unlink()
    assert attribute(classifier, many, small_disk / "maps", SETTINGS, shard_size=200).done == 1


@pytest.mark.slow
def test_a_quota(many, tmp_path):
    """A limit on the size of files, which needs no rights: a part does not fit, and is not there."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    out = tmp_path / "maps"
    with start(many, out, "--shard-size", "40", "--layer", "0", preexec_fn=limited) as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and "cannot be written: " in said and "Traceback" not in said
    assert not list(out.glob("part-*")) and not list(out.glob(".part-*"))


# -------------------------------------------------------------------------------------------------- files that misbehave


class Sick(PictureFolder):
    """Some files hang, one raises what nobody expects, one is gone."""

    sick: ClassVar[dict] = {}

    def load(self, entry):
        name = entry.key.rpartition("/")[2]
        if name in self.sick:
            self.sick[name]()
        return super().load(entry)


def test_files_that_hang_vanish_or_surprise(classifier, folder, tmp_path):
    never = threading.Event()

    def gone():
        (folder / "cat" / "04.png").unlink(missing_ok=True)

    def surprise():
        raise ZeroDivisionError("of a library")

    healthy = tmp_path / "healthy"
    attribute(classifier, folder, healthy, SETTINGS)
    source = open_source(folder)
    sick = Sick(source.files, source.folder, source.address)
    sick.sick = {"03.jpg": never.wait, "06.png": never.wait, "04.png": gone, "05.jpg": surprise}
    try:
        outcome = attribute(classifier, sick, tmp_path / "maps", replace(SETTINGS, time_limit=0.5, threads=1))
    finally:
        never.set()
    assert outcome.kinds == {"ok": 17, "timeout": 2, "undecodable": 2, "unexpected": 1, "unreadable": 1}
    maps, well = open_maps(tmp_path / "maps"), open_maps(healthy)
    errors = {row.key: row.error for row in maps if row.status != "ok"}
    assert errors["bee/03.jpg"] == errors["bee/06.png"] == "took longer than the limit of 0.5 s."
    assert "No such file" in errors["cat/04.png"] and errors["unicorn/05.jpg"] == "ZeroDivisionError: of a library"
    for row in maps:  # the others' maps are what they were
        if row.status == "ok":
            assert row.raw.equal(well[row.key].raw)


def test_storage_that_hangs_ends_the_job(classifier, folder, tmp_path, monkeypatch):
    from shapleycam.attribute import feed

    monkeypatch.setattr(feed, "_HANGING", 3)
    never = threading.Event()
    source = open_source(folder)
    sick = Sick(source.files, source.folder, source.address)
    sick.sick = {f"{n:02}.{('png', 'jpg')[n % 2]}": never.wait for n in range(1, 20) if n % 3}
    try:
        with pytest.raises(JobError, match="3 files took longer than 0.2 s, and still hang"):
            attribute(classifier, sick, tmp_path / "maps", replace(SETTINGS, time_limit=0.2))
    finally:
        never.set()


def test_files_that_come_back_do_not_count_as_hanging(classifier, folder, tmp_path, monkeypatch):
    """Each comes back when the next but one is begun, so that three hang at once, at most, and seven in all."""
    from shapleycam.attribute import feed

    monkeypatch.setattr(feed, "_HANGING", 4)
    monkeypatch.setattr(feed, "_TICK", 0.02)
    source = open_source(folder)
    names = [entry.key.rpartition("/")[2] for entry in source.entries()][8:15]
    events = [threading.Event() for _ in range(len(names) + 2)]

    def slow(n):
        def wait():
            events[n].set()
            assert events[n + 2].wait(30)

        return wait

    sick = Sick(source.files, source.folder, source.address)
    sick.sick = {name: slow(n) for n, name in enumerate(names)}
    try:
        outcome = attribute(classifier, sick, tmp_path / "maps", replace(SETTINGS, time_limit=0.2, threads=1))
    finally:
        for event in events:
            event.set()
    assert outcome.kinds["timeout"] >= len(names) == 7


def test_nobody_is_left_when_it_is_over(classifier, folder, tmp_path):
    before = threading.active_count()
    for n in range(3):
        attribute(classifier, folder, tmp_path / str(n), replace(SETTINGS, threads=3))
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
