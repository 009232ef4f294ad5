"""Counts a client's calls, failures, retries and latencies, by the replica that answered."""

import logging
import re
import statistics
import threading
from collections import Counter, defaultdict, deque
from typing import Any

log = logging.getLogger("tiny_model_server.client")

_LATENCIES = 1000
_COUNT = re.compile("[0-9]{1,9}")  # a proxy on the way may send anything
NOBODY = "(none)"
"""Stands for the replica where none answered."""


class Stats:
    """Counts calls; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, dict[str, int]] = defaultdict(lambda: {"calls": 0, "failed": 0, "retries": 0})
        self._latencies: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_LATENCIES))

    def add(self, method: str, seconds: float, trailing: Any, status: str) -> str:
        """Counts a call that has ended with this trailing metadata; returns the replica that answered."""
        found = {key: value for key, value in trailing or ()}  # noqa: C416 - dict() of old grpcio's metadata fails
        replica, retries = str(found.get("tms-replica", NOBODY)), str(found.get("tms-retries", ""))
        with self._lock:
            counts = self._counts[replica]
            counts["calls"] += 1
            counts["failed"] += status != "OK"
            counts["retries"] += int(retries) if _COUNT.fullmatch(retries) else 0
            self._latencies[replica].append(seconds)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s by %s: %s in %.1f ms, retries: %s", method, replica, status, seconds * 1000, retries or "0")
        return replica

    def snapshot(self) -> dict[str, Any]:
        """{"calls", "failed", "retries", "replicas": {name: the same, "p50_ms", "p99_ms" of the last 1000 calls}}."""
        replicas, totals = {}, Counter(calls=0, failed=0, retries=0)
        with self._lock:
            for name, counts in self._counts.items():
                totals.update(counts)
                cuts = statistics.quantiles([*self._latencies[name]] * 2, n=100)
                replicas[name] = {**counts, "p50_ms": 1000 * cuts[49], "p99_ms": 1000 * cuts[98]}
        return {**totals, "replicas": replicas}
