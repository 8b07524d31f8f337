"""A server process with the tiny model: ``python -m tests.serve.process PRE_STOP GRACE``.

What it serves waits while the file named by HOLD exists, and PAUSE seconds per batch; decoders hang over
pictures that end with "HANG".
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from shapleycam.cli.serve import run_serve
from shapleycam.serve import run
from shapleycam.serve.config import ModelConfig, ServerConfig
from shapleycam.serve.runtime import ExplainerRuntime, Question
from shapleycam.serve.service import Service

from .tiny import classifier


def main() -> int:
    found = classifier()
    hold = Path(os.environ.get("HOLD", "/nonexistent"))
    pause = float(os.environ.get("PAUSE", "0"))

    def wait(*_: Any) -> None:
        while hold.exists():
            time.sleep(0.01)
        time.sleep(pause)

    found.model.register_forward_pre_hook(wait)
    run.load_runtime = lambda told: ExplainerRuntime(found)
    decode = Service._item

    def item(self: Service, image: Any, question: Question) -> Any:
        if image.endswith(b"HANG"):
            time.sleep(3600)
        return decode(self, image, question)

    Service._item = item  # type: ignore[method-assign]
    pre_stop, grace = map(float, sys.argv[1:])
    told = ServerConfig(port=0, pre_stop=pre_stop, grace=grace, models={"tiny": ModelConfig(max_batch=2)})
    return run_serve(told, "info", Console(stderr=True))


if __name__ == "__main__":
    sys.exit(main())
