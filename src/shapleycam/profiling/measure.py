"""The measurement: cases in turn, round by round, so that a noisy neighbour meets all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..explainer import Explainer
from .conditions import conditions
from .result import Profile, Row, Stage
from .stages import STAGES, Clock, Staged

#: Of the copy whose pace is the roof.
_COPY_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured.

    Attributes:
        explainer, images, targets: of every call.
        names: what sets the case apart, for the table.
        call: another way to the same explanation (compiled, captured, exported), ``() -> anything``; timed as a whole.
        display, overlay, to_host: which steps behind the raw map belong to it.
    """

    explainer: Explainer
    images: Tensor
    targets: Any = None
    names: Mapping[str, Any] = field(default_factory=dict)
    call: Callable[[], Any] | None = None
    display: bool = True
    overlay: bool = True
    to_host: bool = True


def profile(
    explainer: Explainer,
    images: Tensor,
    targets: Any = None,
    *,
    rounds: int = 20,
    display: bool = True,
    overlay: bool = True,
    to_host: bool = True,
    trace: str | PathLike[str] | None = None,
) -> Profile:
    """How long an explanation of these images takes, stage by stage, beside the plain forward pass.

    Each round times the forward pass and the explanation one after the other. A GPU is timed by events, with its L2 cache
    flushed before each call; a CPU by the clock. The explainer and its model are left as they were.

    Args:
        explainer: to profile.
        images, targets: as for the explainer.
        rounds: how many, 3 or more.
        display, overlay, to_host: whether heatmaps, overlays and, on a GPU, their copies to the host belong to it.
        trace: a file for a Chrome or Perfetto trace of one explanation, with the stages as ranges (NVTX ranges too on a GPU).

    Returns:
        A profile with one row.

    Raises:
        InputError: fewer than 3 rounds, or a trace that cannot be written; otherwise as the explainer.
    """
    count = explainer.inputs(images).images.shape[0]
    case = Case(explainer, images, targets, {"batch": count}, None, display, overlay, to_host)
    return profile_cases([case], rounds=rounds, trace=trace)


def profile_cases(
    cases: Sequence[Case],
    *,
    rounds: int = 20,
    warmup: int = 2,
    trace: str | PathLike[str] | None = None,
    step: Callable[[], None] = lambda: None,
) -> Profile:
    """As :func:`profile`, for several cases in turn; the order turns from round to round.

    Args:
        cases: on one device.
        rounds, trace: as there; the trace is of the first case.
        warmup: rounds that do not count.
        step: called after every case of every round, for a progress bar.

    Raises:
        InputError: no case, fewer than 3 rounds, or cases on several devices.
    """
    if not cases:
        raise InputError("There is nothing to profile: give at least one case.")
    if not isinstance(rounds, int) or rounds < 3:
        raise InputError(f"rounds must be 3 or more, got {rounds}: a median of fewer says nothing.")
    if trace is not None and (Path(trace).is_dir() or not Path(trace).parent.is_dir()):
        raise InputError(f"The trace cannot be written to {trace}: give a file in a folder that exists.")
    for case in cases:
        case.explainer.inputs(case.images)  # the explainer's own check of what it is given
    devices = {case.images.device for case in cases}
    if len(devices) > 1:
        raise InputError(f"The cases of one profile are on one device, got {', '.join(sorted(map(str, devices)))}.")
    [device] = devices
    told = conditions(device)
    pace = copy_bandwidth(device)
    subjects = [_Subject(case) for case in cases]
    flush = _flusher(device)
    for number in range(warmup + rounds):
        turn = number % len(subjects)
        for subject in subjects[turn:] + subjects[:turn]:
            subject.round(flush, keep=number >= warmup)
            step()
    told["clocks_after"] = conditions(device)["clocks"]
    if trace is not None:
        write_trace(subjects[0], Path(trace))
    return Profile(tuple(subject.row(pace) for subject in subjects), told)


class _Subject:
    """A case with its samples."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.staged = Staged(
            case.explainer, case.images, case.targets, display=case.display, overlay=case.overlay, to_host=case.to_host
        )
        self._clock = Clock(case.images.device)
        self._forward: list[float] = []
        self._stages: dict[str, list[float]] = {}
        self._served: tuple[str, str] | None = None

    def round(self, flush: Callable[[], None], keep: bool) -> None:
        flush()
        forward = self.staged.plain()
        flush()
        found = self.staged.explain() if self.case.call is None else {"call": self._whole(self.case.call)}
        if keep:
            self._forward.append(forward)
            for stage, seconds in found.items():
                self._stages.setdefault(stage, []).append(seconds)

    def _whole(self, call: Callable[[], Any]) -> float:
        before = self._clock.read()
        call()
        return self._clock.seconds(before, self._clock.read())

    def explain(self) -> Any:
        """One explanation, untimed."""
        return self.staged.run() if self.case.call is None else self.case.call()

    def forward(self) -> Any:
        """One forward pass, untimed."""
        return self.staged.forward()

    def row(self, pace: float) -> Row:
        diagnostics = self.staged.run().diagnostics
        own = self.case.call is None
        moved = self._bytes(diagnostics.engine)
        stages = tuple(Stage(name, tuple(samples), moved.get(name)) for name, samples in self._stages.items())
        total = tuple(map(sum, zip(*(stage.seconds for stage in stages), strict=True)))
        device = self.case.images.device
        return Row(
            dict(self.case.names),
            diagnostics.engine if own else None,
            diagnostics.backend if own else None,
            tuple(self._forward),
            total,
            stages,
            pace,
            (dispatched(self.explain, device), dispatched(self.forward, device)),
            (peak_bytes(self.explain, device), peak_bytes(self.forward, device)),
        )

    def _bytes(self, engine: str) -> dict[str, int]:
        """What each step behind the head must read and write, each tensor once."""
        sizes = self.staged.sizes
        # Behind a pooled head the weight is constant over the positions, and next to nothing beside the activations.
        second = self.case.explainer.method.order == 2
        derivatives = {"closed_form": 0, "none": 0, "quadrature": 1, "gauss_newton": 1}.get(engine, 1 + second)
        classes = self.case.targets.shape[1] if getattr(self.case.targets, "ndim", 1) == 2 else 1
        moved = (1 + derivatives * classes) * sizes.get("activations", 0) + sizes.get("raw", 0)
        found = {"weighted reduce": moved}
        if "heatmaps" in sizes:
            found["display map"] = sizes["raw"] + sizes["heatmaps"]
        if "overlay" in sizes:
            found["overlay"] = sizes["images"] + sizes.get("heatmaps", 0) + sizes["overlay"]
        return found


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that ``Tensor.copy_`` reaches on the device, read plus written: the best of five."""
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target, clock, best = torch.empty_like(source), Clock(device), float("inf")
    for _ in range(5):
        before = clock.read()
        target.copy_(source)
        best = min(best, clock.seconds(before, clock.read()))
    return 2 * source.nbytes / best


def _flusher(device: torch.device) -> Callable[[], None]:
    """Empties a GPU's L2, so that a call finds nothing of the one before in it; nothing on a CPU."""
    if device.type != "cuda":
        return lambda: None
    buffer = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    return lambda: (buffer.zero_(), None)[1]


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most that torch's allocator held during a call, above what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as seen:
        call()
    held = most = 0
    for event in sorted(_events(seen, "[memory]"), key=lambda event: event.start_ns()):  # type: ignore[no-any-return]
        held += event.nbytes()
        most = max(most, held)
    return most


def _events(seen: torch.profiler.profile, name: str) -> list[Any]:
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    return [event for event in seen.profiler.kineto_results.events() if event.name() == name]


def dispatched(call: Callable[[], Any], device: torch.device) -> int:
    """How many kernels a call launches on a GPU; on a CPU, how many operators it dispatches that no other one called."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as seen:
        call()
    events = seen.events() or []
    if device.type == "cuda":
        return sum(str(event.device_type).endswith("CUDA") for event in events)
    return sum(event.cpu_parent is None and event.name.startswith(("aten::", "shapleycam::")) for event in events)


def write_trace(subject: _Subject, path: Path) -> None:
    """One explanation as a Chrome trace, with its stages as ranges.

    Raises:
        InputError: the file cannot be written.
    """
    device = subject.case.images.device
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as seen:
        if subject.case.call is None:
            subject.staged.ranges()
        else:
            with torch.profiler.record_function("call"), _nvtx("call", device):
                subject.case.call()
    try:
        path.touch()
        seen.export_chrome_trace(str(path))
    except (OSError, RuntimeError) as error:
        raise InputError(f"The trace cannot be written to {path}: {error}.") from error


def _nvtx(name: str, device: torch.device) -> Any:
    return torch.cuda.nvtx.range(name) if device.type == "cuda" else nullcontext()


__all__ = ["STAGES", "Case", "copy_bandwidth", "peak_bytes", "profile", "profile_cases"]
