"""Replicas that fail in other ways: slow, without a model, with a wrong health, far away, at a wrong time.

``faults.py`` prints the table of the scenes; ``test_odd_replicas.py`` holds each to its limit.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory
from typing import Any

import grpc

from model_client import ModelClient
from tests.balance import RATE, Outcome, addresses, replicas, start, steady
from tests.conftest import ROOT, Server
from tests.network import THERE, network
from tiny_model_server import schemas

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


class Stub:
    """A replica without models, whose health may be wrong.

    It is "serving", "not serving", "hangs", "unimplemented" or "flips". The stub answers each call after 10 ms: with 1,
    or with ``status`` if there is one.
    """

    def __init__(self, health: str = "serving", status: grpc.StatusCode | None = None) -> None:
        self.health, self.status = health, status
        self.counts = Counter[str]()
        """Of calls by method; a client watches health once a connection."""
        options = [("grpc.so_reuseport", 0), ("grpc.max_connection_age_ms", 3000)]
        options += [("grpc.keepalive_permit_without_calls", 1), ("grpc.http2.min_ping_interval_without_data_ms", 500)]
        self._server = grpc.server(ThreadPoolExecutor(64), [_Handlers(self)], options=options)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0).wait()

    def check(self, _: bytes, context: Any) -> bytes:
        return _health("NOT_SERVING" if self.health == "not serving" else "SERVING")

    def watch(self, _: bytes, context: Any) -> Iterator[bytes]:
        ended = threading.Event()
        context.add_callback(ended.set)
        if self.health == "unimplemented":
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "this stub has no Watch")
        elif self.health == "flips":
            up = False
            while not ended.wait(0.1):
                up = not up
                yield _health("SERVING" if up else "NOT_SERVING")
        elif self.health != "hangs":
            yield self.check(b"", context)
        ended.wait()

    def run(self, _: bytes, context: Any) -> bytes:
        time.sleep(0.01)
        attempts = dict(context.invocation_metadata()).get("grpc-previous-rpc-attempts", "0")
        context.set_trailing_metadata((("tms-replica", self.address), ("tms-retries", attempts)))
        if self.status:
            context.abort(self.status, "this stub fails each call")
        return _ANSWER


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, stub: Stub) -> None:
        self._stub = stub

    def service(self, details: Any) -> Any:
        method = details.method.rpartition("/")[2]
        self._stub.counts[method] += 1
        if method == "Watch":
            return grpc.unary_stream_rpc_method_handler(self._stub.watch)
        run = self._stub.check if method == "Check" else self._stub.run
        return grpc.unary_unary_rpc_method_handler(run if method[:3] in ("Che", "Run") else lambda *_: b"")


_ANSWER = schemas.message("server", "server.Response")(data="1").SerializeToString()


def _health(status: str) -> bytes:
    answer = schemas.message("health", "grpc.health.v1.HealthCheckResponse")
    return bytes(answer(status=status).SerializeToString())


@contextmanager
def stubs(*each: Stub) -> Iterator[list[str]]:
    """The addresses of stubs, which end with the block."""
    try:
        yield [stub.address for stub in each]
    finally:
        for stub in each:
            stub.stop()


def wrong_health(
    health: str = "serving", status: grpc.StatusCode | None = None, seconds: float = 8, rate: float = RATE
) -> tuple[Outcome, Stub]:
    """What a client sees of three stubs, one of which has a wrong health, and this one."""
    odd = Stub(health, status)
    with stubs(odd, Stub(), Stub()) as known, ModelClient("stub", addresses=known) as client:
        return steady(client, seconds, rate=rate), odd


def far(loss: float = 0, delay_ms: float = 0, seconds: float = 8, rate: float = 10) -> Outcome:
    """A network loses this part of all packets, and takes so long for each, in both directions."""
    with network(loss, delay_ms) as there:
        command = {"command": [*there.enter, sys.executable, "server.py"]}
        servers: list[Server] = []
        try:
            servers.extend(start(host=THERE, more=command) for _ in range(3))
            with ModelClient("steady", addresses=[f"{THERE}:{server.port}" for server in servers]) as client:
                return steady(client, seconds, rate=rate)
        finally:
            for server in servers:
                server.kill()


STEPS_S = (3600, -3600, 0)
"""By how much the clock is wrong, one after the other."""


class Clock:
    """A wall clock that can be set, of the processes with the environment ``env``."""

    def __init__(self, folder: str | Path) -> None:
        """Compiles what is preloaded into them."""
        self._file, library = Path(folder) / "clock", Path(folder) / "clock.so"
        self._file.write_bytes(bytes(8))
        source = ROOT / "tests" / "clock.c"
        subprocess.run(["cc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source], check=True)
        self.env = {"LD_PRELOAD": str(library), "CLOCK_FILE": str(self._file)}

    @staticmethod
    def missing() -> str:
        """Why there can be no such clock here; "" if there can."""
        return "" if sys.platform == "linux" and which("cc") else "there is no C compiler, cc, or this is not Linux"

    def step(self, seconds: int) -> None:
        """Sets the clock so much off, at once."""
        with self._file.open("r+b") as file:
            file.write(seconds.to_bytes(8, sys.byteorder, signed=True))

    def steps(self, pause_s: float) -> None:
        """Makes all steps."""
        for seconds in STEPS_S:
            self.step(seconds)
            time.sleep(pause_s)


def clock_of_a_replica(seconds: float = 12, rate: float = RATE) -> tuple[Outcome, Server]:
    """The clock of one of three is stepped. Returns this replica, too, which has ended, and logged each call."""
    with TemporaryDirectory() as folder:
        clock = Clock(folder)
        servers: list[Server] = []
        try:
            servers.append(start(more=clock.env | {"TMS_ACCESS_LOG": 1}))
            servers.extend(start() for _ in range(2))
            with ModelClient("steady", addresses=addresses(servers)) as client:
                pause_s = (seconds - 2) / len(STEPS_S)
                return steady(client, seconds, lambda: clock.steps(pause_s), at_s=1, rate=rate), servers[0]
        finally:
            for server in servers:
                server.kill()


def clock_of_the_client(seconds: float = 12, rate: float = 20) -> Outcome:
    """The client, in a process of its own, sends texts while its clock is stepped."""
    with TemporaryDirectory() as folder, replicas({}, {}, {}) as servers:
        clock = Clock(folder)
        command = [sys.executable, str(ROOT / "tests" / "fleet_part.py"), "client"]
        command += [",".join(addresses(servers)), str(rate), "steady"]
        with subprocess.Popen(
            command, env=os.environ | clock.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout
            assert process.stdout.readline() == "ready 1\n"
            clock.steps(seconds / len(STEPS_S))
            seen = json.loads(process.communicate()[0])
        return Outcome(
            seen["times"], [Exception(failure) for failure in seen["failures"]], {"retries": seen["retries"]}
        )
