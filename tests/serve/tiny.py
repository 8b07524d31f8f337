"""A network small enough to serve in a test, images whose right answers are known, and a server in a thread."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import uvicorn
from PIL import Image
from torch import Tensor, nn

from shapleycam import Explainer
from shapleycam.images import Preprocess
from shapleycam.models import Classifier
from shapleycam.serve import ExplainerRuntime, Runtime
from shapleycam.serve.app import create_app
from shapleycam.serve.config import Limits, ModelConfig, ServerConfig
from shapleycam.serve.run import settings
from shapleycam.serve.server import Server

SIDE, CLASSES = 32, 6
PREPROCESS = Preprocess((SIDE, SIDE), SIDE, "bilinear", (0.5,) * 3, (0.5,) * 3)


class Tiny(nn.Module):
    """Two convolutions, a mean and a linear layer. An image with a magenta pixel first is poison; with cyan there it kills."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.Softplus())
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(16, CLASSES)
        self.open = threading.Event()  # calls wait while it is cleared
        self.open.set()
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        corner = images[:, :, 0, 0]
        if (corner == torch.tensor([1.0, -1.0, 1.0])).all(1).any():
            raise ZeroDivisionError("poison in the batch")
        if (corner == torch.tensor([-1.0, 1.0, 1.0])).all(1).any():
            raise SystemExit("killed")
        assert self.open.wait(30)
        return self.head(self.pool(self.features(images)).flatten(1))


def classifier() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tiny().eval()
        with torch.no_grad():
            model.head.weight *= 20  # probabilities far from each other
    names = tuple((f"thing {i}", f"synonym {i}") for i in range(CLASSES))
    return Classifier("tiny", model, PREPROCESS, names, "random")


def pixels(seed: int) -> Tensor:
    """uint8 [3, SIDE, SIDE]: noise under a bright square whose place depends on the seed."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 100, (3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    y, x, c = (int(torch.randint(0, n, (1,), generator=generator)) for n in (20, 20, 3))
    image[c, y : y + 12, x : x + 12] = 255
    return image


def encoded(image: Tensor, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, form, **options)
    return file.getvalue()


def with_corner(image: Tensor, colour: tuple[int, int, int]) -> Tensor:
    image = image.clone()
    image[:, 0, 0] = torch.tensor(colour, dtype=torch.uint8)
    return image


POISON, KILLER = (255, 0, 255), (0, 255, 255)


@dataclass
class Known:
    """An image and the answer that the explainer itself gives to it alone."""

    data: bytes
    view: Tensor
    logits: Tensor  # [K]
    target: int
    raw: Tensor  # [h, w]


def known(seed: int, **options: Any) -> Known:
    found = classifier()
    view = pixels(seed)
    answer = Explainer(found.model, **options)(PREPROCESS.normalise(view)[None])
    assert answer.logits is not None and answer.targets is not None
    return Known(encoded(view), view, answer.logits[0], int(answer.targets[0]), answer.raw[0])


@dataclass
class Live:
    """A server that listens."""

    url: str
    port: int
    server: Server
    uvicorn: uvicorn.Server
    model: Any


@contextlib.contextmanager
def live(
    runtime: Runtime | None = None,
    *,
    limits: Limits | None = None,
    told: ModelConfig | None = None,
    **options: Any,
) -> Iterator[Live]:
    """A server on a free port of the loopback, in a thread, warmed up."""
    runtime = runtime or ExplainerRuntime(classifier())
    told = told or ModelConfig(max_batch=4)
    config = ServerConfig(port=0, limits=limits or Limits(), models={"tiny": told}, **options)
    server = Server(config, {"tiny": runtime})
    found = uvicorn.Server(settings(create_app(server, manage=False), config))
    thread = threading.Thread(target=found.run, daemon=True)
    server.start(30)
    thread.start()
    try:
        until = time.monotonic() + 20
        while not found.started:
            assert time.monotonic() < until, "uvicorn did not start"
            time.sleep(0.01)
        port = found.servers[0].sockets[0].getsockname()[1]
        yield Live(f"http://127.0.0.1:{port}", port, server, found, getattr(runtime, "classifier", replace(classifier())).model)
    finally:
        found.should_exit = True
        thread.join(20)
        server.stop(5)
        assert not thread.is_alive()
