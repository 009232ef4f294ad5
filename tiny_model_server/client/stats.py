"""A client's statistics: calls, failures, retries and latencies, by the replica that answered."""

import logging
import statistics
import threading
from collections import deque
from typing import Any

log = logging.getLogger("tiny_model_server.client")

_LATENCIES = 1000
NOBODY = "(none)"
"""Stands for the replica where none answered."""


class _Replica:
    def __init__(self) -> None:
        self.calls = self.failed = self.retries = 0
        self.latencies: deque[float] = deque(maxlen=_LATENCIES)


class Stats:
    """Counts calls; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._replicas: dict[str, _Replica] = {}

    def add(self, method: str, seconds: float, trailing: Any, status: str) -> str:
        """Notes a call that has ended, with its trailing metadata; returns the replica that answered."""
        name, retries = NOBODY, 0
        for key, value in trailing or ():
            if key == "tms-replica":
                name = value
            elif key == "tms-retries":
                retries = int(value)
        with self._lock:
            replica = self._replicas.get(name) or self._replicas.setdefault(name, _Replica())
            replica.calls += 1
            replica.failed += status != "OK"
            replica.retries += retries
            replica.latencies.append(seconds)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s by %s: %s in %.1f ms, %d retries", method, name, status, seconds * 1000, retries)
        return name

    def snapshot(self) -> dict[str, Any]:
        """{"calls", "failed", "retries", "replicas": {name: the same, "p50_ms", "p99_ms" of the last 1000 calls}}."""
        with self._lock:
            replicas = {name: self._of(replica) for name, replica in self._replicas.items()}
        totals = {key: sum(replica[key] for replica in replicas.values()) for key in ("calls", "failed", "retries")}
        return totals | {"replicas": replicas}

    def _of(self, replica: _Replica) -> dict[str, float]:
        cuts = statistics.quantiles([*replica.latencies, *replica.latencies], n=100)
        counts = {key: getattr(replica, key) for key in ("calls", "failed", "retries")}
        return counts | {"p50_ms": 1000 * cuts[49], "p99_ms": 1000 * cuts[98]}
