"""KServe's SDK against a server: ``python kserve_client.py URL MODEL < instances``; prints what it was answered.

It runs in an environment of its own (KSERVE_PYTHON names its interpreter), as the SDK pins packages that others need newer.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from typing import Any

import numpy
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig


async def main(url: str, model: str, instances: list[str]) -> dict[str, Any]:
    first = InferenceRESTClient(RESTConfig(protocol="v1"))
    body = {"instances": [{"b64": one} for one in instances]}
    told: dict[str, Any] = {
        "v1_ready": await first.is_model_ready(url, model),
        "explain": await first.explain(url, model_name=model, data=body),
        "predict": await first.infer(url, data=body, model_name=model),
    }
    second = InferenceRESTClient(RESTConfig(protocol="v2"))
    image = InferInput(name="image", shape=[len(instances)], datatype="BYTES")
    image.set_data_from_numpy(numpy.array([base64.b64decode(one) for one in instances], dtype=object), binary_data=True)
    request = InferRequest(model_name=model, infer_inputs=[image])
    answer = await second.infer(url, request, model_name=model)
    told["v2_live"] = await second.is_server_live(url)
    told["v2_ready"] = await second.is_server_ready(url)
    told["v2_model_ready"] = await second.is_model_ready(url, model)
    told["v2_raw"] = next(one for one in answer.outputs if one.name == "raw").as_numpy().tolist()
    await first.close()
    await second.close()
    return told


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1], sys.argv[2], json.load(sys.stdin)))))
