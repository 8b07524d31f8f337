"""The one worker class of every engine: a shard in, a part of the result out."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..data.decoding import Decoded, Decoder
from ..data.images import MAX_PIXELS
from ..data.manifest import Manifest
from ..data.sources import Entry, Source
from ..errors import InputError, TargetError
from ..explainer import Explainer
from ..explanation import Explanation
from ..model.zoo import Classifier
from .feed import Batch, Failure, Feeder, Stopped
from .part import LAYOUT, Found, Part, PartWriter, schema

_SPEED_ONLY = ("threads", "time_limit")  # settings that do not change a map


@dataclass(frozen=True, slots=True)
class Settings:
    """What is explained, and how.

    Attributes:
        method, utility, layer, engine, nodes, baseline, backend, seed: as for :class:`shapleycam.Explainer`; one target layer.
        target: "predicted"; "label" for the class that the picture's label names; or a class's index or name.
        topk: explain the k most probable classes of each picture; costs another forward pass, and excludes ``target``.
        gap, norms: also compute the completeness gap and |HA|/|g|; None for ``gap`` is where it costs next to nothing, in the
            closed form.
        batch_size: pictures that go through the network at once; it is part of the result's last bits.
        decoder, max_pixels: as for :class:`shapleycam.data.decoding.Decoder`.
        threads: that decode.
        time_limit: seconds that reading and decoding one picture may take; None for no limit.
    """

    method: str = "shapleycam"
    utility: str = "rest"
    layer: str = "auto"
    engine: str = "auto"
    nodes: int | str | None = None
    baseline: str = "zero"
    backend: str = "auto"
    seed: int = 0
    target: str | int = "predicted"
    topk: int = 1
    gap: bool | None = None
    norms: bool = False
    batch_size: int = 8
    decoder: str = "auto"
    max_pixels: int = MAX_PIXELS
    threads: int = 2
    time_limit: float | None = 60.0

    def __post_init__(self) -> None:
        for name in ("batch_size", "threads", "topk", "max_pixels"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.time_limit is not None and not self.time_limit > 0:
            raise InputError(f"time_limit must be above 0 s, got {self.time_limit}.")
        if self.topk > 1 and self.target != "predicted":
            raise InputError("target and topk exclude each other: one class, or the k most probable.")
        if not isinstance(self.layer, str):
            raise InputError(f"A result has the maps of one target layer, got {self.layer!r}.")

    def key(self) -> dict[str, Any]:
        """All that a map depends on."""
        return {name: value for name, value in asdict(self).items() if name not in _SPEED_ONLY}


class ShardRunner:
    """Explains shards of a manifest, and writes each as one part.

    A part holds one row per entry, in the manifest's order; doing a shard twice writes the same bits again. Memory does not
    grow with the number of shards. One object serves one thread.

    Args:
        classifier: model, preprocessing and class names; the model's device is where it runs.
        source, manifest: the pictures, and their list.
        out: the folder of the parts.
        settings: see there.
        identity: goes into the metadata of every part: what the job is, by name and fingerprint.
        stop: set by whoever wants the work to stop, from any thread.

    Raises:
        InputError: no picture can be read at all, or settings that do not fit.
        LayerError, ModelStateError, DerivativeError, BackendError: the model cannot be explained so.
    """

    def __init__(
        self,
        classifier: Classifier,
        source: Source,
        manifest: Path,
        out: Path,
        settings: Settings,
        identity: dict[str, Any],
        stop: threading.Event | None = None,
    ) -> None:
        self.classifier, self.source, self.settings, self.out = classifier, source, settings, out
        self.manifest = Manifest(manifest)
        first = next(classifier.model.parameters())
        self.device, self._dtype = first.device, first.dtype
        self._explainer = Explainer(
            classifier.model,
            layer=settings.layer,
            method=settings.method,
            utility=settings.utility,
            engine=settings.engine,
            nodes=settings.nodes,
            baseline=settings.baseline,
            backend=settings.backend,
            seed=settings.seed,
        )
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._stop = stop or threading.Event()
        self._decoder = Decoder(classifier.preprocess, settings.decoder, settings.max_pixels, self.device)
        self._class_of = self._target_reader()
        self._gap = bool(settings.gap)
        shown = self._study()
        raw, several = shown.raw, settings.topk > 1
        self.engine, self.layers = shown.diagnostics.engine, shown.diagnostics.layers
        if settings.gap is None:
            self._gap = self.engine == "closed_form"
        said = {
            "layout": LAYOUT,
            "shapleycam": __version__,
            "job": json.dumps(identity, sort_keys=True),
            "layer": self.layers[0],
            "engine": self.engine,
            "crop": json.dumps(classifier.preprocess.crop),
        }
        self._schema = schema(raw.shape[2 if several else 1 :], settings.topk, {f"shapleycam:{k}": v for k, v in said.items()})
        self._feeder = self._feed(settings.batch_size)
        #: called with the pictures of a batch when its rows are made
        self.batch_done: Callable[[int], None] = lambda pictures: None

    def close(self) -> None:
        """Let the decoding threads go."""
        self._feeder.close()

    def run(self, k: int) -> Part:
        """Explain shard ``k`` and write its part.

        Raises:
            JobError: the part cannot be written. Stopped: the work was to stop; there is no part then.
        """
        [part] = self.run_all([k])
        return part

    def run_all(self, shards: Iterable[int]) -> Iterator[Part]:
        """The same for many, without a pause between them: the next is asked for while the last is still being explained."""
        writer: PartWriter | None = None
        behind: deque[tuple[Batch, Found | None]] = deque()
        depth = 0 if self.device.type == "cpu" else 1  # batches whose results are still on their way to the host
        listed = ((k, self.manifest.shard(k)) for k in shards)
        try:
            for batch in self._with_end(self._feeder.batches(listed)):
                if batch is not None:
                    behind.append((batch, self._explain(batch)))
                while behind and (len(behind) > depth or batch is None):
                    done, found = behind.popleft()
                    if writer is None:
                        writer = PartWriter(self.out, done.shard, self._schema, self.source)
                    if found is not None and found.ready is not None:
                        found.ready.synchronize()
                    writer.add(done.entries, self._judged(done), found)
                    self.batch_done(len(done.entries))
                    if done.last:
                        part, writer = writer.close(), None
                        yield part
        finally:
            if writer is not None:
                writer.drop()

    @staticmethod
    def _with_end(batches: Iterator[Batch]) -> Iterator[Batch | None]:
        yield from batches
        yield None

    def _feed(self, batch_size: int) -> Feeder:
        return Feeder(
            self.source,
            self._decoder,
            batch_size,
            threads=self.settings.threads,
            limit=self.settings.time_limit,
            stop=self._stop,
            pinned=self.device.type == "cuda",
        )

    def _study(self) -> Explanation:
        """Show the explainer the first two readable pictures, so that its plan does not depend on who runs which shard."""
        feeder, views, problem = self._feed(2), [], ""
        try:
            for batch in feeder.batches((k, self.manifest.shard(k)) for k in range(self.manifest.shards)):
                views += [each.view for each in batch.found if isinstance(each, Decoded)]
                failed = [(e.key, f.text) for e, f in zip(batch.entries, batch.found, strict=True) if isinstance(f, Failure)]
                problem = problem or (f"{failed[0][0]}: {failed[0][1]}" if failed else "")
                if len(views) >= 2:
                    break
        finally:
            feeder.close()
        if not views:
            raise InputError(f"None of the {self.manifest.count} pictures can be read; the first is {problem}")
        images = self._images(torch.stack(views[:2]))
        return self._explainer(images, self._first_targets(images), with_gap=self._gap, with_norms=self.settings.norms)

    def _images(self, views: Tensor) -> Tensor:
        return self.classifier.preprocess.normalise(self._upload(views)).to(self._dtype)

    def _upload(self, views: Tensor) -> Tensor:
        """The views on the device; on CUDA by a stream of their own, beside what the network is still computing."""
        if self._copies is None or views.device.type != "cpu":
            return views.to(self.device)
        with torch.cuda.stream(self._copies):
            there = views.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copies)
        there.record_stream(current)  # or the allocator might give its memory away too early
        return there

    # ------------------------------------------------------------------------------------------------------ the targets

    def _target_reader(self) -> Any:
        """From an entry to its class, or None; for ``target="label"``."""
        if self.settings.target != "label":
            return None
        labels = sorted({entry.label for entry in self.manifest if isinstance(entry.label, str)})
        return self.classifier.label_reader(labels)

    def _first_targets(self, images: Tensor) -> Any:
        return self._targets(images, None)

    def _targets(self, images: Tensor, batch: Batch | None) -> Any:
        settings = self.settings
        if settings.topk > 1:
            with torch.inference_mode():
                logits = self._explainer.utility.logits_of(self.classifier.model(images))
            if logits is None or settings.topk > logits.shape[1]:
                raise TargetError(f"topk={settings.topk}: the model has {0 if logits is None else logits.shape[1]} classes.")
            return logits.topk(settings.topk, 1).indices
        if settings.target == "predicted":
            return None
        if settings.target != "label":
            return settings.target if isinstance(settings.target, int) else self.classifier.find_class(settings.target)
        if batch is None:
            return 0
        known = [self._class_of(entry.label) or 0 for entry in batch.entries]
        return torch.tensor(known + [0] * (len(images) - len(known)), device=self.device)

    def _judged(self, batch: Batch) -> list[Decoded | Failure]:
        """What the entries gave; one without the label that is to be explained failed too."""
        if self._class_of is None:
            return list(batch.found)
        return [self._with_label(entry, each) for entry, each in zip(batch.entries, batch.found, strict=True)]

    def _with_label(self, entry: Entry, each: Decoded | Failure) -> Decoded | Failure:
        if isinstance(each, Failure) or self._class_of(entry.label) is not None:
            return each
        return Failure("no target", f"the label {entry.label!r} is no class of {self.classifier.name}.")

    # -------------------------------------------------------------------------------------------------------- the batch

    def _explain(self, batch: Batch) -> Found | None:
        """Start a batch; nothing is waited for on an accelerator."""
        if self._stop.is_set():
            raise Stopped
        if batch.views is None:
            return None
        images = self._images(batch.views)
        if self._explainer.method.source == "random":
            seed = (self.settings.seed * 1_000_003 + batch.shard) * 1_000_003 + batch.first
            self._explainer.reseed(seed % 2**63)
        targets = self._targets(images, batch)
        explanation = self._explainer(images, targets, with_gap=self._gap, with_norms=self.settings.norms)
        return self._packed(explanation)

    def _packed(self, explanation: Explanation) -> Found:
        raw = explanation.raw.float()
        if explanation.targets is None:
            raise InputError("The model returns no logits [N, K], so there is no class to write beside a map.")
        targets = explanation.targets
        if targets.ndim == 1:
            raw, targets = raw[:, None], targets[:, None]
        finite = explanation.finite
        scale = raw.abs().flatten(2).amax(2)  # [B, M]
        unit = raw / torch.where(scale > 0, scale, 1.0)[:, :, None, None]
        nothing = torch.full_like(scale, float("nan"))
        assert explanation.logits is not None
        columns = [
            explanation.probabilities.reshape(targets.shape),
            explanation.logits.gather(1, targets),
            nothing if explanation.gap is None else explanation.gap.reshape(targets.shape),
            nothing if explanation.hvp_ratio is None else explanation.hvp_ratio.reshape(targets.shape),
            scale,
        ]
        numbers = torch.stack([column.float() for column in columns])
        return self._to_host(unit.half(), numbers, targets, finite)

    def _to_host(self, maps: Tensor, numbers: Tensor, targets: Tensor, finite: Tensor) -> Found:
        if self.device.type != "cuda":
            return Found(maps.cpu(), numbers.cpu(), targets.cpu(), finite.cpu())
        moved = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in (maps, numbers)]
        moved += [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in (targets, finite)]
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self.device))
        return Found(moved[0], moved[1], moved[2], moved[3], ready)
