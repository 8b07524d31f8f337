"""What Prometheus reads at /metrics; a registry of its own per server, so that two in one process do not meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..optional import need
from .batching import Watch

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """The server's counters.

    Attributes:
        requests: by route, method and status.
        errors: refused or failed requests, by kind.
        seconds: of whole requests, by route.
        stages: by model; "parse" (a JSON request) and "draw" (an answer) per request, "decode" and "queue" (from decoded to its
            batch) per image, "model" per batch. The waiting for a thread is in none of them but "queue".
        batch: images per batch, by model.
        events: of the batchers, by model and event.
        images: explained, by model.
    """

    def __init__(self) -> None:
        prometheus = need("prometheus_client", "serve")
        self._prometheus = prometheus
        self.registry = prometheus.CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Any:
            return prometheus.Counter(f"shapleycam_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Any:
            return prometheus.Histogram(f"shapleycam_{name}", text, labels, buckets=buckets, registry=self.registry)

        self.requests = counter("requests", "Requests answered", "route", "method", "status")
        self.errors = counter("errors", "Requests refused or failed, by kind", "kind")
        self.seconds = histogram("request_seconds", "From the first byte of a request to its answer", _SECONDS, "route")
        self.stages = histogram("stage_seconds", "Stages of a request", _SECONDS, "model", "stage")
        self.batch = histogram("batch_images", "Images per batch", (1, 2, 4, 8, 16, 32, 64), "model")
        self.events = counter("batcher_events", "What happened in the batcher", "model", "event")
        self.images = counter("images", "Images answered by the model", "model")
        self._ready = prometheus.Gauge("shapleycam_ready", "1 while requests are wanted", registry=self.registry)

    def text(self) -> tuple[bytes, str]:
        """The exposition and its content type."""
        return self._prometheus.generate_latest(self.registry), self._prometheus.CONTENT_TYPE_LATEST

    def follow(self, ready: Callable[[], bool], queues: Callable[[], Iterable[tuple[str, int, int, int, int]]]) -> None:
        """Read readiness, and (model, held, capacity, max_batch, mismatches) of every one, whenever the metrics are read."""
        self._ready.set_function(lambda: float(ready()))
        core = need("prometheus_client.core", "serve")

        class Queues:
            def collect(self) -> Iterable[Any]:
                gauges = [
                    core.GaugeMetricFamily(f"shapleycam_{name}", text, labels=["model"])
                    for name, text in (
                        ("queue_requests", "Requests admitted and not answered"),
                        ("queue_capacity", "Most requests admitted"),
                        ("max_batch", "Most images of a batch"),
                        ("kernel_mismatches", "Fused operators that were checked and were wrong"),
                    )
                ]
                for model, *values in queues():
                    for gauge, value in zip(gauges, values, strict=True):
                        gauge.add_metric([model], value)
                return gauges

        self.registry.register(Queues())


class CountingWatch(Watch):
    """A batcher's watch that counts."""

    def __init__(self, metrics: Metrics, model: str, log: Callable[..., None]) -> None:
        self._decode, self._queue = (metrics.stages.labels(model, stage) for stage in ("decode", "queue"))
        self._model = metrics.stages.labels(model, "model")
        self._batch, self._images = metrics.batch.labels(model), metrics.images.labels(model)
        self._events, self._name, self._log = metrics.events, model, log

    def prepared(self, seconds: float) -> None:
        """See :class:`Watch`."""
        self._decode.observe(seconds)

    def waited(self, seconds: float) -> None:
        """See :class:`Watch`."""
        self._queue.observe(seconds)

    def ran(self, size: int, seconds: float) -> None:
        """See :class:`Watch`."""
        self._model.observe(seconds)
        self._batch.observe(size)
        self._images.inc(size)

    def happened(self, event: str, error: BaseException | None = None) -> None:
        """See :class:`Watch`. Errors are logged here, with their traceback; clients get the message alone."""
        self._events.labels(self._name, event).inc()
        if event in ("failed_item", "out_of_memory", "died"):
            self._log(event, model=self._name, error=error)
