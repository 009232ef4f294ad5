"""How busy the models are: counters and histograms in one registry, and the busy fraction over the last seconds."""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tiny_model_server.tally import Tally

log = logging.getLogger("tiny_model_server.load")

_WINDOW_S = 3
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The replica's registry; every model has a ``ModelLoad`` that writes to it."""

    def __init__(self) -> None:
        """Makes the metrics that exist from the start."""
        self.registry = CollectorRegistry()
        make: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("tms_requests", "Inputs answered, by gRPC status", ["model", "status"], **make)
        self.dropped = Counter("tms_dropped", "Inputs that nobody waited for any more, not run", ["model"], **make)
        self.restarts = Counter("tms_worker_restarts", "Workers that died and were replaced", ["model"], **make)
        seconds: dict[str, Any] = make | {"buckets": _SECONDS}
        self.request = Histogram("tms_request_seconds", "From arrival to answer", ["model"], **seconds)
        self.queue = Histogram("tms_queue_seconds", "From arrival to the start of the batch", ["model"], **seconds)
        self.compute = Histogram("tms_compute_seconds", "One batch in the worker", ["model"], **seconds)
        self.batch = Histogram("tms_batch_size", "Inputs in one batch", ["model"], buckets=_SIZES, **make)
        self.depth = Gauge("tms_queue_depth", "Inputs waiting", ["model"], **make)
        self.in_flight = Gauge("tms_in_flight", "Inputs queued or at work", ["model"], **make)
        self.busy = Gauge("tms_busy_fraction", "Part of the last seconds that the workers worked", ["model"], **make)
        self.workers = Gauge("tms_workers", "Worker processes that serve", ["model"], **make)
        self._own: dict[str, Any] = {}
        self._lock = threading.Lock()

    def own(self, name: str, kind: type[Counter] | type[Histogram]) -> Any:
        """The metric that models count themselves under this name, None if the name is taken by another."""
        with self._lock:
            if name not in self._own:
                try:
                    made = kind(f"tms_model_{name}", "Counted by the model", ["model"], registry=self.registry)
                except ValueError as error:  # the name of another metric's series
                    log.warning("a model's metric is left out: %s", error)
                    made = None
                self._own[name] = made
            found = self._own[name]
        return found if isinstance(found, kind) else None

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class ModelLoad:
    """What one model is doing, told by its queue, its workers and the engine."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        """Shows the model at zero from now on."""
        self._metrics = metrics
        self._name = name
        self._queue = metrics.queue.labels(name)
        self._request = metrics.request.labels(name)
        self._compute = metrics.compute.labels(name)
        self._batch = metrics.batch.labels(name)
        self._in_flight = metrics.in_flight.labels(name)
        self._dropped = metrics.dropped.labels(name)
        self._restarts = metrics.restarts.labels(name)
        self._ok = metrics.requests.labels(name, "OK")
        self._busy: dict[int, float] = {}
        self._lock = threading.Lock()
        self.batch_s = 0.0
        """A moving mean of how long one batch takes, in seconds; 0 until one was run."""

    def watch(self, depth: Callable[[], int], workers: Callable[[], int], slots: Callable[[], int]) -> None:
        """Reads the gauges from these functions whenever metrics are asked for."""
        self._metrics.depth.labels(self._name).set_function(depth)
        self._metrics.workers.labels(self._name).set_function(workers)
        self._metrics.busy.labels(self._name).set_function(lambda: self.busy_fraction(slots()))

    def arrived(self, count: int) -> float:
        """Notes that inputs came in; returns the time, for ``answered``."""
        self._in_flight.inc(count)
        return time.monotonic()

    def answered(self, since: float, statuses: Iterable[str]) -> None:
        """Notes the statuses of inputs that came at ``since``."""
        seconds, count = time.monotonic() - since, 0
        for status in statuses:
            (self._ok if status == "OK" else self._metrics.requests.labels(self._name, status)).inc()
            self._request.observe(seconds)
            count += 1
        self._in_flight.dec(count)

    def started(self, queued_s: Iterable[float]) -> float:
        """Notes the start of a batch whose items waited this long; returns the time, for ``finished``."""
        size = 0
        for seconds in queued_s:
            self._queue.observe(seconds)
            size += 1
        self._batch.observe(size)
        return time.monotonic()

    def finished(self, since: float, compute_s: float, tally: Tally) -> None:
        """Notes the end of a batch that began at ``since`` and took the worker ``compute_s``."""
        self._compute.observe(compute_s)
        now = time.monotonic()
        with self._lock:
            took = now - since
            self.batch_s = took if not self.batch_s else 0.9 * self.batch_s + 0.1 * took
            for second in range(max(int(since), int(now) - _WINDOW_S), int(now) + 1):
                part = min(now, second + 1) - max(since, second)
                self._busy[second] = self._busy.get(second, 0.0) + part
            for second in [second for second in self._busy if second < int(now) - _WINDOW_S]:
                del self._busy[second]
        for name, amount in tally[0].items():
            if metric := self._metrics.own(name, Counter):
                metric.labels(self._name).inc(amount)
        for name, values in tally[1].items():
            if metric := self._metrics.own(name, Histogram):
                for value in values:
                    metric.labels(self._name).observe(value)

    def dropped(self) -> None:
        """Notes an input that was not run because nobody waits for it."""
        self._dropped.inc()

    def restarted(self) -> None:
        """Notes a worker that died."""
        self._restarts.inc()

    def busy_fraction(self, slots: int) -> float:
        """The part of the last whole seconds that ``slots`` workers were busy with batches that have ended."""
        now = int(time.monotonic())
        with self._lock:
            busy = sum(self._busy.get(second, 0.0) for second in range(now - _WINDOW_S, now))
        return min(1.0, busy / (_WINDOW_S * max(1, slots)))
