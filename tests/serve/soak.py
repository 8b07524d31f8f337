"""More clients than a server can serve, for a while: ``python -m tests.serve.soak --seconds 60 --clients 128``.

Every client has an image of its own, whose right map is known. Together they send at twice the rate that the server reached
when it was asked as fast as it answers. Some send broken images, some poison, some go away without waiting. In the end every
request must have had one answer, the right one or a clean refusal; the server's memory must have stayed where it was, its queue
must be empty, and SIGTERM must end it with 0.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from .test_process import CLIENT, Process
from .tiny import POISON, Known, encoded, known, with_corner

PAUSE = 0.02  # seconds per batch of two: the model is what limits


@dataclass
class Told:
    """What happened to all requests.

    Attributes:
        sent: requests of which an answer was expected.
        outcomes: by kind.
        wrong: answers that are not the right ones, in words.
        times: of the right ones, seconds.
    """

    sent: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


class Connection:
    """HTTP/1.1 over one connection that is kept: less work for this side than a library's client."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, body: bytes, leave: bool = False) -> tuple[int, dict[str, str], bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        head = f"POST /v1/explain?return=raw HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        if leave:
            self.close()
            return 0, {}, b""
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:] if line)}
        content = await reader.readexactly(int(headers["content-length"]))
        if headers.get("connection") == "close":
            self.close()
        return int(lines[0].split()[1]), headers, content

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def client(port: int, one: Known, told: Told, until: float, gap: float, seed: int) -> None:
    """Requests ``gap`` seconds apart, or as fast as they are answered where it is 0."""
    dice = random.Random(seed)
    connection = Connection(port)
    bad, poison = one.data[:200], encoded(with_corner(one.view, POISON))
    await asyncio.sleep(gap * dice.random())
    while time.monotonic() < until:
        began = time.monotonic()
        kind = dice.random() if gap else 1.0
        try:
            if kind < 0.03:
                await connection.post(one.data, leave=True)
                continue
            told.sent += 1
            body = bad if kind < 0.06 else poison if kind < 0.08 else one.data
            status, headers, content = await connection.post(body)
            judge(told, one, kind, status, headers, content, time.monotonic() - began)
        except (OSError, asyncio.IncompleteReadError) as error:
            told.outcomes["lost"] += 1
            told.wrong.append(f"lost: {type(error).__name__}: {error}")
            connection.close()
        await asyncio.sleep(max(0.0, gap * (0.5 + dice.random()) - (time.monotonic() - began)))
    connection.close()


def judge(told: Told, one: Known, kind: float, status: int, headers: dict[str, str], content: bytes, seconds: float) -> None:
    """One answer."""
    if status == 503 and "retry-after" in headers and json.loads(content)["error"]["kind"] == "overloaded":
        told.outcomes["refused"] += 1
    elif status == 504:
        told.outcomes["too late"] += 1
    elif 0.03 <= kind < 0.06 and status == 422:
        told.outcomes["bad image"] += 1
    elif 0.06 <= kind < 0.08 and status == 500:
        told.outcomes["poison"] += 1
    elif kind >= 0.08 and status == 200:
        found = numpy.load(io.BytesIO(content))
        if headers["x-shapleycam-classes"] == str(one.target) and numpy.allclose(found, one.raw[None], rtol=1e-3, atol=1e-5):
            told.outcomes["right"] += 1
            told.times.append(seconds)
        else:
            told.outcomes["wrong"] += 1
            told.wrong.append(f"another's map, or none: {headers}")
    else:
        told.outcomes["odd"] += 1
        told.wrong.append(f"{status}: {content[:200]!r}")


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


async def load(port: int, images: list[Known], clients: int, seconds: float, gap: float, watch: Any = None) -> Told:
    told = Told()
    until = time.monotonic() + seconds
    tasks = [asyncio.ensure_future(client(port, images[n % len(images)], told, until, gap, n)) for n in range(clients)]
    while time.monotonic() < until:
        await asyncio.sleep(min(0.5, seconds / 10))
        if watch is not None:
            watch()
    await asyncio.gather(*tasks)
    return told


def soak(seconds: float, clients: int, folder: Path) -> dict[str, Any]:
    """Run it.

    Raises:
        AssertionError: what must not happen has happened.
    """
    images = [known(seed) for seed in range(min(clients, 64))]
    assert all((a.raw - b.raw).abs().max() > 1e-3 for a in images[:8] for b in images[:8] if a is not b)
    command = [sys.executable, "-m", "tests.serve.process", "0", "20"]
    server = Process(command, folder / "log", {"PAUSE": str(PAUSE), "OMP_NUM_THREADS": "1"})
    try:
        port = int(server.url.rpartition(":")[2])
        warm = asyncio.run(load(port, images, 8, min(3.0, seconds / 3), 0.0))
        assert not warm.wrong, warm.wrong[:3]
        capacity = len(warm.times) / min(3.0, seconds / 3)
        sizes: list[int] = []
        told = asyncio.run(
            load(port, images, clients, seconds, clients / (2 * capacity), lambda: sizes.append(memory(server.popen.pid)))
        )
        early, late = max(sizes[: max(1, len(sizes) // 4)]), max(sizes[-max(1, len(sizes) // 4) :])
        times = numpy.array(told.times)
        summary = {
            "seconds": seconds,
            "clients": clients,
            "capacity_per_second": round(capacity, 1),
            "sent_per_second": round(told.sent / seconds, 1),
            "outcomes": dict(told.outcomes),
            "right_p50_ms": round(float(numpy.percentile(times, 50)) * 1e3, 1),
            "right_p99_ms": round(float(numpy.percentile(times, 99)) * 1e3, 1),
            "memory_early_mb": round(early / 1e6, 1),
            "memory_late_mb": round(late / 1e6, 1),
        }
        assert not told.wrong, told.wrong[:5]
        assert sum(told.outcomes.values()) == told.sent
        assert told.outcomes["right"] > 0.5 * capacity * seconds
        assert late <= 1.05 * early, summary
        end = time.monotonic() + 10
        while 'shapleycam_queue_requests{model="tiny"} 0.0' not in CLIENT.get(f"{server.url}/metrics").text:
            assert time.monotonic() < end, "the queue has not come to its end"
            time.sleep(0.05)
        assert CLIENT.get(f"{server.url}/readyz").status_code == 200
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(20) == 0 and server.group() == []
        return summary
    finally:
        if server.popen.poll() is None:
            server.popen.kill()
            server.popen.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=128)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(soak(told.seconds, told.clients, Path(folder)), indent=1))


if __name__ == "__main__":
    main()
