"""Scenes of balancing: real replicas, a steady load of large requests by one client, and something that goes wrong.

``faults.py`` prints their table; ``test_balancing.py`` holds each to its limit.
"""

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from dnslib import QTYPE, RR, A, DNSRecord

from model_client import ModelClient
from tests.conftest import ROOT, Server, free_port

MODELS = ROOT / "tests" / "models_steady"
IMAGE = np.zeros((408, 408, 3), np.uint8)  # 499,392 bytes
RATE = 60.0


Scene = Callable[..., "Outcome"]


@dataclass
class Outcome:
    """What a load saw."""

    latencies: list[float] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)

    def percentile(self, percent: float) -> float:
        """In seconds."""
        return float(np.percentile(self.latencies, percent))

    @property
    def calls(self) -> int:
        return len(self.latencies)

    def row(self, name: str) -> str:
        p50, p99, worst = (1000 * self.percentile(percent) for percent in (50, 99, 100))
        retries = self.stats["retries"]
        return f"| {name} | {self.calls} | {len(self.failures)} | {retries} | {p50:.0f} | {p99:.0f} | {worst:.0f} |"


class Names:
    """A DNS server of the test's own, whose only name stands for ``hosts``; while ``silent``, it answers nothing."""

    def __init__(self, hosts: list[str]) -> None:
        self.hosts = hosts
        self.silent = False
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            packet, sender = self._socket.recvfrom(4096)
            if self.silent:
                continue
            request = DNSRecord.parse(packet)
            reply = request.reply()
            if request.q.qtype == QTYPE.A:
                for host in self.hosts:
                    reply.add_answer(RR(request.q.qname, QTYPE.A, rdata=A(host), ttl=1))
            self._socket.sendto(reply.pack(), sender)


def start(
    port: int = 0, host: str = "127.0.0.1", age_s: float = 6, more: dict[str, Any] | None = None, **model_args: Any
) -> Server:
    """A replica whose model is constructed with these arguments, and whose connections become ``age_s`` old.

    ``more``: other arguments of ``Server``.
    """
    options = {"TMS_PORT": port, "TMS_HOST": host, "TMS_HTTP_PORT": "off", "TMS_LOG_LEVEL": "info"}
    options |= {"TMS_MAX_CONNECTION_AGE_S": age_s, "TMS_MODEL_STEADY_ARGS": json.dumps(model_args)}
    return Server(MODELS, **options | (more or {}))


@contextmanager
def replicas(*each: dict[str, Any]) -> Iterator[list[Server]]:
    """One replica for each dictionary of model arguments."""
    servers: list[Server] = []
    try:
        for arguments in each:
            servers.append(start(**arguments))
        yield servers
    finally:
        for server in servers:
            server.kill()


def addresses(servers: list[Server]) -> list[str]:
    return [server.address for server in servers]


def steady(
    client: ModelClient,
    seconds: float,
    event: Callable[[], None] | None = None,
    *,
    at_s: float = 2,
    rate: float = RATE,
    data: Any = IMAGE,
) -> Outcome:
    """Sends ``data`` at a rate, whatever the answers take, at least until ``event``, begun after ``at_s``, ended."""
    outcome, done, lock = Outcome(), threading.Semaphore(0), threading.Lock()
    client.list_models()
    happening = threading.Thread(target=lambda: (time.sleep(at_s), event and event()))
    happening.start()
    begun = time.monotonic()
    count = 0
    while count < seconds * rate or happening.is_alive():
        time.sleep(max(0.0, begun + count / rate - time.monotonic()))
        count += 1
        sent = time.monotonic()

        def finished(future: Any, sent: float = sent) -> None:
            with lock:
                outcome.latencies.append(time.monotonic() - sent)
                if error := future.exception():
                    outcome.failures.append(error)
            done.release()

        client.submit(data).add_done_callback(finished)
    for _ in range(count):
        assert done.acquire(timeout=70), "a call never ended"
    happening.join()
    outcome.stats = client.stats()
    return outcome


def closed_loop(client: ModelClient, callers: int, seconds: float) -> Outcome:
    """As many calls as ``callers`` make that each wait for their answer."""
    outcome, end = Outcome(), time.monotonic() + seconds
    client.list_models()

    def call() -> None:
        while time.monotonic() < end:
            sent = time.monotonic()
            client.run_image(IMAGE)
            outcome.latencies.append(time.monotonic() - sent)

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outcome.stats = client.stats()
    return outcome


# ---- the scenes


def kill_one(seconds: float = 8) -> Outcome:
    with replicas({}, {}, {}) as servers, ModelClient("steady", addresses=addresses(servers)) as client:
        return steady(client, seconds, servers[0].kill)


def terminate_one(seconds: float = 8) -> Outcome:
    with replicas({}, {}, {}) as servers, ModelClient("steady", addresses=addresses(servers)) as client:
        return steady(client, seconds, lambda: assert_equal(servers[0].stop(), 0))


def rolling_restart(seconds: float = 16) -> Outcome:
    with replicas({}, {}, {}) as servers, ModelClient("steady", addresses=addresses(servers)) as client:

        def restart() -> None:
            for index, server in enumerate(list(servers)):
                assert_equal(server.stop(), 0)
                servers[index] = start(server.port)
                time.sleep(1)

        return steady(client, seconds, restart)


def freeze_one(*rates: float, frozen_s: float = 8, after_s: float = 4) -> list[Outcome]:
    """What the client of each rate sees, all at once."""
    with replicas({}, {}, {}) as servers, ExitStack() as stack, ThreadPoolExecutor() as threads:
        known = addresses(servers)
        clients = [  # in another order, so that they share no connections
            stack.enter_context(ModelClient("steady", addresses=known[index:] + known[:index]))
            for index in range(len(rates))
        ]

        def freeze() -> None:
            servers[0].process.send_signal(signal.SIGSTOP)
            time.sleep(frozen_s)
            servers[0].process.send_signal(signal.SIGCONT)

        events = [freeze, *[None] * (len(rates) - 1)]
        loads = [
            threads.submit(steady, client, 2 + frozen_s + after_s, event, rate=rate)
            for client, rate, event in zip(clients, rates, events, strict=True)
        ]
        return [load.result() for load in loads]


def one_fails_fast(balancing: str = "load", seconds: float = 20) -> Outcome:
    with (
        replicas({}, {}, {"fails": True}) as servers,
        ModelClient("steady", addresses=addresses(servers), balancing=balancing) as client,
    ):
        return steady(client, seconds)


def one_is_slow(balancing: str = "load", seconds: float = 10) -> Outcome:
    with (
        replicas({"ms": 20}, {"ms": 20}, {"ms": 80}) as servers,
        ModelClient("steady", addresses=addresses(servers), balancing=balancing) as client,
    ):
        return steady(client, seconds)


def one_is_slow_closed_loop(balancing: str = "load") -> Outcome:
    with (
        replicas({"ms": 20}, {"ms": 20}, {"ms": 80}) as servers,
        ModelClient("steady", addresses=addresses(servers), balancing=balancing) as client,
    ):
        return closed_loop(client, 12, 8)


def one_is_full(seconds: float = 8) -> Outcome:
    """One replica has room for two items only, each of which takes it a second."""
    servers = [start(), start(), Server(MODELS, TMS_MODEL_STEADY_ARGS='{"ms": 1000}', TMS_MODEL_STEADY_QUEUE_SIZE=1)]
    try:
        with ModelClient("steady", addresses=addresses(servers)) as client:
            return steady(client, seconds)
    finally:
        for server in servers:
            server.kill()


@contextmanager
def named(count: int, age_s: float = 6) -> Iterator[tuple[list[Server], Names, str]]:
    """Replicas on one port of several loopback addresses, the DNS server that knows the first, and their address."""
    servers: list[Server] = []
    names = Names(["127.0.0.2"])
    try:
        servers.append(start(free_port(), "127.0.0.2", age_s))
        servers.extend(start(servers[0].port, f"127.0.0.{2 + index}", age_s) for index in range(1, count))
        yield servers, names, f"dns://127.0.0.1:{names.port}/replicas.test:{servers[0].port}"
    finally:
        for server in servers:
            server.kill()


def names_gone(seconds: float = 16) -> Outcome:
    with named(3, age_s=2) as (_, names, address):  # each connection is made anew meanwhile
        names.hosts = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
        with ModelClient("steady", addresses=address) as client:

            def silence() -> None:
                names.silent = True
                time.sleep(seconds - 4)
                names.silent = False

            return steady(client, seconds, silence)


def assert_equal(found: object, expected: object) -> None:
    assert found == expected, (found, expected)
