"""POST /v1/explain: what comes back is what the explainer says, in every form."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import httpx
import numpy
import pytest
import torch
from PIL import Image

from shapleycam import Explainer

from .tiny import CLASSES, PREPROCESS, SIDE, Known, Live, classifier, encoded, known, pixels


def array(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return numpy.load(io.BytesIO(response.content), allow_pickle=False)


def picture(content: bytes) -> Any:
    return numpy.asarray(Image.open(io.BytesIO(content)))


def test_json_has_the_explainers_numbers(client: httpx.Client, one: Known) -> None:
    answer = client.post("/v1/explain?return=json&gap=true", content=one.data).json()
    expected = Explainer(classifier().model)(PREPROCESS.normalise(one.view)[None], with_gap=True)
    [found] = answer["explanations"]
    assert found["class"] == one.target and found["label"] == f"thing {one.target}"
    assert found["probability"] == pytest.approx(float(expected.probabilities[0]), abs=1e-5)
    assert found["logit"] == pytest.approx(float(one.logits[one.target]), rel=1e-5)
    assert found["completeness_gap"] == pytest.approx(float(expected.gap[0]), rel=1e-4)
    assert numpy.allclose(found["map"], one.raw, rtol=1e-4, atol=1e-6)
    assert answer["method"] == "shapleycam" and answer["engine"] == "closed_form" and answer["layer"] == "features"
    assert answer["image"] == {"width": SIDE, "height": SIDE} and "view" not in answer
    order = one.logits.argsort(descending=True)[:5].tolist()
    assert [row["class"] for row in answer["top"]] == order


@pytest.mark.parametrize("how", ["multipart", "raw", "octets"])
def test_the_image_comes_as_a_form_or_as_the_body(client: httpx.Client, one: Known, how: str) -> None:
    if how == "multipart":
        response = client.post("/v1/explain?return=raw", files={"picture": ("../../etc/passwd", one.data, "text/plain")})
    else:
        kind = {"raw": "image/png", "octets": "application/octet-stream"}[how]
        response = client.post("/v1/explain?return=raw", content=one.data, headers={"content-type": kind})
    assert numpy.allclose(array(response), one.raw[None], rtol=1e-4, atol=1e-6)
    assert response.headers["x-shapleycam-classes"] == str(one.target)


def test_a_form_over_a_megabyte_stays_in_memory(client: httpx.Client, one: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    padded = one.data + bytes(2_000_000)  # behind the end of the PNG, where nobody reads
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda *_, **__: pytest.fail("an image went to the disk"))
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", lambda _: pytest.fail("an image went to the disk"))
    response = client.post("/v1/explain?return=raw", files={"image": padded})
    assert numpy.allclose(array(response), one.raw[None], rtol=1e-4, atol=1e-6)


def test_pictures_are_the_explanations_own(client: httpx.Client, one: Known) -> None:
    expected = Explainer(classifier().model)(PREPROCESS.normalise(one.view)[None])
    drawn = expected.overlay(one.view[None], colormap="viridis", alpha=0.25)[0]
    overlay = client.post("/v1/explain?colormap=viridis&alpha=0.25", content=one.data)
    assert overlay.headers["content-type"] == "image/png"
    assert numpy.abs(picture(overlay.content).astype(int) - drawn.numpy().astype(int)).max() <= 1
    heatmap = client.post("/v1/explain?return=heatmap&size=20x40", content=one.data)
    grey = expected.heatmaps((20, 40))[0].numpy() * 255
    assert picture(heatmap.content).shape == (20, 40) and numpy.abs(picture(heatmap.content) - grey).max() <= 1.01


def test_arrays_of_several_classes(client: httpx.Client, one: Known) -> None:
    expected = Explainer(classifier().model)(PREPROCESS.normalise(one.view)[None], [[4, 1]])
    for form, maps in (("raw", expected.raw[0]), ("npy", expected.heatmaps((8, 8))[0])):
        found = array(client.post(f"/v1/explain?return={form}&size=layer&target=4&target=1", content=one.data))
        assert found.shape == (2, 8, 8) and numpy.allclose(found, maps, rtol=1e-4, atol=1e-5)
    topk = client.post("/v1/explain?return=json&topk=3&embed=heatmap&embed=view", content=one.data).json()
    assert [e["class"] for e in topk["explanations"]] == one.logits.topk(3).indices.tolist()
    assert (picture(base64.b64decode(topk["view"])) == one.view.permute(1, 2, 0).numpy()).all()
    assert picture(base64.b64decode(topk["explanations"][2]["heatmap"])).shape == (SIDE, SIDE)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "gradcam"},
        {"method": "layercam", "utility": "probability"},
        {"engine": "quadrature"},
        {"engine": "reverse_over_reverse", "utility": "log_probability"},
    ],
)
def test_method_utility_and_engine(client: httpx.Client, options: dict[str, str]) -> None:
    image = known(3, **options)
    found = array(client.post("/v1/explain", params={"return": "raw", **options}, content=image.data))
    assert numpy.allclose(found, image.raw[None], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        ("model=other", 404, "no model 'other'"),
        ("method=scorecam", 422, "not served"),
        ("utility=joy", 422, "not served"),
        ("target=6", 422, "classes 0 to 5"),
        ("target=-1", 422, "out of range"),
        ("topk=0", 422, "topk"),
        ("topk=11", 422, "topk"),
        ("topk=7&return=json", 422, "6 classes"),
        ("target=1&topk=2&return=json", 422, "exclude"),
        ("topk=2", 422, "one picture"),
        ("return=tiff", 422, "return"),
        ("size=4096&return=npy", 422, "2048"),
        ("size=0", 422, "size"),
        ("size=../x", 422, "size"),
        ("alpha=nan", 422, "alpha"),
        ("timeout=0", 422, "timeout"),
    ],
)
def test_a_question_that_cannot_be_answered_says_why(
    client: httpx.Client, one: Known, query: str, status: int, words: str
) -> None:
    response = client.post(f"/v1/explain?{query}", content=one.data)
    error = response.json()["error"]
    assert response.status_code == status and words in error["message"] and error["request_id"]


def test_clients_cannot_name_files_or_addresses(client: httpx.Client) -> None:
    for body in (b"/etc/passwd", b"http://127.0.0.1/x.png", b"file:///etc/passwd"):
        assert client.post("/v1/explain", content=body).status_code == 415


def test_a_jpeg_and_a_webp_are_what_they_show(client: httpx.Client) -> None:
    for form, options in (("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})):
        data = encoded(pixels(5), form, **options)
        view = torch.from_numpy(numpy.asarray(Image.open(io.BytesIO(data)).convert("RGB")).copy()).permute(2, 0, 1)
        expected = Explainer(classifier().model)(PREPROCESS.normalise(view)[None])
        assert numpy.allclose(array(client.post("/v1/explain?return=raw", content=data)), expected.raw, rtol=1e-3, atol=1e-5)


def test_info_tells_what_is_served(client: httpx.Client) -> None:
    about = client.get("/v1/info").json()
    assert about["default"] == "tiny" and about["models"]["tiny"]["classes"] == CLASSES
    assert "scorecam" not in about["models"]["tiny"]["methods"] and about["models"]["tiny"]["methods"][0] == "shapleycam"


def test_every_answer_has_an_id_and_safe_headers(client: httpx.Client, one: Known, shared: Live) -> None:
    mine = client.post("/v1/explain", content=one.data, headers={"x-request-id": "abc-1"})
    other = client.get("/nowhere", headers={"x-request-id": b"bad id\xe9"})
    assert mine.headers["x-request-id"] == "abc-1" and len(other.headers["x-request-id"]) == 32
    for response in (mine, other):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in response.headers["content-security-policy"]
    assert other.status_code == 404 and json.loads(other.text)["error"]["kind"] == "not_found"
    assert client.put("/v1/explain", content=one.data).status_code == 405


def test_metrics_count_what_happened(client: httpx.Client, one: Known) -> None:
    def value(line: str) -> float:
        rows = [row for row in client.get("/metrics").text.splitlines() if row.startswith(line)]
        return float(rows[0].split()[-1]) if rows else 0.0

    good = 'shapleycam_requests_total{method="POST",route="/v1/explain",status="200"}'
    bad = 'shapleycam_errors_total{kind="format"}'
    images = 'shapleycam_images_total{model="tiny"}'
    before = [value(line) for line in (good, bad, images)]
    client.post("/v1/explain", content=one.data)
    client.post("/v1/explain", content=b"GIF89a")
    assert [value(line) for line in (good, bad, images)] == [n + 1 for n in before]
    assert value('shapleycam_stage_seconds_count{model="tiny",stage="model"}') > 0
    assert value("shapleycam_ready") == 1 and value('shapleycam_queue_requests{model="tiny"}') == 0
