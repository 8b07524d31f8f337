"""The OpenAPI document against the server, by schemathesis: what it generates, and the document's own examples."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from shapleycam.serve import ExplainerRuntime
from shapleycam.serve.app import create_app
from shapleycam.serve.config import ModelConfig, ServerConfig
from shapleycam.serve.server import Server

from .tiny import Known, Live, classifier

CONFIG = ServerConfig(models={"tiny": ModelConfig(max_batch=4)})
DOCUMENT = create_app(Server(CONFIG, {"tiny": ExplainerRuntime(classifier())})).openapi()
schema = schemathesis.openapi.from_dict(DOCUMENT)


def no_crash(context: Any, response: Any, case: Any) -> None:
    """503 and 504 are answers: a request may ask for less time than anything takes."""
    assert response.status_code < 500 or response.status_code in (503, 504), response.text


CHECKS = [no_crash, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.mark.filterwarnings("ignore::shapleycam.ShapleyCamWarning")  # of what is asked, which the server logs
@schema.parametrize()
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_the_document_allows_is_answered_as_it_says(case: Any, shared: Live) -> None:
    if "model" in case.path_parameters and len(case.path_parameters["model"]) % 2:
        case.path_parameters["model"] = "tiny"  # or nothing but 404 would ever come back
    case.call_and_validate(base_url=shared.url, checks=CHECKS)


def test_the_document_has_what_people_need() -> None:
    assert DOCUMENT["paths"].keys() >= {
        "/v1/explain",
        "/v1/info",
        "/v1/models",
        "/v1/models/{model}:explain",
        "/v1/models/{model}:predict",
        "/v2/models/{model}/infer",
        "/v2/health/ready",
        "/ping",
        "/predictions/{model}",
        "/explanations/{model}",
        "/healthz",
        "/readyz",
        "/metrics",
    }
    for path, operations in DOCUMENT["paths"].items():
        for method, operation in operations.items():
            assert operation.get("summary") and operation.get("tags"), (method, path)
    query = {p["name"]: p for p in DOCUMENT["paths"]["/v1/explain"]["post"]["parameters"]}
    names = "model method utility engine target topk gap return embed size colormap alpha timeout"
    assert query.keys() == set(names.split())


def test_the_examples_of_the_document_are_answered(shared: Live, one: Known) -> None:
    bodies = {
        path: operations["post"]["requestBody"]["content"]["application/json"]["example"]
        for path, operations in DOCUMENT["paths"].items()
        if "example" in operations.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
    }
    assert len(bodies) == 3
    for path, body in bodies.items():
        answer = httpx.post(shared.url + path.replace("{model}", "tiny"), json=body, verify=False)
        assert answer.status_code == 200, (path, answer.text)
    example = DOCUMENT["paths"]["/v1/explain"]["post"]["responses"]["200"]["content"]["application/json"]["example"]
    real = httpx.post(f"{shared.url}/v1/explain?return=json", content=one.data, verify=False).json()
    assert example.keys() == real.keys() and example["explanations"][0].keys() == real["explanations"][0].keys()


def test_negative_data_is_rejected_by_the_query(shared: Live, one: Known) -> None:
    for name, value in (("topk", "x"), ("alpha", "2"), ("gap", "maybe"), ("return", "gif"), ("embed", "x"), ("size", "-1")):
        answer = httpx.post(f"{shared.url}/v1/explain", params={name: value}, content=one.data, verify=False)
        assert answer.status_code == 422 and name in answer.json()["error"]["message"]
