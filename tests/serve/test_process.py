"""The process: how it starts, how it ends, and what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from shapleycam.cli.app import run

from .tiny import KILLER, encoded, known, pixels, with_corner

CLIENT = httpx.Client(timeout=30, verify=False)


class Process:
    """A server's process, its address, and its log; the soak test uses it too."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str]) -> None:
        self.log = log
        with log.open("w") as file:
            self.popen = subprocess.Popen(command, stderr=file, env={**os.environ, **env}, start_new_session=True)
        self.url = ""
        end = time.monotonic() + 60
        while not self.url:
            assert time.monotonic() < end and self.popen.poll() is None, log.read_text()
            self.url = next((f"http://127.0.0.1:{r['port']}" for r in self.lines() if r["event"] == "listening"), "")
            time.sleep(0.05)
        while CLIENT.get(f"{self.url}/readyz").status_code != 200:
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]

    def group(self) -> list[int]:
        """Every process of its session that is alive."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.popen.pid and fields[0] != "Z":
                found.append(int(stat.parent.name))
        return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    started: list[Process] = []

    def begin(pre_stop: float = 0.0, grace: float = 10.0, hold: Path | None = None, **env: str) -> Process:
        command = [sys.executable, "-m", "tests.serve.process", str(pre_stop), str(grace)]
        process = Process(command, tmp_path / "log", {"HOLD": str(hold or tmp_path / "none"), "OMP_NUM_THREADS": "1", **env})
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.popen.poll() is None:
            process.popen.kill()
            process.popen.wait()


def readiness(url: str) -> int:
    return CLIENT.get(f"{url}/readyz").status_code


def test_sigterm_not_ready_then_drained_then_zero(start: Any, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    process = start(pre_stop=1.5, hold=hold)
    image = known(0)
    hold.touch()
    with ThreadPoolExecutor(4) as pool:
        held = [pool.submit(CLIENT.post, f"{process.url}/v1/explain?return=json", content=image.data) for _ in range(3)]
        while CLIENT.get(f"{process.url}/metrics").text.find('shapleycam_queue_requests{model="tiny"} 3.0') < 0:
            time.sleep(0.02)
        process.popen.send_signal(signal.SIGTERM)
        while readiness(process.url) == 200:
            time.sleep(0.02)
        assert CLIENT.get(f"{process.url}/readyz").json()["status"] == "draining"
        # Not ready is a wish, which takes a while to reach a load balancer: until then requests are served.
        hold.unlink()
        assert CLIENT.post(f"{process.url}/v1/explain", content=image.data).status_code == 200
        hold.touch()
        late = pool.submit(CLIENT.post, f"{process.url}/v1/explain?return=json", content=image.data)
        time.sleep(1.8)  # past the delay: it does not listen any more, and one request still waits
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{process.url}/readyz", verify=False)
        assert process.popen.poll() is None
        hold.unlink()
        for future in [*held, late]:
            assert future.result().json()["explanations"][0]["class"] == image.target
    assert process.popen.wait(10) == 0
    assert process.group() == []
    assert [line["event"] for line in process.lines()][-1] == "stopped"


@pytest.mark.slow
def test_what_is_not_done_within_the_grace_time_is_dropped_and_said(start: Any, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    process = start(grace=1.0, hold=hold)
    hold.touch()
    with ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(CLIENT.post, f"{process.url}/v1/explain", content=known(0).data)
        while CLIENT.get(f"{process.url}/metrics").text.find('shapleycam_queue_requests{model="tiny"} 1.0') < 0:
            time.sleep(0.02)
        began = time.monotonic()
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(15) == 1
        assert time.monotonic() - began < 12
        with contextlib.suppress(httpx.TransportError):  # cut off
            assert stuck.result().status_code >= 500
    assert process.group() == []


@pytest.mark.slow
@pytest.mark.parametrize("died", [False, True])
def test_a_decoder_that_hangs_does_not_keep_the_process(start: Any, died: bool) -> None:
    process = start(grace=1.0)
    with ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(CLIENT.post, f"{process.url}/v1/explain", content=known(0).data + b"HANG")
        while CLIENT.get(f"{process.url}/metrics").text.find('shapleycam_queue_requests{model="tiny"} 1.0') < 0:
            time.sleep(0.02)
        if died:
            CLIENT.post(f"{process.url}/v1/explain", content=encoded(with_corner(pixels(0), KILLER)))
        else:
            process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(60) == (70 if died else 1)
        with contextlib.suppress(httpx.TransportError):  # cut off
            assert stuck.result().status_code >= 500
    assert process.group() == [] and [line["event"] for line in process.lines()][-1] == "stopped"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_idle_server_ends_at_once_and_with_zero(start: Any, number: int) -> None:
    process = start()
    process.popen.send_signal(number)
    assert process.popen.wait(10) == 0 and process.group() == []


@pytest.mark.slow
def test_when_the_model_dies_the_process_ends_with_70(start: Any) -> None:
    process = start()
    answer = CLIENT.post(f"{process.url}/v1/explain", content=encoded(with_corner(pixels(0), KILLER)))
    assert answer.status_code == 503
    assert process.popen.wait(10) == 70 and process.group() == []
    assert any(line["event"] == "died" and "killed" in line["traceback"] for line in process.lines())


@pytest.mark.slow
def test_a_mistake_is_one_line_and_status_2() -> None:
    command = [sys.executable, "-c", "from shapleycam.cli import main; main()", "serve", "--port", "0", "--max-batch", "1"]
    done = subprocess.run([*command, "--layer", "nonsense"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "No layer 'nonsense'" in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize(("options", "words"), [(["--log-level", "loud"], "log level"), (["--runtime", "onnx"], "needs file")])
def test_mistakes_are_one_line(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--port", "0", "--max-batch", "1", *options]) == 2
    said = capsys.readouterr().err
    assert words in said.splitlines()[-1], said


@pytest.mark.slow
def test_the_command_serves_the_demos_network(tmp_path: Path) -> None:
    import skimage

    cat = (Path(skimage.__file__).parent / "data" / "chelsea.png").read_bytes()
    config = tmp_path / "serve.toml"
    (tmp_path / "token").write_text("a-token-of-more-than-sixteen\n")
    config.write_text(
        'port = 0\ntoken_file = "token"\n[models.cats]\nmax_batch = 1\n[models.second]\nmax_batch = 1\nmethods = ["gradcam"]\n'
    )
    command = [sys.executable, "-c", "from shapleycam.cli import main; main()", "serve", "--config", str(config)]
    process = Process(command, tmp_path / "log", {"OMP_NUM_THREADS": "1"})
    try:
        headers = {"authorization": "Bearer a-token-of-more-than-sixteen"}
        url = f"{process.url}/v1/explain?return=json"
        assert CLIENT.post(url, content=cat).status_code == 401
        found = CLIENT.post(url, content=cat, headers=headers).json()
        assert found["explanations"][0]["label"] in ("tabby", "tiger cat", "Egyptian cat")
        assert CLIENT.post(f"{url}&model=second", content=cat, headers=headers).json()["method"] == "gradcam"
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(15) == 0
    finally:
        if process.popen.poll() is None:
            process.popen.kill()
