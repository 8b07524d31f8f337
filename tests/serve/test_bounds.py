"""What one client may cost the others: time, memory, connections."""

from __future__ import annotations

import base64
import gc
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image

from shapleycam.serve import BadImage
from shapleycam.serve.config import Limits, ModelConfig
from shapleycam.serve.pictures import MOST_SCANS, decode, scans
from shapleycam.serve.protocols import kserve_v1, tensors

from .test_faults import CLIENT, kind, png_that_claims, send, until
from .tiny import Known, Live, encoded, live, pixels

# ------------------------------------------------------------------------------------------------------------- answers


def ask(url: str, way: str, data: bytes, **options: Any) -> httpx.Response:
    """The same by every protocol."""
    encoded = base64.b64encode(data).decode()
    if way.startswith("explain?"):
        return CLIENT.post(f"{url}/v1/{way}", content=data)
    if way.startswith("v1 "):
        return CLIENT.post(f"{url}/v1/models/tiny:{way[3:]}", json={"instances": [encoded] * options.get("count", 1)})
    if way.startswith("v2 "):
        count = options.get("count", 1)
        inputs = [{"name": "image", "shape": [count], "datatype": "BYTES", "data": [encoded] * count}]
        outputs = [{"name": name} for name in way[3:].split()]
        return CLIENT.post(f"{url}/v2/models/tiny/infer", json={"inputs": inputs, "outputs": outputs})
    return CLIENT.post(f"{url}/{way}/tiny", content=data)


LARGE = [
    "explain?return=npy&size=300",
    "explain?return=heatmap&size=300",
    "explain?return=npy&size=120&topk=6",
    "explain?return=json&topk=6&embed=overlay&embed=view&embed=heatmap",
    "v2 saliency_map",
    "v2 raw saliency_map prediction target_class",
    "explanations",
]


@pytest.mark.parametrize("way", LARGE)
def test_an_answer_over_the_limit_is_refused_before_it_is_computed(way: str, one: Known) -> None:
    with live(limits=Limits(answer=16_000)) as found:
        calls = len(found.model.sizes)
        refused = ask(found.url, way, one.data)
        assert refused.status_code == 413 and "at most 16000" in refused.text
        assert len(found.model.sizes) == calls
        assert ask(found.url, "explain?return=npy&size=60", one.data).status_code == 200
        many = ask(found.url, "v1 explain", one.data, count=6)
        assert many.status_code == 413 and "at most 16000" in many.text


@pytest.mark.parametrize("way", [*LARGE, "explain?return=overlay", "explain?return=raw&topk=3", "v1 explain", "v2 raw"])
def test_an_answer_is_no_larger_than_it_was_thought_to_be(
    way: str, one: Known, shared: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(shared.server, "hold", lambda _, size: sizes.append(size))
    answer = ask(shared.url, way, one.data)
    assert answer.status_code == 200 and len(sizes) == 1
    assert len(answer.content) < sizes[0] + 1500  # names, shapes, the most probable classes


def test_answers_have_the_bodies_budget(one: Known) -> None:
    with live(limits=Limits(bodies=300_000)) as found, ThreadPoolExecutor(4) as pool:
        service = found.server.services["tiny"]
        found.model.open.clear()
        large = "return=npy&size=256"  # 262144 bytes
        first = send(pool, found.url, one.data, large)
        until(lambda: service.held == 1)
        assert kind(CLIENT.post(f"{found.url}/v1/explain?{large}", content=one.data)) == (503, "bodies")
        small = send(pool, found.url, one.data)
        until(lambda: service.held == 2)
        found.model.open.set()
        assert first.result().status_code == small.result().status_code == 200
        assert CLIENT.post(f"{found.url}/v1/explain?{large}", content=one.data).status_code == 200


# ---------------------------------------------------------------------------------------------------------- JSON and V2


def test_images_are_counted_before_any_is_looked_at(
    shared: Live, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Any] = []
    monkeypatch.setattr(kserve_v1, "image_of", lambda *a: looked.append(a))
    monkeypatch.setattr(tensors, "_tensor", lambda *a: looked.append(a))
    assert client.post("/v1/models/tiny:predict", content=b'{"instances":[' + b'"",' * 99_999 + b'""]}').status_code == 413
    for shape in ([100_000], [1, 100_000]):
        head = json.dumps(
            {"inputs": [{"name": "image", "shape": shape, "datatype": "BYTES", "parameters": {"binary_data_size": 400_000}}]}
        ).encode()
        headers = {"inference-header-content-length": str(len(head))}
        answer = client.post("/v2/models/tiny/infer", content=head + bytes(400_000), headers=headers)
        assert answer.status_code == 413 and "At most 16" in answer.json()["error"]
    assert looked == []


def test_json_is_read_beside_the_event_loop_and_not_kept(one: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    for module, name in ((kserve_v1, "read"), (tensors, "read")):
        real = getattr(module, name)

        def noted(*a: Any, real: Any = real) -> Any:
            threads.append(threading.current_thread().name)
            return real(*a)

        monkeypatch.setattr(module, name, noted)

    def lists() -> int:
        return sum(type(one) is list for one in gc.get_objects())

    junk = [[] for _ in range(100_000)]  # type: ignore[var-annotated]
    image = base64.b64encode(one.data).decode()
    v1 = json.dumps({"instances": [{"b64": image}], "junk": junk})
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [image]}
    v2 = json.dumps({"inputs": [tensor], "outputs": [{"name": "raw"}], "junk": junk})
    del junk
    for path, body in (("/v1/models/tiny:explain", v1), ("/v2/models/tiny/infer", v2)):
        with live() as found, ThreadPoolExecutor(1) as pool:
            found.model.open.clear()
            before = lists()
            answer = pool.submit(CLIENT.post, found.url + path, content=body)
            until(lambda found=found: found.server.services["tiny"].busy_for() > 0)  # type: ignore[misc]
            assert lists() < before + 50_000
            found.model.open.set()
            assert answer.result().status_code == 200
    assert len(threads) == 2 and all(name.startswith("shapleycam-parse") for name in threads)


@pytest.mark.parametrize("way", ["v1", "v2"])
def test_json_of_very_many_lists_is_not_read(way: str, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = json.loads
    monkeypatch.setattr(json, "loads", lambda body, **k: (read.append(len(body)), real(body, **k))[1])

    def post(count: int, pair: bytes) -> httpx.Response:
        body = b'{"junk":[' + (count - 3) // 2 * (pair + b",") + pair + b"]}"
        assert body.count(b"[") + body.count(b"{") == count
        return client.post("/v1/models/tiny:explain" if way == "v1" else "/v2/models/tiny/infer", content=body)

    assert post(1_000_000, b"[[]]").status_code == 400 and len(read) == 1
    read.clear()
    for pair in (b"[[]]", b"[{}]"):
        refused = post(1_000_002, pair)
        assert refused.status_code == 413 and b"At most 1000000 lists" in refused.content
    assert read == []


def test_pixels_of_sixteen_images_in_json_are_few_enough_lists() -> None:
    sixteen = json.dumps({"instances": [[[[0] * 3] * 224] * 224] * 16}).encode()
    assert len(kserve_v1.read(sixteen, 16)[0]) == 16


def test_answers_do_not_wait_behind_json(one: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    with live() as found, ThreadPoolExecutor(4) as pool:
        gate, real = threading.Event(), kserve_v1.read
        begun = threading.Event()

        def slow(*a: Any) -> Any:
            begun.set()
            assert gate.wait(60)
            return real(*a)

        monkeypatch.setattr(kserve_v1, "read", slow)
        try:
            late = [pool.submit(ask, found.url, "v1 explain", one.data) for _ in range(4)]
            assert begun.wait(30)
            assert ask(found.url, "explain?return=raw", one.data).status_code == 200
        finally:
            gate.set()
        assert [answer.result().status_code for answer in late] == 4 * [200]


# ------------------------------------------------------------------------------------------------------------- pictures


def progressive(more: int) -> bytes:
    """A JPEG of several scans, the last one ``more`` times again."""
    data = encoded(pixels(5), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xc4", 0, data.rindex(b"\xff\xda")) : -2]
    return data[:-2] + more * last + b"\xff\xd9"


def test_a_jpeg_of_very_many_scans_is_not_decoded(client: httpx.Client) -> None:
    few = scans(progressive(0))
    assert few > 1 and scans(encoded(pixels(5), "JPEG")) == 1
    assert client.post("/v1/explain", content=progressive(MOST_SCANS - few)).status_code == 200
    assert kind(client.post("/v1/explain", content=progressive(MOST_SCANS - few + 1))) == (413, "scans")


def test_scans_are_counted_where_the_decoder_sees_them() -> None:
    plain, scan = encoded(pixels(5), "JPEG"), b"\xff\xda"
    thumbnail = b"\xff\xe1\x00\x0a" + 4 * scan  # within a segment before the first scan, as in EXIF
    assert scans(plain[:2] + thumbnail + plain[2:]) == 1
    assert scans(plain + 100 * scan) == 1  # behind the end, as of a film
    assert scans(plain[:-2] + b"\xff\xff\xff\xda\x00\x02\xff\xd0" + scan + b"\x00\x02\xff\xd9") == 3
    # With restart intervals, libjpeg finds the scans within the length of an unknown segment.
    with pytest.raises(BadImage, match="marker 02"):
        scans(plain[:-2] + b"\xff\x02\xff\xff" + 100 * (scan + b"\x00\x02"))
    with pytest.raises(BadImage, match="segments"):
        scans(plain[:2] + 100_000 * b"\xff\xfe\x00\x02" + plain[2:])


def test_the_servers_limit_of_pixels_is_the_only_one_and_no_other_format_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    huge = png_that_claims(14_000, 13_000)  # Pillow's own limit is below
    with pytest.raises(BadImage) as refused:
        decode(huge, pixels=100_000_000)
    assert refused.value.reason == "too_large" and "100000000" in str(refused.value)
    tried: list[Any] = []
    real = Image.open

    def opened(file: Any, *a: Any, formats: Any = None, **k: Any) -> Any:
        tried.append(formats)
        return real(file, *a, formats=formats, **k)

    monkeypatch.setattr(Image, "open", opened)
    monkeypatch.setattr(Image.Image, "load", lambda _: (_ for _ in ()).throw(OSError("it would be decoded")))
    with pytest.raises(BadImage, match="it would be decoded"):
        decode(huge, pixels=200_000_000)
    assert tried == [["PNG"]]


@pytest.mark.parametrize("way", ["explain?return=raw", "v1 explain", "v1 predict", "v2 raw", "predictions", "explanations"])
def test_every_protocol_has_the_same_limits_of_pictures(way: str, client: httpx.Client, shared: Live) -> None:
    for data, status in ((png_that_claims(30_000, 30_000), 413), (progressive(300), 413), (encoded(pixels(0), "GIF"), 415)):
        assert ask(shared.url, way, data).status_code == status


def test_a_decoder_that_hangs_is_not_healthy(one: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    with live(stall=0.2, told=ModelConfig(max_batch=1)) as found, ThreadPoolExecutor(1) as pool:
        service, gate = found.server.services["tiny"], threading.Event()
        real = service._item
        monkeypatch.setattr(service, "_item", lambda *a: gate.wait(20) and real(*a))
        slow = send(pool, found.url, one.data)
        until(lambda: CLIENT.get(f"{found.url}/healthz").status_code == 503)
        gate.set()
        assert slow.result().status_code == 200
        until(lambda: CLIENT.get(f"{found.url}/healthz").status_code == 200)


# -------------------------------------------------------------------------------------------------------------- answers


def test_a_request_that_took_too_long_is_a_deadline_in_the_metrics_too(one: Known) -> None:
    with live(told=ModelConfig(max_batch=1)) as found, ThreadPoolExecutor(1) as pool:
        found.model.open.clear()
        first = send(pool, found.url, one.data)
        until(lambda: found.server.services["tiny"].busy_for() > 0)
        late = CLIENT.post(f"{found.url}/v1/explain?timeout=1", content=one.data)
        assert kind(late) == (504, "deadline")
        found.model.open.set()
        assert first.result().status_code == 200
        told = CLIENT.get(f"{found.url}/metrics").text
        assert 'shapleycam_errors_total{kind="deadline"} 1.0' in told
        assert 'shapleycam_batcher_events_total{event="deadline",model="tiny"} 1.0' in told and 'event="cancelled"' not in told


def test_every_stage_is_measured(one: Known) -> None:
    with live() as found:
        assert ask(found.url, "v1 explain", one.data).status_code == 200
        told = CLIENT.get(f"{found.url}/metrics").text
        for stage in ("parse", "decode", "queue", "draw"):
            assert f'shapleycam_stage_seconds_count{{model="tiny",stage="{stage}"}} 1.0' in told


def test_a_path_with_a_slash_too_many_is_none_and_probes_answer_to_head(client: httpx.Client) -> None:
    wrong = client.post("/v1/explain/", content=b"x", headers={"host": "elsewhere.example"})
    assert kind(wrong) == (404, "not_found") and "location" not in wrong.headers
    for path in ("/healthz", "/readyz", "/ping", "/v2/health/live", "/v2/health/ready"):
        answer = client.head(path)
        assert answer.status_code == 200 and answer.content == b"", path
