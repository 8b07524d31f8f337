"""What goes over one connection, and how many there may be."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from shapleycam.errors import InputError
from shapleycam.serve import ExplainerRuntime, run
from shapleycam.serve.config import Limits, ModelConfig, ServerConfig

from .test_faults import CLIENT, POST, kind, until
from .tiny import Known, Live, classifier, live

KEPT = POST.replace(b"Connection: close\r\n", b"")


CHUNKED = KEPT + b"Transfer-Encoding: chunked\r\n\r\n"


def request(data: bytes, query: str = "return=raw") -> bytes:
    return KEPT.replace(b"explain", b"explain?" + query.encode()) + f"Content-Length: {len(data)}\r\n\r\n".encode() + data


SOCKETS: list[socket.socket] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while SOCKETS:
        SOCKETS.pop().close()


def connect(found: Live, **options: int) -> socket.socket:
    sock = socket.socket()
    SOCKETS.append(sock)
    for name, value in options.items():
        sock.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    sock.settimeout(10)
    sock.connect(("127.0.0.1", found.port))
    return sock


def closed(sock: socket.socket) -> bytes:
    """What still comes until the server closes; a server that does not fails the test."""
    got = b""
    try:
        while part := sock.recv(65536):
            got += part
    except ConnectionResetError:
        pass
    return got


def waiting(found: Live, data: bytes) -> socket.socket:
    """A connection whose request waits for the model."""
    found.model.open.clear()
    sock = connect(found)
    sock.sendall(request(data))
    until(lambda: found.server.services["tiny"].busy_for() > 0)
    return sock


@pytest.mark.parametrize("behind", [False, True], ids=["first", "behind one that waits"])
def test_headers_without_an_end_are_cut_off(one: Known, behind: bool) -> None:
    with live(limits=Limits(header_time=60.0)) as found:
        sock = waiting(found, one.data) if behind else connect(found)
        sock.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\n")
        filler = (b"X-Filler: " + b"y" * 60_000 + b"\r\n") * 1000
        with pytest.raises(OSError, match="reset|[Bb]roken"):
            sock.sendall(filler)
        found.model.open.set()


@pytest.mark.parametrize("piece", [b"X-a: " + b"y" * 8000 + b"\r\n", b"y" * 8000], ids=["many", "one"])
def test_trailers_without_an_end_are_cut_off(shared: Live, piece: bytes) -> None:
    sock = connect(shared)
    sock.sendall(CHUNKED + b"1\r\nx\r\n0\r\nX-First: ")
    with pytest.raises(OSError, match="reset|[Bb]roken"):
        sock.sendall(piece * 10_000)


def test_trailers_and_small_chunks_of_a_long_body_are_taken(shared: Live, one: Known) -> None:
    sock = connect(shared)
    chunks = b"".join(b"1;extension=" + b"y" * 100 + b"\r\n" + one.data[n : n + 1] + b"\r\n" for n in range(len(one.data)))
    assert len(chunks) > 3 * 65_536
    sock.sendall(CHUNKED.replace(b"Host: x", b"Connection: close") + chunks + b"0\r\nX-Checksum: 1\r\n\r\n")
    assert closed(sock).startswith(b"HTTP/1.1 200")


def test_slow_headers_behind_a_request_are_cut_off(one: Known) -> None:
    with live() as found:
        sock = waiting(found, one.data)
        found.uvicorn.config.http_protocol_class.limits = Limits(header_time=0.5)  # type: ignore[union-attr]
        sock.sendall(b"GET /readyz HTT")
        assert closed(sock) == b""
        found.model.open.set()


def test_requests_may_follow_one_another_but_not_without_end(one: Known, caplog: pytest.LogCaptureFixture) -> None:
    probe = b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n"
    with live() as found, caplog.at_level("INFO"):
        sock = waiting(found, one.data)
        sock.sendall(3 * probe + probe.replace(b"Host: x", b"Connection: close"))
        found.model.open.set()
        assert closed(sock).count(b"HTTP/1.1 200 OK") == 5
        sock = waiting(found, one.data)
        sock.sendall(1000 * probe)
        assert closed(sock) == b""
        found.model.open.set()
        until(lambda: not found.uvicorn.server_state.tasks)
    assert [one.getMessage() for one in caplog.records if one.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("said", [b"", b"GET /", POST + b"Content-Length: 5000\r\n\r\nx"], ids=["idle", "headers", "body"])
def test_connections_that_wait_for_their_clients_make_room(one: Known, said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_GRACE", 0)
    with live(limits=Limits(connections=4)) as found:
        busy = waiting(found, one.data)
        idle = [connect(found) for _ in range(40)]
        for sock in idle:
            with contextlib.suppress(OSError):  # closed already
                sock.sendall(said)
        answer = CLIENT.get(f"{found.url}/healthz")
        assert answer.status_code == 200 and "x-request-id" in answer.headers
        until(lambda: len(found.uvicorn.server_state.connections) <= 4)
        for sock in idle[:30]:
            assert closed(sock) == b""
        for sock in idle:
            sock.close()
        found.model.open.set()
        assert busy.recv(65536).startswith(b"HTTP/1.1 200")


def states(found: Live) -> list[Any]:
    """The server's connections, those that came first first."""
    return sorted(found.uvicorn.server_state.connections, key=lambda one: one._since)


def head(sock: socket.socket) -> bytes:
    """The head of an answer whose body is short."""
    got = b""
    while b"\r\n\r\n" not in got:
        part = sock.recv(65536)
        assert part, f"it was closed after {got!r}"
        got += part
    return got


PROBE = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


def test_more_are_not_closed_at_once_but_for_twice_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_GRACE", 1e9)
    with live(limits=Limits(connections=3)) as found:
        for count in range(1, 7):
            connect(found)
            until(lambda count=count: len(states(found)) == count)
        first = states(found)[0]
        monkeypatch.setattr(run, "_GRACE", 0)
        connect(found)  # all four that are too many
        until(lambda: len(states(found)) == 3)
        assert first not in states(found)
        monkeypatch.setattr(run, "_GRACE", 1e9)
        socks = [connect(found) for _ in range(20)]
        until(lambda: len(states(found)) == 6)
        assert closed(socks[0]) == b""


def test_clients_that_keep_their_connections_are_answered_beyond_the_limit(one: Known) -> None:
    def ask(_: int) -> list[int]:
        with httpx.Client(timeout=60) as client:
            return [client.post(f"{found.url}/v1/explain", content=one.data).status_code for _ in range(8)]

    with live(limits=Limits(connections=4)) as found:
        found.model.open.set()
        with ThreadPoolExecutor(7) as pool:
            assert [status for each in pool.map(ask, range(7)) for status in each] == [200] * 56


def test_a_request_that_arrives_is_of_more_use_than_connections_that_are_idle(
    one: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_GRACE", 0)
    with live(limits=Limits(connections=3)) as found:
        first = connect(found)
        first.sendall(PROBE)
        assert b"200 OK" in head(first)
        idle = connect(found)
        until(lambda: len(states(found)) == 2)
        connect(found)
        until(lambda: len(states(found)) == 3)
        whole = request(one.data)
        first.sendall(whole[:-10])
        until(lambda: any(one.cycle and not one.cycle.response_complete for one in states(found)))
        connect(found)
        assert closed(idle) == b""
        first.sendall(whole[-10:])
        assert b"200 OK" in head(first)


def test_a_connection_is_of_use_until_its_answer(one: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_GRACE", 0)
    with live(limits=Limits(connections=2)) as found:
        busy = waiting(found, one.data)
        idle = connect(found)
        until(lambda: len(states(found)) == 2)
        found.model.open.set()
        assert b"connection: close" not in head(busy)
        until(lambda: all(state.cycle is None or state.cycle.response_complete for state in states(found)))
        connect(found)
        assert closed(idle) == b""
        busy.sendall(PROBE)  # while there are as many as allowed, each answer is its connection's last
        assert b"200 OK" in closed(busy)


# ------------------------------------------------------------------------------------------------------------- answers


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_answer_that_is_not_taken_has_its_share_of_the_budget(one: Known) -> None:
    large = "return=npy&size=2048"  # 16 MB
    with live(limits=Limits(bodies=30_000_000)) as found:
        sock = connect(found, SO_RCVBUF=4096)
        sock.sendall(request(one.data, large))
        assert sock.recv(12) == b"HTTP/1.1 200"
        assert kind(CLIENT.post(f"{found.url}/v1/explain?{large}", content=one.data)) == (503, "bodies")
        sock.close()
        until(lambda: CLIENT.post(f"{found.url}/v1/explain?{large}", content=one.data).status_code == 200)


@pytest.mark.parametrize("side", [120, 2048], ids=["some", "much"])
def test_an_answer_that_is_not_taken_in_time_is_dropped(side: int, one: Known, caplog: pytest.LogCaptureFixture) -> None:
    with live(limits=Limits(answer_time=0.5)) as found, caplog.at_level("INFO"):
        with socket.socket(fileno=os.dup(found.uvicorn.servers[0].sockets[0].fileno())) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # its connections have it from it
        sock = connect(found, SO_RCVBUF=4096)
        sock.sendall(request(one.data, f"return=npy&size={side}"))
        assert sock.recv(12) == b"HTTP/1.1 200"
        until(lambda: not states(found))
        assert len(closed(sock)) < 4 * side**2
        told = CLIENT.get(f"{found.url}/metrics").text
        assert 'route="/v1/explain",status="499"} 1.0' in told and 'errors_total{kind="disconnected"} 1.0' in told
    assert complaints(caplog) == []


def test_a_client_that_goes_away_after_two_requests_is_no_error(one: Known, caplog: pytest.LogCaptureFixture) -> None:
    with live() as found, caplog.at_level("INFO"):
        sock = connect(found, SO_RCVBUF=4096)
        sock.sendall(request(one.data, "return=npy&size=2048") + request(one.data))
        assert sock.recv(12) == b"HTTP/1.1 200"
        until(lambda: any(state.pipeline for state in states(found)))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # so that writing fails at once
        sock.close()
        until(lambda: not states(found) and not found.uvicorn.server_state.tasks)
        assert found.server.services["tiny"].held == 0
    assert complaints(caplog) == []


# ------------------------------------------------------------------------------------------------------------- uvicorn


@pytest.mark.parametrize(
    "gone",
    ["on_message_begin", "on_headers_complete", "on_body", "on_response_complete", "connection_made"],
)
def test_another_uvicorn_is_refused_before_a_model_is_loaded(gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(run.check_uvicorn())
    monkeypatch.delattr(HttpToolsProtocol, gone)
    with pytest.raises(InputError, match="does not work with uvicorn [0-9.]+: pip install"):
        run.serve(ServerConfig(models={"tiny": ModelConfig(model="no such model")}))


def test_what_is_loaded_is_kept_from_the_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[int] = []
    monkeypatch.setattr(run, "load_runtime", lambda _: ExplainerRuntime(classifier()))
    monkeypatch.setattr(run._Uvicorn, "run", lambda _: frozen.append(gc.get_freeze_count()))
    try:
        assert run.serve(ServerConfig(port=0, models={"tiny": ModelConfig(max_batch=1)})) == 0
    finally:
        gc.unfreeze()
    assert frozen[0] > 10_000
