"""One model behind one queue: admit, decode, batch, answer. What every protocol asks, and what one embeds without HTTP.

with Service(ExplainerRuntime(load_classifier())) as service:
    answer = service.explain(open("cat.jpg", "rb").read(), Question(topk=3))
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import InputError, TargetError
from ..explanation import Explanation
from .batching import Batcher, Slot, Stopped, Watch
from .pictures import FORMATS, decode
from .runtime import Maps, Question, Runtime, as_explanation
from .tuning import tune

#: The sizes among which the start-up measurement chooses.
SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one image, in host memory.

    Attributes:
        logits: float32 [K].
        view: the crop that the network saw, uint8 [3, H, W]; None where the client sent a tensor.
        size: (width, height) of the picture as sent, upright; None where the client sent a tensor.
        explanation: of one image and M classes; None for a prediction alone.
        made: method, utility, engine, backend, layer.
        signed: whether the explanation has signed maps; False where the program gives display maps only.
    """

    logits: Tensor
    view: Tensor | None
    size: tuple[int, int] | None
    explanation: Explanation | None
    made: dict[str, str]
    signed: bool = True

    @property
    def targets(self) -> list[int]:
        """The explained classes, M of them."""
        assert self.explanation is not None and self.explanation.targets is not None
        return [int(index) for index in self.explanation.targets[0]]

    @property
    def probabilities(self) -> Tensor:
        """float32 [K]."""
        return self.logits.softmax(0)

    @property
    def raw(self) -> Tensor:
        """The maps as they came from the model, float32 [M, h, w]."""
        assert self.explanation is not None
        return self.explanation.raw[0]

    def heatmaps(self, size: str | int | Sequence[int] = "image") -> Tensor:
        """Display maps, float32 [M, H, W] in [0, 1].

        Args:
            size: "image" for the network's input, "layer" for the grid of the target layer, or (height, width).
        """
        assert self.explanation is not None
        shape = tuple(self.raw.shape[1:]) if size == "layer" else None if size == "image" else size
        assert not isinstance(shape, str)
        return self.explanation.heatmaps(shape)[0]

    def overlay(self, colormap: str = "jet", alpha: float = 0.5) -> Tensor:
        """The heatmaps over the crop that the network saw, uint8 [M, H, W, 3].

        Raises:
            InputError: the client sent a tensor, of which there is no picture.
        """
        if self.view is None or self.explanation is None:
            raise InputError("There is no picture to draw on: a tensor was sent. Ask for the heatmap.")
        return self.explanation.overlay(self.view[None], colormap=colormap, alpha=alpha)[0]


@dataclass(frozen=True, slots=True)
class _Item:
    pixels: Tensor  # float32 [3, H, W], normalised
    targets: tuple[int, ...]
    question: Question
    view: Tensor | None
    size: tuple[int, int] | None


class Service:
    """A model that answers many clients at once. Thread-safe; start it, or use it as a context.

    Args:
        runtime: what runs the model.
        max_batch: most images of a batch; None measures at the start which size is best.
        capacity: most requests admitted and not answered.
        wait: seconds that a batch waits for more.
        timeout: seconds a request may take, where it does not say otherwise.
        pixels: most pixels of a picture, which is refused by its header.
        formats: which picture formats are taken.
        most_classes: most classes of one request.
        decoders: threads that decode pictures.
        watch: is told what happens in the queue.
        on_death: see :class:`shapleycam.serve.batching.Batcher`.
        name: of the model, for threads and messages.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        max_batch: int | None = None,
        capacity: int = 64,
        wait: float = 0.0,
        timeout: float = 10.0,
        pixels: int = 50_000_000,
        formats: Sequence[str] = FORMATS,
        most_classes: int = 10,
        decoders: int = 2,
        watch: Watch | None = None,
        on_death: Callable[[BaseException], None] | None = None,
        name: str = "model",
    ) -> None:
        unknown = set(formats) - set(FORMATS)
        if unknown or not formats:
            raise InputError(f"Unknown formats {sorted(unknown)}: expected some of {', '.join(FORMATS)}.")
        if not timeout > 0 or pixels < 1 or most_classes < 1 or decoders < 1:
            raise InputError("timeout, pixels, most_classes and decoders are positive.")
        self.runtime, self.name = runtime, name
        self.timeout, self.pixels, self.formats, self.most_classes = timeout, pixels, tuple(formats), most_classes
        self.tuning: dict[int, float] = {}  # seconds per image by batch size, where it was measured
        self.count = runtime.count
        self.grid: tuple[int, int] = runtime.preprocess.crop  # (height, width) of its maps, known once it is warm
        self._decoding: dict[int, float] = {}  # since when, by thread
        self._fixed_batch, self._watch = max_batch, watch or Watch()
        self._batcher: Batcher[_Item, Answer] = Batcher(
            self._run,
            max_batch=max_batch or 1,
            capacity=capacity,
            wait=wait,
            prepare=self._prepare,
            watch=self._watch,
            on_death=on_death,
            name=f"shapleycam-{name}",
        )
        self.pool = ThreadPoolExecutor(decoders, thread_name_prefix=f"shapleycam-{name}-decode")

    # ------------------------------------------------------------------------------------------------------------ life

    def start(self, timeout: float | None = math.inf) -> Self:
        """Warm the model up on the thread that will run it; None does not wait. See :meth:`Batcher.start`."""
        self._batcher.start(timeout)
        return self

    def stop(self, timeout: float = math.inf) -> bool:
        """Answer what was admitted, refuse the rest, and end the threads; see :meth:`Batcher.stop`."""
        finished = self._batcher.stop(timeout)
        self.pool.shutdown(wait=finished, cancel_futures=True)
        return finished

    def __enter__(self) -> Self:
        return self.start() if self.state == "new" else self

    def __exit__(self, *_: object) -> None:
        self.stop()

    state = property(lambda self: self._batcher.state, doc='"new", "starting", "ready", "draining", "stopped" or "dead".')
    held = property(lambda self: self._batcher.held, doc="How many requests are admitted and not answered.")
    capacity = property(lambda self: self._batcher.capacity, doc="Most requests admitted and not answered.")
    max_batch = property(lambda self: self._batcher.max_batch, doc="The most images of a batch, as it is now.")

    def busy_for(self) -> float:
        """Seconds that the running batch, or the longest of the running decoders, has taken so far."""
        now = time.monotonic()
        return max([self._batcher.busy_for(), *(now - since for since in list(self._decoding.values()))])

    def area(self, size: str | Sequence[int]) -> int:
        """Pixels of one map at a size as for :meth:`Answer.heatmaps`."""
        if isinstance(size, str):
            size = self.runtime.preprocess.crop if size == "image" else self.grid
        return size[0] * size[1]

    def _prepare(self) -> int | None:
        height, width = self.runtime.preprocess.crop
        dice = torch.Generator().manual_seed(0)
        question = self.check(Question())

        def run(size: int) -> Maps:
            # Noise, as an explainer studies its model on the first images that it sees: on black ones all may be alike.
            return self.runtime.explain(torch.randn(size, 3, height, width, generator=dice), question, None)

        first = run(1)
        maps = first.raw if first.raw is not None else first.shown
        assert maps is not None
        self.count, self.grid = first.logits.shape[1], (maps.shape[-2], maps.shape[-1])
        run(1)
        if self._fixed_batch is not None:
            run(self._fixed_batch)
            return None
        best, self.tuning = tune(run, SIZES)
        return best

    # ---------------------------------------------------------------------------------------------------------- asking

    def check(self, question: Question) -> Question:
        """The question with the server's defaults filled in.

        Raises:
            InputError: a method, utility or engine that is not served, or too many classes.
            TargetError: a class that the model does not have.
        """
        names = {}
        for what, served in (
            ("method", self.runtime.methods),
            ("utility", self.runtime.utilities),
            ("engine", self.runtime.engines),
        ):
            asked = getattr(question, what)
            if asked and asked not in served:
                raise InputError(f"{what} {asked!r} is not served by {self.name!r}: expected one of {', '.join(served)}.")
            names[what] = asked or served[0]
        if question.targets and question.topk != 1:
            raise InputError("target and topk exclude each other: classes by name, or the most probable ones.")
        if not 1 <= question.topk <= self.most_classes or len(question.targets) > self.most_classes:
            raise InputError(
                f"One to {self.most_classes} classes may be explained at a time, got {len(question.targets) or question.topk}."
            )
        if self.count is not None:
            wrong = [index for index in question.targets if not 0 <= index < self.count]
            if wrong:
                raise TargetError(f"Class {wrong[0]} is out of range: {self.name!r} has the classes 0 to {self.count - 1}.")
            if question.topk > self.count:
                raise InputError(f"topk is {question.topk}, and {self.name!r} has {self.count} classes.")
        return Question(
            **names,
            targets=question.targets,
            topk=question.topk,
            gap=question.gap and question.explain,
            explain=question.explain,
        )

    def submit(
        self,
        images: Sequence[bytes | Tensor],
        questions: Question | Sequence[Question] = Question(),  # noqa: B008 - immutable
        timeout: float | None = None,
    ) -> list[Future[Answer]]:
        """Admit some images, all or none, and return a future per image at once.

        Args:
            images: each the bytes of a picture, or a tensor: uint8 [3, H, W], the crop, or floating and normalised.
            questions: one for all, or one per image.
            timeout: seconds from now; the service's own if None.

        Returns:
            futures of :class:`Answer`. Cancelling one drops its work. They raise :class:`BadImage`, and what
            :meth:`Slot.submit` and the runtime raise.

        Raises:
            InputError, TargetError: a question that cannot be answered.
            Overloaded, Stopped: not admitted; nothing was decoded.
        """
        asked = [questions] * len(images) if isinstance(questions, Question) else list(questions)
        if not images or len(asked) != len(images):
            raise InputError(f"There must be at least one image, and a question for each: {len(images)} and {len(asked)}.")
        checked = [self.check(question) for question in asked]
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        slots = self._batcher.admit(len(images))
        outer: list[Future[Answer]] = []
        for image, question, slot in zip(images, checked, slots, strict=True):
            future: Future[Answer] = Future()
            outer.append(future)
            try:
                task = self.pool.submit(self._decode, image, question, slot, deadline, future)
                task.add_done_callback(lambda task, slot=slot, future=future: _given_up(task, slot, future))  # type: ignore[misc]
            except RuntimeError as error:  # the pool is shut down
                slot.release()
                future.set_exception(error)
        return outer

    def explain(self, image: bytes | Tensor, question: Question = Question(), timeout: float | None = None) -> Answer:  # noqa: B008
        """:meth:`submit` for one image, and wait."""
        return self.submit([image], question, timeout)[0].result()

    def _decode(
        self, image: bytes | Tensor, question: Question, slot: Slot[_Item, Answer], deadline: float, outer: Future[Answer]
    ) -> None:
        """In the pool: make the item, queue it, and tie its future to the caller's."""
        try:
            if outer.cancelled():
                return
            if time.monotonic() > deadline:  # the queue says so, and counts it
                item = _Item(torch.empty(0), (), question, None, None)
            else:
                began = self._decoding[threading.get_ident()] = time.monotonic()
                item = self._item(image, question)
                self._watch.prepared(time.monotonic() - began)
            inner = slot.submit(item, question.key, deadline)
        except BaseException as error:
            if outer.set_running_or_notify_cancel():
                outer.set_exception(error)
            return
        finally:
            self._decoding.pop(threading.get_ident(), None)
            slot.release()

        def cancel(_: Future[Answer]) -> None:
            if outer.cancelled():
                inner.cancel()

        def finish(done: Future[Answer]) -> None:
            if done.cancelled():
                return
            error = done.exception()
            try:
                if error is not None:
                    outer.set_exception(error)
                else:
                    outer.set_result(done.result())
            except InvalidStateError:  # it was cancelled meanwhile
                pass

        outer.add_done_callback(cancel)
        inner.add_done_callback(finish)

    def _item(self, image: bytes | Tensor, question: Question) -> _Item:
        preprocess = self.runtime.preprocess
        if isinstance(image, Tensor):
            wanted = (3, *preprocess.crop)
            if tuple(image.shape) != wanted or (image.dtype != torch.uint8 and not image.dtype.is_floating_point):
                raise InputError(
                    f"An image tensor must be uint8 or floating {list(wanted)}, got {image.dtype} {list(image.shape)}."
                )
            view = image if image.dtype == torch.uint8 else None
            pixels = preprocess.normalise(image) if view is not None else image.float()
            return _Item(pixels, question.targets, question, view, None)
        picture = decode(image, pixels=self.pixels, formats=self.formats)
        view = preprocess.view(picture)
        return _Item(preprocess.normalise(view), question.targets, question, view, picture.size)

    def _run(self, key: Hashable, items: list[_Item]) -> list[Answer]:
        """On the model's thread."""
        images = torch.stack([item.pixels for item in items])
        question = items[0].question
        if question.explain:
            named = torch.tensor([item.targets for item in items]) if question.targets else None
            maps = self.runtime.explain(images, question, named)
        else:
            maps = self.runtime.predict(images)
        size = tuple(images.shape[2:])
        return [self._answer(maps, row, item, (size[0], size[1])) for row, item in enumerate(items)]

    @staticmethod
    def _answer(maps: Maps, row: int, item: _Item, size: tuple[int, int]) -> Answer:
        explanation = as_explanation(maps, row, size) if maps.targets is not None else None
        made: dict[str, Any] = dict(maps.made)
        return Answer(maps.logits[row], item.view, item.size, explanation, made, signed=maps.raw is not None)


def _given_up(task: Future[None], slot: Slot[_Item, Answer], future: Future[Answer]) -> None:
    """When the service stops before an image is decoded, somebody still waits for it."""
    if task.cancelled():
        slot.release()
        if future.set_running_or_notify_cancel():
            future.set_exception(Stopped("The server stopped before this request was served."))
