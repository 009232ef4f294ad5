"""How busy the models are: metrics in one registry, and the load reports by which clients weigh the replicas."""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from tiny_model_server import wire
from tiny_model_server.tally import Tally

log = logging.getLogger("tiny_model_server.load")

_WINDOW_S = 3
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_NOT_THE_SERVERS_FAULT = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "CANCELLED", "PERMISSION_DENIED"}  # of gRPC's names
_REPORT_AGE_S = 0.1
_UNKNOWN_UTILIZATION = 0.001  # where nothing but errors was answered: their share is what weighs then
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
        self.wanted = Gauge("tms_wanted", "1 if the model is meant to have workers", ["model"], **make)
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

    def forget(self, model: str) -> None:
        """Drops what was counted of a model that is no more."""
        for metric in (*vars(self).values(), *self._own.values()):
            if isinstance(metric, MetricWrapperBase):
                metric.remove_by_labels({"model": model})

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
        self.dropped: Callable[[], None] = metrics.dropped.labels(name).inc
        """Notes an input that was not run because nobody waits for it."""
        self.restarted: Callable[[], None] = metrics.restarts.labels(name).inc
        """Notes a worker that died."""
        self._ok = metrics.requests.labels(name, "OK")
        self._busy, self._answers, self._errors = _Window(), _Window(), _Window()
        self._report = (0.0, b"")
        self._lock = threading.Lock()
        self._slots = 1
        self.places = 1
        """Items that are at work at once when every slot has a full batch."""
        self.batch_s = 0.0
        """A moving mean of how long one batch takes, in seconds; 0 until one was run."""

    def watch(self, depth: Callable[[], int], workers: Callable[[], int], wanted: Callable[[], bool]) -> None:
        """Reads the gauges from these functions whenever metrics are asked for."""
        self._metrics.depth.labels(self._name).set_function(depth)
        self._metrics.workers.labels(self._name).set_function(workers)
        self._metrics.wanted.labels(self._name).set_function(wanted)
        self._metrics.busy.labels(self._name).set_function(self.busy_fraction)

    def serves(self, most: int, slots: int) -> None:
        """Tells how many items a batch may have, and how many batches run at once."""
        self._slots, self.places = slots, most * slots

    def arrived(self, count: int) -> float:
        """Notes that inputs came in; returns the time, for ``answered``."""
        self._in_flight.inc(count)
        return time.monotonic()

    def answered(self, since: float, statuses: Iterable[str]) -> None:
        """Notes the statuses of inputs that came at ``since``."""
        seconds, count = time.monotonic() - since, 0
        errors = 0
        for status in statuses:
            errors += status not in _NOT_THE_SERVERS_FAULT
            (self._ok if status == "OK" else self._metrics.requests.labels(self._name, status)).inc()
            self._request.observe(seconds)
            count += 1
        self._in_flight.dec(count)
        with self._lock:
            self._answers.add(int(since + seconds), count)
            self._errors.add(int(since + seconds), errors)

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
                self._busy.add(second, min(now, second + 1) - max(since, second))
        for name, amount in tally[0].items():
            if metric := self._metrics.own(name, Counter):
                metric.labels(self._name).inc(amount)
        for name, values in tally[1].items():
            if metric := self._metrics.own(name, Histogram):
                for value in values:
                    metric.labels(self._name).observe(value)

    def busy_fraction(self) -> float:
        """The part of the last whole seconds that the workers were busy with batches that have ended."""
        now = int(time.monotonic())
        with self._lock:
            return min(1.0, self._busy.total(now - _WINDOW_S, now) / (_WINDOW_S * self._slots))

    @property
    def capacity(self) -> float:
        """Items a second that the workers could answer in full batches of the duration seen now; 0 if not known."""
        return self.places / self.batch_s if self.batch_s else 0.0

    def report(self, capacity: float) -> bytes:
        """The OrcaLoadReport by which clients weigh this replica, given what it could answer in items a second.

        A client weighs by rps / (utilisation + eps / rps), so by ``capacity`` as long as nothing fails. The busy
        fraction would not do as utilisation: a model that batches is busy all the time from a small load on.
        """
        now = time.monotonic()
        made, report = self._report
        if now - made > _REPORT_AGE_S:
            first, elapsed = int(now) - _WINDOW_S, now % 1 + _WINDOW_S
            with self._lock:
                rps = self._answers.total(first, int(now) + 1) / elapsed
                eps = self._errors.total(first, int(now) + 1) / elapsed
            orca = wire.message("orca", "xds.data.orca.v3.OrcaLoadReport")
            utilization = rps / capacity if capacity else _UNKNOWN_UTILIZATION
            report = orca(rps_fractional=rps, eps=eps, application_utilization=utilization).SerializeToString()
            self._report = (now, report)
        return report


class _Window:
    """Sums of the last seconds."""

    def __init__(self) -> None:
        self._sums: dict[int, float] = {}

    def add(self, second: int, amount: float) -> None:
        if second not in self._sums:
            self._sums = {old: total for old, total in self._sums.items() if old >= second - _WINDOW_S} | {second: 0.0}
        self._sums[second] += amount

    def total(self, first: int, end: int) -> float:
        return sum(self._sums.get(second, 0.0) for second in range(first, end))
