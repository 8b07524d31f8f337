"""Decode, explain, encode: what every server of bench/serve.py does, and what the bare loop does.

``python -m bench.serve_work`` is the bare loop, in a process of its own: a scheduler that shares a busy machine among
sessions (Linux's autogroups) must count it like a server. It reads a line "JPEG BATCH COUNT" and answers with a line of JSON:
what :func:`bare` returns.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

from shapleycam import Explainer
from shapleycam.cli import keep_freed_memory
from shapleycam.models import load_classifier
from shapleycam.serve.pictures import decode, npy


class Work:
    """EfficientNet-Lite0 and its explainer, on one thread."""

    def __init__(self) -> None:
        keep_freed_memory()  # as the command line does: it makes this network faster, and is to be the same for all
        torch.set_num_threads(1)
        self.preprocess, model = (classifier := load_classifier()).preprocess, classifier.model
        self.explainer = Explainer(model)
        self.explainer.prepare(torch.zeros(1, 3, 224, 224))

    def decode(self, data: bytes) -> Tensor:
        """float32 [3, 224, 224]."""
        return self.preprocess.normalise(self.preprocess.view(decode(data, pixels=50_000_000)))

    def explain(self, images: Tensor) -> Tensor:
        """The signed maps [N, 7, 7]."""
        if torch.get_num_threads() != 1:  # the number belongs to a thread, and Ray Serve calls from another one
            print(f"{torch.get_num_threads()} threads in {threading.current_thread().name}", file=sys.stderr)
            torch.set_num_threads(1)
        return self.explainer(images).raw

    def encode(self, maps: Tensor) -> bytes:
        """A NumPy file."""
        return npy(maps)


def bare(work: Work, data: bytes, batch: int, count: int) -> tuple[list[float], float]:
    """Decode, explain and encode, ``batch`` pictures a call, alone: (seconds of each call, processor time of all)."""
    times, used = [], time.process_time()
    for _ in range(count):
        start = time.perf_counter()
        maps = work.explain(torch.stack([work.decode(data) for _ in range(batch)]))
        for one in maps:
            work.encode(one[None])
        times.append(time.perf_counter() - start)
    return times, time.process_time() - used


def main() -> None:
    """Answer until the input ends."""
    work = Work()
    for line in sys.stdin:
        file, batch, count = line.split()
        print(json.dumps(bare(work, Path(file).read_bytes(), int(batch), int(count))), flush=True)


if __name__ == "__main__":
    main()
