"""Replicas that fail in other ways: slow for large inputs only, without one of the models.

``faults.py`` prints the table of the scenes; ``test_odd_replicas.py`` holds each to its limit.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from model_client import ModelClient
from tests.balance import Outcome, addresses, replicas, start, steady
from tests.conftest import Server

SMALL = "twenty bytes of text"


def slow_for_large(balancing: str = "load", seconds: float = 10) -> tuple[Outcome, Outcome]:
    """What the small and the large calls of one client see, while one of three takes 200 ms for a large input."""
    quick = {"ms": 1, "large_ms": 10}
    with (
        replicas(quick, quick, {"ms": 1, "large_ms": 200}) as servers,
        ModelClient("steady", addresses=addresses(servers), balancing=balancing) as client,
        ThreadPoolExecutor() as threads,
    ):
        client.list_models()
        small = threads.submit(steady, client, seconds, data=SMALL)
        large = threads.submit(steady, client, seconds, rate=15)
        return small.result(), large.result()


@contextmanager
def one_lacks() -> Iterator[list[Server]]:
    """Three replicas of one model by several names. The first cannot load ``failed``, and does not know ``unknown``."""
    first = {"TMS_ALIASES": "failed=steady", "TMS_MODEL_FAILED_ARGS": json.dumps({"no_such_argument": 1})}
    others = {"TMS_ALIASES": "failed=steady,unknown=steady"}
    servers: list[Server] = []
    try:
        servers.extend(start(more=more) for more in (first, others, others))
        yield servers
    finally:
        for server in servers:
            server.kill()


def failed_model(servers: list[Server], seconds: float = 8) -> tuple[Outcome, Outcome]:
    """What clients of the model that is FAILED at one of three, and of the one that is READY at all, see at once."""
    with (
        ModelClient("failed", addresses=addresses(servers)) as failed,
        ModelClient("steady", addresses=addresses(servers)) as ready,
        ThreadPoolExecutor() as threads,
    ):
        loads = [threads.submit(steady, client, seconds, rate=30) for client in (failed, ready)]
        return loads[0].result(), loads[1].result()
