"""The explanation service against the bare call, and beside LitServe and Ray Serve. Usage: python -m bench.serve

Writes bench/results/serve-cpu.json. The network is EfficientNet-Lite0, the answer its signed map, the picture a JPEG of
500 × 333 pixels. One thread of PyTorch per server; this process is the client. The bare call (decode, explain, encode) is timed
before and after every load of every server, and ratios are to the calls beside them. Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def picture() -> bytes:
    """A JPEG of 500 × 333 pixels, from scikit-image's cat."""
    import skimage
    from PIL import Image

    found = Image.open(Path(skimage.__file__).parent / "data" / "chelsea.png").convert("RGB").resize((500, 333))
    file = io.BytesIO()
    found.save(file, "JPEG", quality=90)
    return file.getvalue()


class Peer:
    """A server in processes of its own."""

    def __init__(self, name: str, command: list[str], port: int, request: bytes) -> None:
        self.name, self.port, self.request = name, port, request
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("SHAPLEYCAM_TOKEN", None)
        self._log = open(f"/tmp/bench-serve-{name}.log", "w")  # noqa: SIM115 - the process writes it
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, env=environment, start_new_session=True)
        end = time.monotonic() + 180
        while True:
            try:
                if asyncio.run(once(self)) > 0:
                    break
            except (OSError, RuntimeError, asyncio.IncompleteReadError) as error:
                if time.monotonic() > end or self._process.poll() is not None:
                    raise RuntimeError(f"{name} did not start, see {self._log.name}") from error
                time.sleep(0.5)

    def used(self) -> float:
        """Seconds of processor time that all its processes have had."""
        ticks = 0
        for file in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = file.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self._process.pid:
                    ticks += sum(map(int, fields[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # what it left behind


def form(data: bytes, path: str, field: str) -> bytes:
    """A whole HTTP request with the picture in a form."""
    body = (
        f'--x\r\nContent-Disposition: form-data; name="{field}"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'.encode()
        + data
        + b"\r\n--x--\r\n"
    )
    kind = "Content-Type: multipart/form-data; boundary=x"
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


class Connection:
    """One that is kept."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._streams: Any = None

    async def ask(self) -> None:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._peer.port)
        reader, writer = self._streams
        writer.write(self._peer.request)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        if lines[0].split()[1] != "200":
            raise RuntimeError(f"{self._peer.name} answered {lines[0]}")
        size = next(int(line.partition(":")[2]) for line in lines if line.lower().startswith("content-length"))
        await reader.readexactly(size)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


async def once(peer: Peer) -> float:
    connection = Connection(peer)
    began = time.perf_counter()
    await connection.ask()
    connection.close()
    return time.perf_counter() - began


async def closed(peer: Peer, clients: int, seconds: float) -> tuple[float, list[float]]:
    """Clients that ask again as soon as they are answered: (answers a second, seconds of each)."""
    times: list[float] = []
    until = time.perf_counter() + seconds
    began = time.perf_counter()

    async def client() -> None:
        connection = Connection(peer)
        while time.perf_counter() < until:
            start = time.perf_counter()
            await connection.ask()
            times.append(time.perf_counter() - start)
        connection.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return len(times) / (time.perf_counter() - began), times


async def paced(peer: Peer, rate: float, seconds: float, poisson: bool) -> list[float]:
    """Requests that do not wait for answers, evenly spaced or at random: seconds from when each was due."""
    dice = random.Random(0)
    times: list[float] = []
    idle: list[Connection] = []

    async def one(due: float) -> None:
        connection = idle.pop() if idle else Connection(peer)
        await connection.ask()
        times.append(time.perf_counter() - due)
        idle.append(connection)

    tasks, due = [], time.perf_counter()
    end = due + seconds
    while due < end:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.ensure_future(one(due)))
        due += dice.expovariate(rate) if poisson else 1 / rate
    await asyncio.gather(*tasks)
    for connection in idle:
        connection.close()
    return times


class Bare:
    """The bare loop, in a process and a session of its own.

    Attributes:
        used, images: seconds of processor time so far, and of how many images.
    """

    used, images = 0.0, 0

    def __init__(self, data: bytes) -> None:
        self._file = tempfile.NamedTemporaryFile(suffix=".jpg")  # noqa: SIM115 - the process reads it
        self._file.write(data)
        self._file.flush()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.serve_work"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def __call__(self, batch: int, count: int) -> list[float]:
        """Seconds of each of ``count`` calls with ``batch`` pictures; adds to ``used`` and ``images``."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{self._file.name} {batch} {count}\n")
        self._process.stdin.flush()
        found, used = json.loads(self._process.stdout.readline())
        self.used, self.images = self.used + used, self.images + batch * count
        return list(found)

    def stop(self) -> None:
        """End the process."""
        self._process.communicate()
        self._file.close()


def at(times: list[float], share: float) -> float:
    """A percentile; of less than 101 times p99 is the slowest, and of less than 201 the second slowest."""
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]


LOADS = ("alone", "half", "half_poisson", "full")


def measure(peers: list[Peer], bare: Bare, batch: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Rounds of every server between two measurements of the bare call.

    Returns:
        per server: percentiles over all rounds, in milliseconds, and as ratios to those of the bare calls beside them; images a
        second at saturation over those of the bare batched loop, the median of the rounds; and processor time per image, over
        that of the bare loop, which a busy machine disturbs less.
    """
    samples: dict[str, dict[str, list[float]]] = {p.name: {name: [] for name in ("bare", *LOADS)} for p in peers}
    speeds: dict[str, list[float]] = {peer.name: [] for peer in peers}
    work: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for peer in peers:
        asyncio.run(closed(peer, 4, 1.0))  # warm
    count = max(10, int(seconds / 0.1))
    bare(1, 5)
    for number in range(rounds):
        for peer in peers[number % len(peers) :] + peers[: number % len(peers)]:
            mine = samples[peer.name]
            mine["bare"] += bare(1, count)
            before = bare(batch, count // batch)
            used = peer.used()
            rate, answered = asyncio.run(closed(peer, 16, seconds))
            work[peer.name].append((peer.used() - used) / len(answered))
            after = bare(batch, count // batch)
            speeds[peer.name].append(rate * (sum(before) + sum(after)) / (batch * (len(before) + len(after))))
            mine["alone"] += asyncio.run(closed(peer, 1, seconds))[1]
            mine["half"] += asyncio.run(paced(peer, rate / 2, seconds, False))
            mine["half_poisson"] += asyncio.run(paced(peer, rate / 2, seconds, True))
            mine["full"] += asyncio.run(paced(peer, rate, seconds, False))
            mine["bare"] += bare(1, count)
            print(f"round {number}, {peer.name}: saturation {speeds[peer.name][-1]:.2f}", flush=True)
    found: dict[str, Any] = {}
    for name, mine in samples.items():
        row: dict[str, Any] = {
            "processor_time": round(median(work[name]) / (bare.used / bare.images), 2),
            "saturation": round(median(speeds[name]), 3),
            "saturation_rounds": [round(s, 3) for s in speeds[name]],
        }
        for load, times in mine.items():
            for label, share in (("p50", 0.5), ("p99", 0.99)):
                row[f"{load}_{label}_ms"] = round(at(times, share) * 1e3, 1)
                if load != "bare":
                    row[f"{load}_{label}"] = round(at(times, share) / at(mine["bare"], share), 2)
            row[f"{load}_samples"] = len(times)
        found[name] = row
    return found


#: The rows of the page's table: what, and under which key.
ROWS = {
    "processor time per image": "processor_time",
    "images a second at saturation, over the bare batched loop": "saturation",
    "one client, p50": "alone_p50",
    "one client, p99": "alone_p99",
    "half of that, evenly spaced, p50": "half_p50",
    "half of that, evenly spaced, p99": "half_p99",
    "half of that, at random, p99": "half_poisson_p99",
    "all of that, evenly spaced, p50": "full_p50",
    "all of that, evenly spaced, p99": "full_p99",
}


def table(content: dict[str, Any]) -> str:
    """The result as docs/production.md has it: ratios to the bare call."""
    columns = {"shapleycam serve": content["beside"]["litserve"]["shapleycam"]}
    columns |= {"LitServe": content["beside"]["litserve"]["litserve"]}
    columns |= {"shapleycam serve, again": content["beside"]["ray"]["shapleycam"], "Ray Serve": content["beside"]["ray"]["ray"]}
    lines = [f"| | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    lines += [f"| {what} | {' | '.join(f'{one[key]:.2f}' for one in columns.values())} |" for what, key in ROWS.items()]
    return "\n".join(lines)


def processor() -> str:
    """Its name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.5, help="per load, server and round")
    parser.add_argument("--batch", type=int, default=1, help="most images of a batch, everywhere; on a CPU 1 is best")
    parser.add_argument("--peers", default="litserve,ray", help="names with commas between, or nothing")
    parser.add_argument("--table", action="store_true", help="print the table of the last result, and end")
    told = parser.parse_args()
    if told.table:
        print(table(json.loads((RESULTS / "serve-cpu.json").read_text())))
        return
    data = picture()
    bare = Bare(data)
    ours = free_port()
    command = [sys.executable, "-c", "from shapleycam.cli import main; main()", "serve"]
    command += ["--port", str(ours), "--max-batch", str(told.batch), "--log-level", "warning"]
    mine = Peer("shapleycam", command, ours, form(data, "/v1/explain?return=raw", "image"))
    results = {}
    try:
        names = [name for name in told.peers.split(",") if name and importlib.util.find_spec(name)]
        # One peer at a time: Ray's own processes take processor time from everybody, and would from LitServe.
        for name in names or [""]:
            others = []
            if name:
                port = free_port()
                run = [sys.executable, "-m", f"bench.serve_{name}", str(port), str(told.batch)]
                others = [Peer(name, run, port, form(data, "/predict", "request"))]
            try:
                results[name or "alone"] = measure([mine, *others], bare, told.batch, told.rounds, told.seconds)
            finally:
                for other in others:
                    other.stop()
    finally:
        mine.stop()
        bare.stop()
    content = {
        "command": "python -m bench.serve " + " ".join(sys.argv[1:]),
        "machine": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "rounds": told.rounds,
        "seconds": told.seconds,
        "batch": told.batch,
        "load_average": os.getloadavg(),
        "beside": results,
    }
    file = RESULTS / "serve-cpu.json"
    file.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
