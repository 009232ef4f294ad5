"""How busy the models are: metrics in one registry, and the load reports by which clients weigh the replicas."""

import logging
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from tiny_model_server import schemas
from tiny_model_server.custom_metrics import CustomMetrics

log = logging.getLogger("tiny_model_server.load")

_WINDOW_S = 3
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_NOT_THE_SERVERS_FAULT = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "CANCELLED", "PERMISSION_DENIED"}  # of gRPC's names
_REPORT_AGE_S = 0.1
_RECENT_S, _MAX_RECENT = 10, 1024  # the calls of which percentiles are made
_UNKNOWN_UTILIZATION = 0.001  # if only errors were answered; then their share decides
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_FAMILIES: dict[str, tuple[Any, str]] = {  # each is a number, or a function that returns one, of ModelMetrics
    "dropped": (CounterMetricFamily, "Inputs that nobody waited for any more, not run"),
    "worker_restarts": (CounterMetricFamily, "Workers that died and were replaced"),
    "request_seconds": (HistogramMetricFamily, "From arrival to answer"),
    "queue_seconds": (HistogramMetricFamily, "From arrival to the start of the batch"),
    "compute_seconds": (HistogramMetricFamily, "One batch in the worker"),
    "batch_size": (HistogramMetricFamily, "Inputs in one batch"),
    "queue_depth": (GaugeMetricFamily, "Inputs waiting"),
    "in_flight": (GaugeMetricFamily, "Inputs queued or at work"),
    "busy_fraction": (GaugeMetricFamily, "Part of the last seconds that the workers worked"),
    "workers": (GaugeMetricFamily, "Worker processes that serve"),
    "wanted": (GaugeMetricFamily, "1 if the model is meant to have workers"),
}


class Metrics:
    """The replica's registry: the numbers of every ``ModelMetrics``, and what models count themselves."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.models: dict[str, ModelMetrics] = {}
        self._custom: dict[str, Any] = {}

    def collect(self) -> Iterator[Metric]:
        """Every metric with the numbers of all models; for the registry."""
        models = list(self.models.items())
        requests = CounterMetricFamily("tms_requests", "Inputs answered, by gRPC status", labels=["model", "status"])
        for name, numbers in models:
            for status, count in list(numbers.requests.items()):
                requests.add_metric([name, status], count)
        yield requests
        for metric, (kind, what) in _FAMILIES.items():
            family = kind(f"tms_{metric}", what, labels=["model"])
            for name, numbers in models:
                value = getattr(numbers, metric)
                found = value() if callable(value) else value
                family.add_metric([name], *(found if isinstance(found, tuple) else [found]))
            yield family

    def custom(self, name: str, kind: type[Counter] | type[Histogram]) -> Any:
        """The metric that models count themselves under this name, None if the name is taken by another."""
        if name not in self._custom:
            facts = f"tms_model_{name}", "Counted by the model", ["model"]
            try:
                self._custom[name] = kind(*facts, registry=self.registry)
            except ValueError as error:  # the name of another metric's series
                log.warning("a model's metric is left out: %s", error)
                self._custom[name] = None
        found = self._custom[name]
        return found if isinstance(found, kind) else None

    def forget(self, model: str) -> None:
        """Drops the metrics of a model that was removed."""
        self.models.pop(model, None)
        for metric in filter(None, self._custom.values()):
            metric.remove_by_labels({"model": model})

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _Histogram:
    """Counts values between bounds. prometheus_client's would take a tenth of the time of a small call."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Counts a value; one thread at a time."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def __call__(self) -> tuple[list[tuple[str, float]], float]:
        """(bound, values up to it) for each bound, and the sum of all values."""
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        return list(zip(names, accumulate(self._counts), strict=True)), self._sum


class ModelMetrics:
    """The metrics of one model. Its queue, its workers and the engine report to it."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        """Begins with all numbers at zero."""
        self._metrics = metrics
        self._name = name
        self.requests = {"OK": 0}
        self.request_seconds, self.queue_seconds, self.compute_seconds = (_Histogram(_SECONDS) for _ in range(3))
        self.batch_size = _Histogram(_SIZES)
        self.dropped = self.worker_restarts = self.in_flight = 0
        self.queue_depth: Callable[[], int] = lambda: 0
        self.workers: Callable[[], int] = lambda: 0
        self.wanted: Callable[[], bool] = lambda: False
        self._busy, self._answers, self._errors = _Window(), _Window(), _Window()
        self._report = (0.0, b"")
        self._recent: deque[tuple[float, float]] = deque(maxlen=_MAX_RECENT)
        """When calls were answered, and in how long."""
        self._slots = 1
        self.places = 1
        """Items that are at work at once when every slot has a full batch."""
        self.batch_s = 0.0
        """A moving mean of how long one batch takes, in seconds; 0 until one was run."""
        metrics.models[name] = self

    def set_capacity(self, batch_size: int, slots: int) -> None:
        """Sets how many items a batch may have, and how many batches run at once."""
        self._slots, self.places = slots, batch_size * slots

    def arrived(self, count: int) -> float:
        """Counts inputs that arrive. Returns the time, for ``answered``."""
        self.in_flight += count
        return time.monotonic()

    def answered(self, since: float, statuses: Sequence[str]) -> None:
        """Counts the statuses of inputs that arrived at ``since``."""
        now, errors = time.monotonic(), 0
        for status in statuses:
            errors += status not in _NOT_THE_SERVERS_FAULT
            self.requests[status] = self.requests.get(status, 0) + 1
            self.request_seconds.observe(now - since)
        self.in_flight -= len(statuses)
        self._recent.append((now, now - since))
        self._answers.add(int(now), len(statuses))
        if errors:
            self._errors.add(int(now), errors)

    def started(self, queued_s: Sequence[float]) -> None:
        """Counts a batch that starts, and how long its items waited."""
        for seconds in queued_s:
            self.queue_seconds.observe(seconds)
        self.batch_size.observe(len(queued_s))

    def finished(self, since: float, compute_s: float, counted: CustomMetrics) -> None:
        """Counts a batch that began at ``since`` and took the worker ``compute_s``."""
        now = time.monotonic()
        took = now - since
        self.compute_seconds.observe(compute_s)
        self.batch_s = took if not self.batch_s else 0.9 * self.batch_s + 0.1 * took
        for second in range(max(int(since), int(now) - _WINDOW_S), int(now) + 1):
            self._busy.add(second, min(now, second + 1) - max(since, second))
        for name, amount in counted[0].items():
            if metric := self._metrics.custom(name, Counter):
                metric.labels(self._name).inc(amount)
        for name, values in counted[1].items():
            if metric := self._metrics.custom(name, Histogram):
                for value in values:
                    metric.labels(self._name).observe(value)

    def busy_fraction(self) -> float:
        """The part of the last whole seconds that the workers were busy with batches that have ended."""
        now = int(time.monotonic())
        return min(1.0, self._busy.total(now - _WINDOW_S, now) / (_WINDOW_S * self._slots))

    def snapshot(self) -> dict[str, Any]:
        """What the page shows. Percentiles are of the calls of the last 10 s, and None if there was none."""
        now = time.monotonic()
        recent = sorted(seconds for answered, seconds in self._recent.copy() if now - answered < _RECENT_S)
        p50, p95 = (1000 * recent[int(part * (len(recent) - 1))] if recent else None for part in (0.5, 0.95))
        answered = sum(list(self.requests.values()))
        (*_, (_, batches)), items = self.batch_size()
        return {
            "answered": answered,
            "failed": answered - self.requests["OK"],
            "p50_ms": p50,
            "p95_ms": p95,
            "batches": batches,
            "items": items,
            "queue_depth": self.queue_depth(),
            "busy": self.busy_fraction(),
        }

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
            rps = self._answers.total(first, int(now) + 1) / elapsed
            eps = self._errors.total(first, int(now) + 1) / elapsed
            orca = schemas.message("orca", "xds.data.orca.v3.OrcaLoadReport")
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
