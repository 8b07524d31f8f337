"""A program as CUDA graphs: forward pass, derivatives and maps of a batch in one launch.

A graph is recorded for one number of images, over buffers that stay where they are; smaller batches are padded. What is
here works with any recorder of graphs, so that all but :class:`CudaRecorder` itself is tested without a GPU.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import InputError, ShapleyCamError
from ..plan import warn
from .base import Explained, Program
from .graph import said

#: How many graphs are kept by default; each holds the memory of a forward pass.
MOST_GRAPHS = 4


class Recorder(Protocol):
    """What records graphs and puts calls on several streams in order."""

    def record(self, function: Callable[[], Explained]) -> tuple[Explained, Callable[[], None]]:
        """Record what ``function`` does: its results, which stay where they are, and what does it again into them."""
        ...

    def begin(self) -> None:
        """Called before the buffers are written: what was issued before :meth:`end` is to be over by then."""
        ...

    def end(self) -> None:
        """Called when the results have been copied."""
        ...


class CudaRecorder:
    """CUDA graphs of one device, in a memory pool of their own.

    Args:
        device: the CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._over = torch.cuda.Event()

    def record(self, function: Callable[[], Explained]) -> tuple[Explained, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):
                for _ in range(3):  # libraries choose their algorithms and take their workspaces before
                    function()
            here.wait_stream(self._stream)
            # Other threads may go on using the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                results = function()
        return results, graph.replay

    def begin(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._over)

    def end(self) -> None:
        self._over.record(torch.cuda.current_stream(self._device))


@dataclass(slots=True)
class _Graph:
    images: Tensor
    targets: Tensor | None
    results: Explained
    replay: Callable[[], None]


class Captured:
    """A program by graphs, called as a program is: ``(images, targets=None) -> Explained``.

    One object may be called from several threads and streams; its graphs run one after another. A batch runs in the smallest
    graph that it fills by half or more, padded; else one is recorded, for the next power of two. The least recently used of
    more than ``limit`` graphs is dropped. Results are copies, on the caller's stream. Weights that are changed in place are
    followed; where one lies elsewhere in memory than before, all graphs are recorded again.

    Where no graph can be had (on a CPU, or where the model waits for the device), the program runs without: ``reason`` says
    why, and on a CUDA device a warning too.

    Args:
        program: what to run.
        like: images as it will be called with: device, dtype and shape (of one).
        recorder: records the graphs; None for CUDA graphs on a CUDA device.
        limit: how many graphs are kept.

    Attributes:
        program: what runs.
        reason: why there are no graphs; None where there are.
    """

    def __init__(self, program: Program, like: Tensor, recorder: Recorder | None = None, limit: int = MOST_GRAPHS) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise InputError(f"limit must be a whole number of graphs, 1 or more, got {limit!r}.")
        self.program, self._limit = program, limit
        self.reason: str | None = None
        self._device, self._dtype = like.device, like.dtype
        self._graphs: OrderedDict[tuple[Any, ...], _Graph] = OrderedDict()
        # The modules' own tables, which follow every change; the modules themselves are the program's to check.
        self._tables = [table for module in program.modules() for table in (module._parameters, module._buffers)]
        self._weights: tuple[int, ...] = ()
        self._lock = threading.Lock()
        if recorder is None and like.device.type != "cuda":
            self.reason = f"the images are on {like.device}, and graphs are of CUDA devices"
        self._recorder = recorder or (None if self.reason else CudaRecorder(like.device))

    def __repr__(self) -> str:
        how = f"without graphs: {self.reason}" if self.reason else f"graphs for {list(self.sizes)}"
        return f"Captured({self.program.extra_repr()}, {how})"

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of images that graphs were recorded for, ascending."""
        return tuple(sorted({key[0] for key in self._graphs}))

    def __call__(self, images: Tensor, targets: Tensor | None = None) -> Explained:
        """Explain a batch; arguments, result and errors as :meth:`shapleycam.Program.forward`.

        Raises:
            InputError: also for images of another dtype or on another device.
        """
        if images.device != self._device or images.dtype != self._dtype:
            raise InputError(
                f"This program was captured for {self._dtype} images on {self._device}, got {images.dtype} on {images.device}."
            )
        self.program.check(images, targets)
        if self._recorder is None or not len(images):
            explained: Explained = self.program(images, targets)
            return explained
        self.program.check_model()
        # Tensors of inference mode cannot be written outside of it, and the buffers are for later calls too.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            graph = self._graph(images, targets)
            if graph is None:
                explained = self.program(images, targets)
                return explained
            return self._replay(graph, images, targets)

    def _replay(self, graph: _Graph, images: Tensor, targets: Tensor | None) -> Explained:
        assert self._recorder is not None
        count = len(images)
        self._recorder.begin()
        graph.images[:count].copy_(images, non_blocking=True)
        if targets is not None and graph.targets is not None:
            graph.targets[:count].copy_(targets, non_blocking=True)
        graph.replay()
        found = Explained(*(part[:count].clone() for part in graph.results))
        self._recorder.end()
        return found

    def _graph(self, images: Tensor, targets: Tensor | None) -> _Graph | None:
        """The graph that takes this batch, recorded if there is none; None where it cannot be."""
        tensors = chain.from_iterable(table.values() for table in self._tables)
        weights = tuple(tensor.data_ptr() for tensor in tensors if tensor is not None)
        if weights != self._weights:
            self._graphs.clear()
            self._weights = weights
        kind = self._device.type
        state = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        rest = (None if targets is None else tuple(targets.shape[1:]), *state)
        count = len(images)
        fitting = [key for key in self._graphs if key[1:] == rest and count <= key[0] <= 2 * count]
        if fitting:
            key = min(fitting)
            self._graphs.move_to_end(key)
            return self._graphs[key]
        size = 1 << (count - 1).bit_length()
        made = self._record(images, targets, size)
        if made is not None:
            self._graphs[(size, *rest)] = made
            while len(self._graphs) > self._limit:
                self._graphs.popitem(last=False)
        return made

    def _record(self, images: Tensor, targets: Tensor | None, size: int) -> _Graph | None:
        assert self._recorder is not None
        # The rows that pad are copies of the first: nothing that a network would not meet.
        index = torch.arange(size, device=images.device).remainder(len(images))
        still = images[index].clone()
        asked = None if targets is None else targets[index.to(targets.device)].to(images.device, copy=True)
        cached = torch.is_autocast_cache_enabled()
        # Autocast frees the casts that it keeps when its block ends, and a graph would go on reading them.
        torch.set_autocast_cache_enabled(False)
        try:
            results, replay = self._recorder.record(lambda: self.program.explain(still, asked))
        except (ShapleyCamError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            self.reason = f"the program of {type(self.program.model).__name__} cannot be recorded: {said(error)}"
            self._recorder = None
            warn(f"No CUDA graphs, as {self.reason} It runs without them.")
            return None
        finally:
            torch.set_autocast_cache_enabled(cached)
        return _Graph(still, asked, results, replay)
