"""The command with a small network in the place of a trained one, in a process that tests may kill.

``python -m tests.attribute.driver attribute SOURCE --out DIR ...``; every batch sleeps SHAPLEYCAM_TEST_SLEEP seconds.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from torch import Tensor, nn

from shapleycam.cli import attribute as command
from shapleycam.cli.app import run
from shapleycam.model.zoo import Classifier

from ..helpers import network
from .conftest import NAMES, SMALL


class Slow(nn.Module):
    """The identity, after a while."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return images


def toy(*_: Any, **__: Any) -> Classifier:
    model = network(curved=False)
    return Classifier(
        "toy", nn.Sequential(Slow(float(os.environ.get("SHAPLEYCAM_TEST_SLEEP", "0"))), *model).eval(), SMALL, NAMES, "seeded"
    )


def main(arguments: list[str]) -> int:
    command.load_classifier = toy
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
