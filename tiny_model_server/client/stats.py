"""Counts a client's calls, failures, retries and latencies, by the replica that answered."""

import logging
import statistics
import threading
from collections import defaultdict, deque
from typing import Any

log = logging.getLogger("tiny_model_server.client")

_LATENCIES = 1000
NOBODY = "(none)"
"""Stands for the replica where none answered."""


class _Replica:
    def __init__(self) -> None:
        self.counts = {"calls": 0, "failed": 0, "retries": 0}
        self.latencies: deque[float] = deque(maxlen=_LATENCIES)


class Stats:
    """Counts calls; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._replicas: dict[str, _Replica] = defaultdict(_Replica)

    def add(self, method: str, seconds: float, trailing: Any, status: str) -> str:
        """Counts a call that has ended with this trailing metadata; returns the replica that answered."""
        found = {key: value for key, value in trailing or ()}  # noqa: C416 - dict() of old grpcio's metadata fails
        name, retries = str(found.get("tms-replica", NOBODY)), int(found.get("tms-retries", 0))
        with self._lock:
            replica = self._replicas[name]
            replica.counts["calls"] += 1
            replica.counts["failed"] += status != "OK"
            replica.counts["retries"] += retries
            replica.latencies.append(seconds)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s by %s: %s in %.1f ms, %d retries", method, name, status, seconds * 1000, retries)
        return name

    def snapshot(self) -> dict[str, Any]:
        """{"calls", "failed", "retries", "replicas": {name: the same, "p50_ms", "p99_ms" of the last 1000 calls}}."""
        with self._lock:
            replicas = {name: _of(replica) for name, replica in self._replicas.items()}
        totals = {key: sum(replica[key] for replica in replicas.values()) for key in ("calls", "failed", "retries")}
        return totals | {"replicas": replicas}


def _of(replica: _Replica) -> dict[str, float]:
    cuts = statistics.quantiles([*replica.latencies, *replica.latencies], n=100)
    return replica.counts | {"p50_ms": 1000 * cuts[49], "p99_ms": 1000 * cuts[98]}
