"""Several processes, and Ray: the same bits as one process, whoever dies; nobody is left behind."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("PIL")

from shapleycam import InputError, JobError
from shapleycam.attribute import attribute
from shapleycam.data.sources import PictureFolder, open_source

from .conftest import SETTINGS
from .test_faults import many, start, wait_for  # noqa: F401
from .test_job import same

TWO = ("cpu", "cpu")


def children(pid):
    """All processes below one, by id."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == pid:
                found += [int(entry.name), *children(int(entry.name))]
    return found


def alive(pids):
    def running(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    return [pid for pid in pids if running(pid)]


class Deadly(PictureFolder):
    """A picture that kills the process that decodes it: once, or always."""

    def load(self, entry):
        if entry.key == "cat/04.png" and os.getpid() != self.home and (self.always or not self.mark.exists()):
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(entry)


def deadly(folder, mark, always):
    source = open_source(folder)
    made = Deadly(source.files, source.folder, source.address)
    made.home, made.mark, made.always = os.getpid(), mark, always
    return made


@pytest.mark.slow
def test_two_processes_are_one_also_where_one_is_killed(classifier, many, tmp_path):  # noqa: F811
    attribute(classifier, many, tmp_path / "one", SETTINGS, shard_size=3)
    killed = attribute(
        classifier, deadly(many, tmp_path / "mark", False), tmp_path / "two", SETTINGS, shard_size=3, devices=TWO
    )
    assert (tmp_path / "mark").exists() and (killed.rows, killed.failed) == (83, 2)
    assert same(tmp_path / "one", tmp_path / "two")
    assert not [pid for pid in alive(children(os.getpid())) if b"spawn_main" in command(pid)]


def command(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.long
def test_a_shard_that_kills_its_workers_ends_the_job(classifier, many, tmp_path):  # noqa: F811
    with pytest.raises(JobError, match="died 3 times at the same shards, at last with exit code -9"):
        attribute(classifier, deadly(many, tmp_path / "mark", True), tmp_path / "m", SETTINGS, shard_size=40, devices=TWO)
    assert not list((tmp_path / "m").glob(".part*"))


@pytest.mark.slow
def test_errors_and_stops_come_through(classifier, many, tmp_path):  # noqa: F811
    from dataclasses import replace

    with pytest.raises(ValueError, match="topk=9: the model has 7"):
        attribute(classifier, many, tmp_path / "a", replace(SETTINGS, topk=9), devices=TWO)
    stop = threading.Event()
    stop.set()
    outcome = attribute(classifier, many, tmp_path / "b", SETTINGS, shard_size=6, devices=TWO, stop=stop)
    assert outcome.interrupted and not list((tmp_path / "b").glob(".part-*"))


@pytest.mark.slow
def test_nobody_survives_the_driver(many, tmp_path):  # noqa: F811
    """kill -9 of the driver, of which its workers hear nothing: the kernel ends them."""
    out = tmp_path / "maps"
    with start(many, out, "--devices", "cpu,cpu", sleep=0.2) as process:
        wait_for(lambda: list(out.glob("part-*")), process)
        below = children(process.pid)
        assert len(alive(below)) >= 2
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while alive(below) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not alive(below)
        process.stdout.close()
        process.stderr.close()


# ----------------------------------------------------------------------------------------------------------------- Ray


@pytest.fixture
def ray(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    module = pytest.importorskip("ray")
    yield module
    module.shutdown()


def local_cluster(ray):
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20, logging_level="ERROR")


@pytest.mark.slow
def test_ray_is_one_process(classifier, many, tmp_path, ray):  # noqa: F811
    """The same rows, with an actor that is killed on the way, which Ray replaces."""
    local_cluster(ray)
    attribute(classifier, many, tmp_path / "one", SETTINGS, shard_size=6)
    source = deadly(many, tmp_path / "mark", False)
    outcome = attribute(classifier, source, tmp_path / "two", SETTINGS, shard_size=6, scheduler="ray", devices=TWO)
    assert (tmp_path / "mark").exists() and outcome.rows == 83 and same(tmp_path / "one", tmp_path / "two")
    from dataclasses import replace

    with pytest.raises(ValueError, match="topk=9: the model has 7"):
        attribute(classifier, many, tmp_path / "four", replace(SETTINGS, topk=9), scheduler="ray", devices=TWO)
    with pytest.raises(InputError, match="no GPU"):
        attribute(classifier, many, tmp_path / "five", SETTINGS, scheduler="ray", devices=("cuda",))
    assert ray.is_initialized()  # a cluster that was there stays


@pytest.mark.long
def test_nobody_survives_the_driver_of_ray(many, tmp_path):  # noqa: F811
    """kill -9 of the driver of a cluster that it has started: its actors and Ray's daemons end.

    Two agents of Ray's own do not, for a minute and more; they hold no shard and no device, and are ended here.
    """
    pytest.importorskip("ray")
    out = tmp_path / "maps"
    with start(many, out, "--scheduler", "ray", sleep=0.5) as process:
        wait_for(lambda: list(out.glob("part-*")), process, 200)
        below = children(process.pid)
        assert any(b"_Actor" in command(pid) for pid in below)

        def working(pids):
            return [pid for pid in alive(pids) if b"Agent" not in command(pid)]

        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while working(below) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not working(below)
        for pid in alive(below):
            os.kill(pid, signal.SIGKILL)
        process.stdout.close()
        process.stderr.close()


@pytest.mark.long
def test_a_node_of_ray_that_is_lost(classifier, many, tmp_path, ray):  # noqa: F811
    """Two nodes; one is killed while it works."""
    from ray.cluster_utils import Cluster

    attribute(classifier, many, tmp_path / "one", SETTINGS, shard_size=3)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 * 2**20})
    node = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        lost = []

        def progress(outcome):
            if outcome.done == 3 and not lost:
                lost.append(node)
                cluster.remove_node(node, allow_graceful=False)

        attribute(classifier, many, tmp_path / "two", SETTINGS, shard_size=3, scheduler="ray", devices=TWO, progress=progress)
        assert lost and same(tmp_path / "one", tmp_path / "two")
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.long
def test_kill_9_of_workers_a_hundred_times(classifier, many, tmp_path):  # noqa: F811
    """At random moments, one of two processes; what is left is what an undisturbed run leaves."""
    attribute(classifier, many, tmp_path / "one", SETTINGS, shard_size=3)
    chance, killed = random.Random(3), 0
    while killed < 100:
        out = tmp_path / f"two-{killed}"
        over = threading.Event()

        def assassin(over=over):
            nonlocal killed
            while not over.wait(chance.uniform(0.3, 3)):
                workers = [pid for pid in alive(children(os.getpid())) if b"spawn_main" in command(pid)]
                if workers:
                    os.kill(chance.choice(workers), signal.SIGKILL)
                    killed += 1

        thread = threading.Thread(target=assassin)
        thread.start()
        try:
            attribute(classifier, many, out, SETTINGS, shard_size=3, devices=TWO)
        except JobError:  # a shard had bad luck three times: the next run takes it up
            over.set()
            thread.join()
            attribute(classifier, many, out, SETTINGS, shard_size=3, devices=TWO)
        finally:
            over.set()
            thread.join()
        assert same(tmp_path / "one", out)
