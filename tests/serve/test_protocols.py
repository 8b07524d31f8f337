"""KServe V1, the Open Inference Protocol and TorchServe's API, by their own clients where there are some."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
import torch
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from shapleycam import Explainer
from shapleycam.serve import ExplainerRuntime, Maps

from .tiny import CLASSES, PREPROCESS, SIDE, Known, Live, classifier, known, live

IMAGES = [known(seed) for seed in range(3)]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


# ---------------------------------------------------------------------------------------------------------- KServe V1


def test_kserve_explains_and_predicts(client: httpx.Client) -> None:
    assert client.get("/v1/models").json() == {"models": ["tiny"]}
    assert client.get("/v1/models/tiny").json() == {"name": "tiny", "ready": True}
    body = {"instances": [{"b64": b64(one.data)} for one in IMAGES]}
    answer = client.post("/v1/models/tiny:explain", json=body).json()
    for found, predicted, one in zip(answer["explanations"], answer["predictions"], IMAGES, strict=True):
        assert found["class"] == predicted["class"] == one.target and found["shape"] == [8, 8]
        assert numpy.allclose(found["map"], one.raw, rtol=1e-4, atol=1e-6)
    answer = client.post("/v1/models/tiny:predict", json=body).json()
    assert [one["class"] for one in answer["predictions"]] == [one.target for one in IMAGES]
    assert answer["predictions"][0]["probability"] == pytest.approx(float(IMAGES[0].logits.softmax(0).max()), abs=1e-5)


def test_kserve_takes_images_in_every_common_form(client: httpx.Client) -> None:
    one = IMAGES[0]
    forms = [
        {"image": {"b64": b64(one.data)}},
        {"image_bytes": {"b64": b64(one.data)}},
        b64(one.data),
        "data:image/png;base64," + b64(one.data),
        PREPROCESS.normalise(one.view).tolist(),
        {"data": one.view.permute(1, 2, 0).tolist()},
    ]
    answer = client.post("/v1/models/tiny:explain", json={"instances": forms}).json()
    for found in answer["explanations"]:
        assert numpy.allclose(found["map"], one.raw, rtol=1e-4, atol=1e-6)


def test_kserve_parameters_and_those_of_an_instance(client: httpx.Client) -> None:
    one = IMAGES[0]
    body = {
        "instances": [{"b64": b64(one.data)}, {"b64": b64(one.data), "target": [0, 5], "method": "gradcam"}],
        "parameters": {"target": 4, "utility": "probability", "gap": True},
    }
    answer = client.post("/v1/models/tiny:explain", json=body).json()["explanations"]
    images = PREPROCESS.normalise(one.view)[None]
    first = Explainer(classifier().model, utility="probability")(images, 4)
    second = Explainer(classifier().model, utility="probability", method="gradcam")(images, [[0, 5]])
    assert numpy.allclose(answer[0]["map"], first.raw[0], rtol=1e-4, atol=1e-7) and answer[0]["class"] == 4
    assert "completeness_gap" in answer[0]
    assert [m["class"] for m in answer[1]["maps"]] == [0, 5]
    assert numpy.allclose([m["map"] for m in answer[1]["maps"]], second.raw[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"no json", 400, "no JSON"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b"[]", 400, "instances"),
        (b'{"instances": []}', 400, "at least one"),
        (b'{"instances": [3]}', 400, "Instance 0"),
        (b'{"instances": ["/etc/passwd"]}', 400, "base64"),
        (b'{"instances": ["http://127.0.0.1/a.png"]}', 400, "base64"),
        (b'{"instances": [{"b64": "R0lGODlh"}]}', 415, "PNG"),
        (b'{"instances": [{"b64": ""}]}', 400, "empty"),
        (b'{"instances": [[1, [2, 3]]]}', 422, "array of numbers"),
        (b'{"instances": [[1, 2, 3]]}', 422, "shape"),
        (b'{"instances": ["AA=="], "parameters": 3}', 400, "parameters"),
        (b'{"instances": ["AA=="], "parameters": {"target": "cat"}}', 422, "target"),
        (b'{"instances": ["AA=="], "parameters": {"method": 3}}', 422, "method"),
        (json.dumps({"instances": ["AA=="] * 17}).encode(), 413, "16"),
    ],
)
def test_kserve_mistakes(client: httpx.Client, content: bytes, status: int, words: str) -> None:
    response = client.post("/v1/models/tiny:explain", content=content)
    assert response.status_code == status and words in response.json()["error"]
    assert client.post("/v1/models/other:explain", content=content).status_code == 404


# -------------------------------------------------------------------------------------------------- the open protocol


@pytest.fixture
def grpc_less(shared: Live) -> Any:
    found = triton.InferenceServerClient(f"127.0.0.1:{shared.port}")
    yield found
    found.close()


def encoded_input(images: list[Known]) -> Any:
    image = triton.InferInput("image", [len(images)], "BYTES")
    image.set_data_from_numpy(numpy.array([one.data for one in images], dtype=object), binary_data=True)
    return image


def test_tritons_client_asks_after_health_and_metadata(grpc_less: Any) -> None:
    assert grpc_less.is_server_live() and grpc_less.is_server_ready() and grpc_less.is_model_ready("tiny")
    assert not grpc_less.is_model_ready("other")
    assert grpc_less.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    told = grpc_less.get_model_metadata("tiny")
    assert told["inputs"][0] == {"name": "image", "datatype": "BYTES", "shape": [-1]}
    assert told["outputs"][0]["shape"] == [-1, CLASSES]


@pytest.mark.parametrize("narrow", [False, True])
def test_tritons_client_gets_binary_maps_of_encoded_images(grpc_less: Any, narrow: bool) -> None:
    outputs = [triton.InferRequestedOutput(name) for name in ("prediction", "target_class", "raw", "saliency_map")]
    parameters = {"map_datatype": "FP16"} if narrow else None
    found = grpc_less.infer("tiny", [encoded_input(IMAGES)], outputs=outputs, parameters=parameters, request_id="seven")
    assert found.get_response()["id"] == "seven"
    expected = Explainer(classifier().model)(torch.stack([PREPROCESS.normalise(one.view) for one in IMAGES]))
    assert numpy.allclose(found.as_numpy("prediction"), expected.logits, rtol=1e-4, atol=1e-5)
    assert found.as_numpy("target_class").tolist() == [[one.target] for one in IMAGES]
    assert found.as_numpy("raw").dtype == (numpy.float16 if narrow else numpy.float32)
    close = {"rtol": 2e-3, "atol": 2e-3} if narrow else {"rtol": 1e-4, "atol": 1e-5}
    assert numpy.allclose(found.as_numpy("raw")[:, 0], expected.raw, **close)
    assert found.as_numpy("saliency_map").shape == (3, 1, SIDE, SIDE)
    assert numpy.allclose(found.as_numpy("saliency_map")[:, 0], expected.heatmaps(), **close)


def test_tritons_client_sends_tensors_and_targets(grpc_less: Any) -> None:
    views = torch.stack([one.view for one in IMAGES])
    targets = numpy.array([[0, 1], [2, 3], [4, 5]])
    expected = Explainer(classifier().model)(PREPROCESS.normalise(views), targets.tolist())
    for data, kind in ((PREPROCESS.normalise(views).numpy(), "FP32"), (views.numpy(), "UINT8")):
        for binary in (True, False):
            image = triton.InferInput("image", list(data.shape), kind)
            image.set_data_from_numpy(data, binary_data=binary)
            target = triton.InferInput("target", [3, 2], "INT64")
            target.set_data_from_numpy(targets, binary_data=binary)
            outputs = [triton.InferRequestedOutput("raw", binary_data=binary)]
            found = grpc_less.infer("tiny", [image, target], outputs=outputs).as_numpy("raw")
            assert numpy.allclose(found, expected.raw, rtol=1e-4, atol=1e-5), (kind, binary)


def test_without_outputs_all_come_and_a_prediction_alone_is_no_explanation(client: httpx.Client) -> None:
    body = {
        "inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [b64(IMAGES[0].data)]}],
        "parameters": {"method": "gradcam"},
    }
    answer = client.post("/v2/models/tiny/infer", json=body).json()
    assert [one["name"] for one in answer["outputs"]] == ["prediction", "target_class", "raw", "saliency_map"]
    gradcam = known(0, method="gradcam").raw
    assert numpy.allclose(answer["outputs"][2]["data"], gradcam.flatten(), rtol=1e-4, atol=1e-6)
    body = {"inputs": body["inputs"], "outputs": [{"name": "prediction"}]}
    [alone] = client.post("/v2/models/tiny/infer", json=body).json()["outputs"]
    assert numpy.allclose(alone["data"], IMAGES[0].logits, rtol=1e-4) and alone["shape"] == [1, CLASSES]


def test_tritons_client_is_told_of_mistakes(grpc_less: Any) -> None:
    bad = triton.InferInput("image", [2], "BYTES")
    bad.set_data_from_numpy(numpy.array([IMAGES[0].data, b"GIF89a"], dtype=object), binary_data=True)
    with pytest.raises(InferenceServerException, match="PNG"):
        grpc_less.infer("tiny", [bad])
    with pytest.raises(InferenceServerException, match="no model"):
        grpc_less.infer("other", [bad])
    with pytest.raises(InferenceServerException, match="no output 'heat'"):
        grpc_less.infer("tiny", [bad], outputs=[triton.InferRequestedOutput("heat")])
    outputs = [triton.InferRequestedOutput("raw", binary_data=False)]
    with pytest.raises(InferenceServerException, match="FP16 is binary only"):
        grpc_less.infer("tiny", [encoded_input(IMAGES[:1])], outputs=outputs, parameters={"map_datatype": "FP16"})


def v2(*inputs: Any, **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


IMAGE: dict[str, Any] = {"name": "image", "shape": [1], "datatype": "BYTES", "data": ["AA=="]}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "JSON"),
        (b"{}", "inputs"),
        (v2(), "inputs"),
        (v2(3), "inputs"),
        (v2({**IMAGE, "name": "picture"}), "'image'"),
        (v2({**IMAGE, "shape": [2]}), "does not hold"),
        (v2({**IMAGE, "shape": [-1]}), "shape"),
        (v2({**IMAGE, "shape": "x"}), "shape"),
        (v2({**IMAGE, "data": None}), "list"),
        (v2({**IMAGE, "data": ["/etc/passwd"]}), "base64"),
        (v2({**IMAGE, "datatype": "FP64"}), "FP64"),
        (v2({**IMAGE, "datatype": "FP32", "data": [1.5]}), "BYTES [N]"),
        (v2({**IMAGE, "datatype": "FP32", "data": ["x"]}), "does not hold"),
        (v2({**IMAGE, "datatype": "UINT8", "data": [256]}), "does not hold"),
        (v2({**IMAGE, "datatype": "FP32", "shape": [1, 10**9, 10**9], "data": [1.0]}), "does not hold"),
        (v2({**IMAGE, "shape": [1] * 9}), "1 to 8 positive"),
        (v2({**IMAGE, "shape": [1, 2**31]}), "1 to 8 positive"),
        (v2({**IMAGE, "shape": [1, True]}), "1 to 8 positive"),
        (v2({**IMAGE, "shape": [0], "data": []}), "1 to 8 positive"),
        (v2({**IMAGE, "shape": []}), "1 to 8 positive"),
        (v2({**IMAGE, "datatype": "FP32", "shape": [1] + [10**18] * 50_000, "data": []}), "1 to 8 positive"),
        (v2(IMAGE, {"name": "target", "shape": [1, 0], "datatype": "INT64", "data": []}), "1 to 8 positive"),
        (v2({**IMAGE, "datatype": ["FP32"]}), "a datatype"),
        (v2(IMAGE, id="x" * 257), "256"),
        (v2(IMAGE, id=7), "256"),
        (b"[" * 100_000, "nested too deeply"),
        (v2({**IMAGE, "parameters": {"binary_data_size": 10}}), "10 bytes"),
        (v2({**IMAGE, "parameters": {"binary_data_size": -1}}), "-1"),
        (v2(IMAGE, {"name": "target", "shape": [2], "datatype": "INT64", "data": [1, 2]}), "of 2 images"),
        (v2(IMAGE, {"name": "target", "shape": [1], "datatype": "FP32", "data": [1]}), "INT64"),
        (v2(IMAGE, parameters=3), "parameters"),
        (v2(IMAGE, parameters={"map_datatype": "FP8"}), "FP8"),
        (v2(IMAGE, outputs=[3]), "no output"),
        (v2({**IMAGE, "data": json.loads("[" * 900 + "]" * 900)}), "does not hold"),
    ],
)
def test_a_v2_body_that_is_none(client: httpx.Client, body: bytes, words: str) -> None:
    response = client.post("/v2/models/tiny/infer", content=body)
    assert response.status_code == 400 and words in response.json()["error"], response.text


@pytest.mark.parametrize("size", ["-1", "x", "0", "999999", pytest.param("9" * 5000, id="long")])
def test_a_wrong_length_of_the_json(client: httpx.Client, size: str) -> None:
    headers = {"inference-header-content-length": size}
    response = client.post("/v2/models/tiny/infer", content=v2(IMAGE) + bytes(9), headers=headers)
    assert response.status_code == 400 and "Content-Length" in response.json()["error"]


@pytest.mark.parametrize("rest", [b"\x05", b"\xff\xff\xff\xff1234", b"\x01\x00\x00\x00"])
def test_elements_that_end_too_early(client: httpx.Client, rest: bytes) -> None:
    head = v2({"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(rest)}})
    headers = {"inference-header-content-length": str(len(head))}
    response = client.post("/v2/models/tiny/infer", content=head + rest, headers=headers)
    assert response.status_code == 400 and "ends within" in response.json()["error"]


# ------------------------------------------------------------------------------------------------ numbers and derivatives


def tensor(value: float) -> bytes:
    image = PREPROCESS.normalise(IMAGES[0].view).clone()
    image[0, 0, 0] = value
    return v2({"name": "image", "shape": [1, 3, SIDE, SIDE], "datatype": "FP32", "data": image.flatten().tolist()})


def infer(url: str, output: str, value: float = 0.0, **parameters: Any) -> httpx.Response:
    body = json.loads(tensor(value))
    told = {"outputs": [{"name": output, "parameters": {"binary_data": bool(parameters)}}], "parameters": parameters}
    return httpx.post(f"{url}/v2/models/tiny/infer", content=json.dumps({**body, **told}), verify=False)


@pytest.mark.filterwarnings("ignore:The maps of images")
def test_what_is_not_finite_is_no_answer(client: httpx.Client, shared: Live) -> None:
    for value in (float("nan"), float("inf")):
        image = json.loads(tensor(value))["inputs"][0]["data"]
        pixels = torch.tensor(image).reshape(3, SIDE, SIDE).tolist()
        answers = [
            client.post("/v1/models/tiny:predict", content=json.dumps({"instances": [pixels]})),
            client.post("/v1/models/tiny:explain", content=json.dumps({"instances": [pixels]})),
            infer(shared.url, "prediction", value),
            infer(shared.url, "prediction", value, binary_data_output=True),
        ]
        for answer in answers:
            assert answer.status_code == 422 and "prediction of image 0 is not finite" in answer.json()["error"]


class Loud(ExplainerRuntime):
    def explain(self, images: Any, question: Any, targets: Any) -> Maps:
        maps = super().explain(images, question, targets)
        assert maps.raw is not None
        maps.raw.mul_(1e6)
        return maps


def test_maps_that_fp16_cannot_hold_are_refused_with_advice() -> None:
    with live(Loud(classifier())) as found:
        refused = infer(found.url, "raw", map_datatype="FP16")
        assert refused.status_code == 422 and "ask for it in FP32" in refused.json()["error"]
        assert infer(found.url, "raw", map_datatype="FP32").status_code == 200
        assert infer(found.url, "saliency_map", map_datatype="FP16").status_code == 200


def test_an_engine_that_the_model_has_no_derivatives_for_is_the_clients_mistake(one: Known) -> None:
    bent = classifier()
    bent.model.head = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, CLASSES))
    with live(ExplainerRuntime(bent, layer="features")) as found, httpx.Client(base_url=found.url, verify=False) as asking:
        refused = asking.post("/v1/explain?engine=closed_form", content=one.data)
        assert refused.status_code == 422 and refused.json()["error"]["kind"] == "invalid"
        assert "closed_form" in refused.json()["error"]["message"]
        assert asking.post("/v1/explain?engine=reverse_over_reverse", content=one.data).status_code == 200


# ---------------------------------------------------------------------------------------------------------- TorchServe


def test_torchserve(client: httpx.Client, one: Known) -> None:
    assert client.get("/ping").json() == {"status": "Healthy"}
    by_form = client.post("/predictions/tiny", files={"data": one.data}).json()
    by_body = client.post("/predictions/tiny", content=one.data).json()
    assert by_form == by_body and next(iter(by_body)) == f"thing {one.target}" and len(by_body) == 5
    found = client.post("/explanations/tiny", content=one.data).json()
    expected = Explainer(classifier().model)(PREPROCESS.normalise(one.view)[None]).heatmaps()[0]
    assert numpy.allclose(found, expected, atol=1e-3)
    wrong = client.post("/explanations/tiny", content=b"GIF89a")
    assert wrong.status_code == 415 and wrong.json()["code"] == 415 and wrong.json()["type"] == "format"
    assert client.post("/predictions/other", content=one.data).status_code == 404


# -------------------------------------------------------------------------------------------------------- KServe's SDK


@pytest.mark.slow
@pytest.mark.skipif(
    "KSERVE_PYTHON" not in os.environ, reason="KSERVE_PYTHON names no interpreter with kserve; .ci/run makes one"
)
def test_kserves_own_client(shared: Live) -> None:
    script = Path(__file__).with_name("kserve_client.py")
    command = [os.environ["KSERVE_PYTHON"], str(script), shared.url, "tiny"]
    done = subprocess.run(
        command, input=json.dumps([b64(one.data) for one in IMAGES]), capture_output=True, text=True, timeout=120, env={}
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["v1_ready"] and told["v2_live"] and told["v2_ready"] and told["v2_model_ready"]
    for n, one in enumerate(IMAGES):
        assert told["explain"]["explanations"][n]["class"] == told["predict"]["predictions"][n]["class"] == one.target
        assert numpy.allclose(told["explain"]["explanations"][n]["map"], one.raw, rtol=1e-4, atol=1e-6)
        assert numpy.allclose(told["v2_raw"][n][0], one.raw, rtol=1e-4, atol=1e-6)
