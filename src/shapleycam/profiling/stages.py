"""One explanation with a clock beside it.

Nothing in the package knows of it: the clock is read in forward hooks that live for one call, and in wrappers around the
steps of a copy of the explainer. An explainer that is not profiled runs the code it always runs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..explainer import Explainer
from ..explanation import Explanation
from ..model.capture import tensor_of

#: In the order of the road. What runs before a step ends counts as that step.
STAGES = ("trunk", "head", "derivative", "weighted reduce", "display map", "overlay", "copy to host")


class Clock:
    """Reads the time: CUDA events on the current stream, or the host's clock.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def read(self) -> Any:
        """A point in time. On a GPU it is when the work that was queued before is done."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter_ns()

    def seconds(self, earlier: Any, later: Any) -> float:
        """Between two points; on a GPU this waits for the later one."""
        if self._cuda:
            later.synchronize()
            milliseconds: float = earlier.elapsed_time(later)
            return milliseconds / 1e3
        return (later - earlier) / 1e9  # type: ignore[no-any-return]


class Staged:
    """An explainer whose calls say when each stage ended.

    Args:
        explainer: it is not touched; a copy of it studies the model anew and runs.
        images, targets: of every call, as for the explainer.
        display, overlay, to_host: which of the steps behind the raw map to run.
    """

    def __init__(
        self,
        explainer: Explainer,
        images: Tensor,
        targets: Any = None,
        *,
        display: bool = True,
        overlay: bool = True,
        to_host: bool = True,
    ) -> None:
        self._explainer = copy.copy(explainer)
        self._images, self._targets = images, targets
        drawable = images.ndim == 4 and images.shape[1] == 3
        self._display, self._overlay, self._to_host = display, overlay and drawable, to_host
        self._clock = Clock(images.device)
        self._layers = [module for _, module in self._explainer.prepare(images, targets).layers]
        pixels = images.detach()
        low, high = pixels.amin(), pixels.amax()
        self._shown = (pixels - low) / (high - low).clamp_min(1e-12)  # what is drawn over; a picture of the same size
        #: bytes of the activations, the images and the maps of one call, by what they are
        self.sizes: dict[str, int] = {}

    def plain(self) -> float:
        """Seconds of the plain forward pass."""
        before = self._clock.read()
        self.forward()
        return self._clock.seconds(before, self._clock.read())

    def explain(self) -> dict[str, float]:
        """Seconds of every stage that ran."""
        marks: list[tuple[str, Any]] = [("", self._clock.read())]
        with self._marking(lambda stage: marks.append((stage, self._clock.read()))):
            self.run(lambda stage: marks.append((stage, self._clock.read())))
        found: dict[str, float] = {}
        for (_, earlier), (stage, later) in pairwise(marks):
            found[stage] = found.get(stage, 0.0) + self._clock.seconds(earlier, later)
        return {stage: found[stage] for stage in STAGES if stage in found}

    def ranges(self) -> None:
        """One explanation in a profiler's ranges, one per stage, and in NVTX ranges on a GPU."""
        cuda, order = self._images.device.type == "cuda", [*STAGES, ""]
        opened: list[Any] = []

        def open_range(name: str) -> None:
            opened.append(torch.profiler.record_function(name))
            opened[-1].__enter__()
            if cuda:
                torch.cuda.nvtx.range_push(name)

        def close_range() -> None:
            if cuda:
                torch.cuda.nvtx.range_pop()
            opened.pop().__exit__(None, None, None)

        def mark(stage: str) -> None:
            close_range()
            following = order[order.index(stage) + 1]
            open_range(following or "end")

        open_range(STAGES[0])
        try:
            with self._marking(mark):
                self.run(mark)
        finally:
            close_range()

    def forward(self) -> Any:
        """One plain forward pass."""
        with torch.no_grad():
            return self._explainer.inputs(self._images).run(self._explainer.model)

    def run(self, mark: Callable[[str], None] = lambda stage: None) -> Explanation:
        """The road behind the head, with a mark behind each of its steps."""
        explanation = self._explainer(self._images, self._targets)
        mark("weighted reduce")
        shown = [*explanation.raws]
        self.sizes |= {"raw": sum(raw.nbytes for raw in explanation.raws), "images": self._images.nbytes}
        if self._display:
            shown = [explanation.heatmaps()]
            self.sizes["heatmaps"] = shown[0].nbytes
            mark("display map")
        if self._overlay:
            drawn = explanation.overlay(self._shown)
            self.sizes["overlay"] = drawn.nbytes
            shown.append(drawn)
            mark("overlay")
        if self._to_host and self._images.device.type != "cpu":
            for tensor in shown:
                tensor.cpu()
            mark("copy to host")
        return explanation

    @contextmanager
    def _marking(self, mark: Callable[[str], None]) -> Iterator[None]:
        """Hooks at the target layers and at the model, and a mark behind the derivative."""
        explainer, seen = self._explainer, {"layers": 0, "passes": 0}

        # What comes after the first pass (nodes, masks, altered heads) is the derivative's, or the method's own.
        def at_layer(module: nn.Module, args: Any, output: Any) -> None:
            if seen["passes"]:
                return
            if seen["layers"] == 0:
                mark("trunk")
                self.sizes["activations"] = 0
            seen["layers"] += 1
            self.sizes["activations"] += tensor_of(output, "").nbytes

        def at_end(module: nn.Module, args: Any, output: Any) -> None:
            if not seen["passes"]:
                mark("head")
            seen["passes"] += 1

        def derive(*args: Any) -> Any:
            found = type(explainer)._derive(explainer, *args)
            mark("derivative")
            return found

        handles = [layer.register_forward_hook(at_layer, prepend=True) for layer in self._layers]
        handles.append(explainer.model.register_forward_hook(at_end))
        explainer._derive = derive  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del explainer._derive
            for handle in handles:
                handle.remove()
