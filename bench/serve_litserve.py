"""LitServe around the explainer, for bench/serve.py: ``python -m bench.serve_litserve PORT BATCH``."""

# No "from __future__ import annotations": LitServe reads those of decode_request. The class is at the top, as it is pickled.

import sys
from typing import Any

import litserve as ls
import torch
from fastapi import Response, UploadFile
from torch import Tensor

from .serve_work import Work


class Api(ls.LitAPI):
    """Batches where ``max_batch_size`` is above 1."""

    def setup(self, device: str) -> None:
        """In the worker."""
        self.work = Work()

    def decode_request(self, request: UploadFile) -> Tensor:
        """See LitServe."""
        return self.work.decode(request.file.read())

    def batch(self, inputs: list[Tensor]) -> Tensor:
        """See LitServe."""
        return torch.stack(list(inputs))

    def predict(self, x: Tensor) -> Tensor:
        """See LitServe."""
        return self.work.explain(x if x.ndim == 4 else x[None])

    def unbatch(self, output: Tensor) -> list[Tensor]:
        """See LitServe."""
        return [one[None] for one in output]

    def encode_response(self, output: Tensor) -> Response:
        """See LitServe."""
        return Response(self.work.encode(output), media_type="application/x-npy")


if __name__ == "__main__":
    port, size = map(int, sys.argv[1:])
    options: dict[str, Any] = {"max_batch_size": size} if size > 1 else {}
    server = ls.LitServer(Api(**options), accelerator="cpu", timeout=60)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")
