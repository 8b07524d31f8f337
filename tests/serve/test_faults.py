"""What goes wrong, and that it goes wrong for those alone whose fault it is."""

from __future__ import annotations

import io
import json
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy
import pytest
import torch
from PIL import Image

from shapleycam import Explainer
from shapleycam.serve import ExplainerRuntime, Maps, Question
from shapleycam.serve.config import Limits, ModelConfig

from .tiny import KILLER, POISON, PREPROCESS, SIDE, Known, Live, classifier, encoded, known, live, pixels, with_corner

CLIENT = httpx.Client(timeout=30, verify=False)  # a context for TLS would take longer than all the rest


def array(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return numpy.load(io.BytesIO(response.content), allow_pickle=False)


def kind(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["kind"]


# ------------------------------------------------------------------------------------------------------------ images


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 + 3 * 1000) * 10, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg_that_claims(width: int, height: int) -> bytes:
    data = bytearray(encoded(pixels(0), "JPEG"))
    at = data.index(b"\xff\xc0") + 5  # the size in the frame header
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", (400, "empty_image")),
        (b"\x89PNG\r\n\x1a\n", (422, "damaged")),
        (encoded(pixels(0))[:500], (422, "damaged")),
        (encoded(pixels(0), "JPEG")[:400], (422, "damaged")),
        (encoded(pixels(0), "WEBP")[:200], (422, "damaged")),
        (b"hello, this is no picture at all", (415, "format")),
        (encoded(pixels(0), "GIF"), (415, "format")),
        (encoded(pixels(0), "TIFF"), (415, "format")),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", (415, "format")),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", (415, "format")),
        (png_that_claims(30_000, 30_000), (413, "pixels")),
        (jpeg_that_claims(60_000, 60_000), (413, "pixels")),
        (png_that_claims(1, 6000), (422, "invalid")),  # nothing is left of it behind the resize
    ],
    ids=lambda value: str(value[:12]) if isinstance(value, bytes) else "",
)
def test_an_image_that_is_none(client: httpx.Client, data: bytes, expected: tuple[int, str]) -> None:
    assert kind(client.post("/v1/explain", content=data)) == expected
    assert kind(client.post("/v1/explain", files={"image": data})) == expected


def test_a_jpeg_whose_header_lies_is_the_picture_that_every_decoder_shows(client: httpx.Client) -> None:
    taller = jpeg_that_claims(SIDE, 2 * SIDE)
    with Image.open(io.BytesIO(taller)) as shown:
        assert shown.size == (SIDE, 2 * SIDE)
        view = PREPROCESS.view(shown.convert("RGB"))
    found = array(client.post("/v1/explain?return=raw", content=taller))
    expected = Explainer(classifier().model)(PREPROCESS.normalise(view)[None]).raw
    assert numpy.allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert kind(client.post("/v1/explain", content=jpeg_that_claims(SIDE, 2 * SIDE)[:-40])) == (422, "damaged")


def test_sixteen_bits_cmyk_and_rotation_are_seen_right(client: httpx.Client) -> None:
    grey = torch.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE)
    file = io.BytesIO()
    Image.fromarray(grey.numpy().astype("uint16")).save(file, "PNG")
    wide = (grey / 257).round().to(torch.uint8).expand(3, -1, -1)

    cmyk = io.BytesIO()
    Image.fromarray(pixels(4).permute(1, 2, 0).numpy()).convert("CMYK").save(cmyk, "JPEG", quality=100)
    from_cmyk = numpy.asarray(Image.open(io.BytesIO(cmyk.getvalue())).convert("RGB")).copy()

    turned = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6  # to be turned a quarter clockwise
    Image.fromarray(pixels(4).rot90(1, (1, 2)).permute(1, 2, 0).numpy()).save(turned, "PNG", exif=exif)

    expected = {
        file.getvalue(): wide,
        cmyk.getvalue(): torch.from_numpy(from_cmyk).permute(2, 0, 1),
        turned.getvalue(): pixels(4),
    }
    explainer = Explainer(classifier().model)
    for data, view in expected.items():
        found = array(client.post("/v1/explain?return=raw", content=data))
        assert numpy.allclose(found, explainer(PREPROCESS.normalise(view)[None]).raw, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"no form at all", {"content-type": "multipart/form-data; boundary=x"}),
        (b"no form at all", {"content-type": "multipart/form-data"}),
        (b"--x\r\nbroken", {"content-type": "multipart/form-data; boundary=x"}),
        (
            b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\ntext\r\n--x--\r\n',
            {"content-type": "multipart/form-data; boundary=x"},
        ),
    ],
)
def test_a_form_that_is_none(client: httpx.Client, body: bytes, headers: dict[str, str]) -> None:
    assert kind(client.post("/v1/explain", content=body, headers=headers)) == (400, "form")


def test_two_files_are_not_one(client: httpx.Client, one: Known) -> None:
    files = [("a", ("a.png", one.data)), ("b", ("b.png", one.data))]
    assert kind(client.post("/v1/explain", files=files)) == (400, "form")


# ------------------------------------------------------------------------------------------------------------ bodies


def exchange(port: int, data: bytes, *, more: float = 0.0, timeout: float = 10.0) -> bytes:
    """Send bytes, then one more every 50 ms for ``more`` seconds, and read until the server closes or falls silent."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as sock:
        sock.sendall(data)
        until = time.monotonic() + more
        while time.monotonic() < until:
            time.sleep(0.05)
            try:
                sock.sendall(b"x")
            except OSError:
                break
        got = b""
        try:
            while part := sock.recv(65536):
                got += part
        except (TimeoutError, ConnectionResetError):
            pass
        return got


POST = b"POST /v1/explain HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"


@pytest.fixture(scope="module")
def strict() -> Any:
    with live(limits=Limits(body=20_000, body_time=0.6, header_time=0.6, request_time=5.0)) as found:
        yield found


def test_a_body_over_the_limit_is_refused_by_its_length(strict: Live) -> None:
    began = time.monotonic()
    got = exchange(strict.port, POST + b"Content-Length: 900000000\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 413") and b'"body"' in got
    assert time.monotonic() - began < 8


def test_a_body_over_the_limit_is_refused_without_a_length(strict: Live) -> None:
    def chunks() -> Any:
        for _ in range(12):
            yield bytes(5000)

    response = CLIENT.post(f"{strict.url}/v1/explain", content=chunks(), timeout=10)
    assert kind(response) == (413, "body")
    with_length = CLIENT.post(f"{strict.url}/v1/explain", content=bytes(60_000), timeout=10)
    assert kind(with_length) == (413, "body")


def test_slow_bodies_and_slow_headers_are_cut_off(strict: Live) -> None:
    slow_body = exchange(strict.port, POST + b"Content-Length: 5000\r\n\r\n", more=1.5)
    assert slow_body.startswith(b"HTTP/1.1 408")
    began = time.monotonic()
    assert exchange(strict.port, b"POST /v1/explain HTTP/1.1\r\nHost: ", more=1.5) == b""
    assert exchange(strict.port, b"") == b""  # says nothing at all
    assert time.monotonic() - began < 8
    first = POST.replace(b"Connection: close\r\n", b"") + b"Content-Length: 0\r\n\r\n"
    again = exchange(strict.port, first + b"POST /v1/ex", more=1.5)  # an answer, and then a slow second request
    assert again.startswith(b"HTTP/1.1 400") and again.count(b"HTTP/1.1") == 1


def test_compressed_bodies_are_not_unpacked(client: httpx.Client, one: Known) -> None:
    bomb = zlib.compress(bytes(10_000_000))
    response = client.post("/v1/explain", content=bomb, headers={"content-encoding": "deflate"})
    assert kind(response) == (415, "encoding")


def test_bodies_have_a_budget_together() -> None:
    with live(limits=Limits(bodies=50_000)) as found:
        slow = socket.create_connection(("127.0.0.1", found.port))
        slow.sendall(POST + b"Content-Length: 60000\r\n\r\n" + bytes(45_000))
        time.sleep(0.3)
        refused = CLIENT.post(f"{found.url}/v1/explain", content=bytes(10_000))
        assert kind(refused) == (503, "bodies") and refused.headers["retry-after"] == "1"
        slow.close()
        time.sleep(0.3)
        assert kind(CLIENT.post(f"{found.url}/v1/explain", content=bytes(10_000))) == (415, "format")


def test_the_token_is_asked_of_all_but_the_probes() -> None:
    with live(token="correct horse battery") as found:
        with httpx.Client(base_url=found.url) as client:
            for header in (None, "Bearer wrong", "Basic correct horse battery", "Bearer", "bearer correct horse batteryy"):
                headers = {} if header is None else {"authorization": header}
                response = client.post("/v1/explain", content=b"x", headers=headers)
                assert kind(response) == (401, "unauthorized") and response.headers["www-authenticate"] == "Bearer"
            assert client.get("/metrics").status_code == 401 and client.get("/openapi.json").status_code == 401
            assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
            good = client.post("/v1/explain", content=known(0).data, headers={"authorization": "Bearer correct horse battery"})
            assert good.status_code == 200


# --------------------------------------------------------------------------------------------------- load and the model


def until(condition: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def send(pool: ThreadPoolExecutor, url: str, data: bytes, query: str = "return=raw") -> Any:
    return pool.submit(CLIENT.post, f"{url}/v1/explain?{query}", content=data)


def test_a_full_queue_refuses_before_decoding(monkeypatch: pytest.MonkeyPatch, one: Known) -> None:
    with live(told=ModelConfig(max_batch=1, queue=2)) as found, ThreadPoolExecutor(4) as pool:
        found.model.open.clear()
        waiting = [send(pool, found.url, one.data) for _ in range(2)]
        service = found.server.services["tiny"]
        until(lambda: service.held == 2)
        decoded: list[Any] = []
        monkeypatch.setattr(service, "_item", lambda *a: decoded.append(a))
        refused = CLIENT.post(f"{found.url}/v1/explain", content=one.data)
        assert kind(refused) == (503, "overloaded") and int(refused.headers["retry-after"]) >= 1
        assert decoded == []
        monkeypatch.undo()
        found.model.open.set()
        assert [future.result().status_code for future in waiting] == [200, 200]


def test_a_passed_deadline_is_504_and_its_work_is_dropped(one: Known) -> None:
    with live(told=ModelConfig(max_batch=1)) as found, ThreadPoolExecutor(4) as pool:
        found.model.open.clear()
        first = send(pool, found.url, one.data)
        until(lambda: found.server.services["tiny"].busy_for() > 0)
        calls = len(found.model.sizes)
        late = CLIENT.post(f"{found.url}/v1/explain?timeout=0.1", content=one.data, timeout=10)
        assert kind(late) == (504, "deadline")
        found.model.open.set()
        assert first.result().status_code == 200
        until(lambda: found.server.services["tiny"].held == 0)
        assert len(found.model.sizes) == calls  # the model never saw it


def test_a_client_that_goes_away_is_not_worked_for(one: Known) -> None:
    with live(told=ModelConfig(max_batch=1)) as found, ThreadPoolExecutor(4) as pool:
        service = found.server.services["tiny"]
        found.model.open.clear()
        first = send(pool, found.url, one.data)
        until(lambda: service.busy_for() > 0)
        calls = len(found.model.sizes)
        gone = socket.create_connection(("127.0.0.1", found.port))
        gone.sendall(POST + f"Content-Length: {len(one.data)}\r\n\r\n".encode() + one.data)
        until(lambda: service.held == 2)
        gone.close()
        until(lambda: service.held == 1)  # before its turn comes
        found.model.open.set()
        assert first.result().status_code == 200 and len(found.model.sizes) == calls
        text = CLIENT.get(f"{found.url}/metrics").text
        assert 'shapleycam_errors_total{kind="disconnected"} 1.0' in text


def test_a_poisoned_batch_fails_only_the_bad_one() -> None:
    images = [known(seed) for seed in range(3)]
    bad = encoded(with_corner(pixels(9), POISON))
    with live(told=ModelConfig(max_batch=8)) as found, ThreadPoolExecutor(8) as pool:
        found.model.open.clear()
        first = send(pool, found.url, images[0].data)
        until(lambda: found.server.services["tiny"].busy_for() > 0)
        futures = [send(pool, found.url, data) for data in (images[0].data, bad, images[1].data, images[2].data)]
        until(lambda: len(found.server.services["tiny"]._batcher._queue) == 4)  # decoded, all of them
        found.model.open.set()
        answers = [future.result() for future in futures]
        assert kind(answers[1]) == (500, "internal") and "poison" not in answers[1].text
        for answer, image in zip([answers[0], *answers[2:]], images, strict=True):
            assert numpy.allclose(array(answer), image.raw[None], rtol=1e-4, atol=1e-6)
        assert first.result().status_code == 200
        assert 4 in found.model.sizes  # they did share a batch


class Small(ExplainerRuntime):
    """A device with room for two images."""

    def explain(self, images: Any, question: Question, targets: Any) -> Maps:
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 images.")
        return super().explain(images, question, targets)


def test_a_batch_that_does_not_fit_is_split() -> None:
    images = [known(seed) for seed in range(6)]
    runtime = Small(classifier())
    with live(runtime, told=ModelConfig(max_batch=2)) as found, ThreadPoolExecutor(8) as pool:
        service = found.server.services["tiny"]
        service._batcher.max_batch = 8  # there was more room when it was measured
        found.model.open.clear()
        first = send(pool, found.url, images[0].data)
        until(lambda: service.busy_for() > 0)
        futures = [send(pool, found.url, image.data) for image in images]
        until(lambda: len(service._batcher._queue) == 6)
        found.model.open.set()
        for future, image in zip(futures, images, strict=True):
            assert numpy.allclose(array(future.result()), image.raw[None], rtol=1e-4, atol=1e-6)
        assert first.result().status_code == 200 and service.max_batch <= 2


def test_a_dead_model_is_not_ready_and_not_healthy() -> None:
    with live() as found:
        killed = CLIENT.post(f"{found.url}/v1/explain", content=encoded(with_corner(pixels(0), KILLER)))
        assert kind(killed) == (503, "not_ready")
        assert CLIENT.get(f"{found.url}/readyz").status_code == CLIENT.get(f"{found.url}/healthz").status_code == 503
        assert kind(CLIENT.post(f"{found.url}/v1/explain", content=encoded(pixels(0)))) == (503, "not_ready")


def test_a_model_that_hangs_is_not_healthy(one: Known) -> None:
    with live(stall=0.2) as found, ThreadPoolExecutor(1) as pool:
        found.model.open.clear()
        slow = send(pool, found.url, one.data)
        until(lambda: CLIENT.get(f"{found.url}/healthz").status_code == 503)
        found.model.open.set()
        assert slow.result().status_code == 200
        until(lambda: CLIENT.get(f"{found.url}/healthz").status_code == 200)


def test_a_map_that_is_not_finite_is_no_answer() -> None:
    class Broken(ExplainerRuntime):
        def explain(self, images: Any, question: Question, targets: Any) -> Maps:
            maps = super().explain(images, question, targets)
            assert maps.raw is not None
            maps.raw.fill_(float("nan"))
            return maps

    with live(Broken(classifier())) as found:
        response = CLIENT.post(f"{found.url}/v1/explain?return=json", content=encoded(pixels(0)))
        assert kind(response) == (422, "not_finite")


def test_logs_have_the_request_and_nothing_of_the_image(
    client: httpx.Client, one: Known, caplog: pytest.LogCaptureFixture
) -> None:
    from shapleycam.serve.logs import JsonLines

    with caplog.at_level("INFO", logger="shapleycam.serve"):
        client.post("/v1/explain", content=one.data, headers={"x-request-id": "mine"})
        client.post("/v1/explain", files={"image": ("private name.png", b"GIF89a secret")})
        until(lambda: len(caplog.records) == 2)
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    assert lines[0]["request_id"] == "mine" and lines[0]["status"] == 200 and lines[0]["bytes_in"] == len(one.data)
    assert lines[1]["kind"] == "format" and lines[1]["path"] == "/v1/explain" and lines[1]["ms"] >= 0
    assert "private" not in str(lines) and "secret" not in str(lines)
    assert threading.active_count() < 60
