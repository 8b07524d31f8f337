"""Ray Serve around the explainer, for bench/serve.py: ``python -m bench.serve_ray PORT BATCH``."""

from __future__ import annotations

import signal
import sys

import ray
import torch
from ray import serve
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from .serve_work import Work

PORT, SIZE = map(int, sys.argv[1:3]) if len(sys.argv) > 2 else (8000, 1)


@serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 1})
class Api:
    """One replica."""

    def __init__(self) -> None:
        self.work = Work()

    @serve.batch(max_batch_size=SIZE, batch_wait_timeout_s=0.0)
    async def together(self, pictures: list[bytes]) -> list[Tensor]:
        """See Ray Serve."""
        maps = self.work.explain(torch.stack([self.work.decode(one) for one in pictures]))
        return [one[None] for one in maps]

    async def __call__(self, request: Request) -> Response:
        """See Ray Serve."""
        form = await request.form()
        data = await form["request"].read()  # type: ignore[union-attr]
        return Response(self.work.encode(await self.together(data)), media_type="application/x-npy")


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(Api.bind(), route_prefix="/predict")
    signal.sigwait([signal.SIGTERM, signal.SIGINT])
    serve.shutdown()
    ray.shutdown()
