"""What runs in the processes that ``fleet.py`` starts: stub replicas, idle connections, callers, clients.

It imports little, so that dozens of them start soon. Each prints one line for what it sees, with ``time.monotonic``,
which all processes of a machine share.
"""

import json
import os
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model_client import ModelClient, ModelClientError  # noqa: E402
from tiny_model_server import schemas  # noqa: E402
from tiny_model_server.client import calls, channel  # noqa: E402
from tiny_model_server.client.credentials import Credentials  # noqa: E402
from tiny_model_server.server.health import Health  # noqa: E402

STUB_MS = 10
DRAIN_S = 1.0
_WINDOW_S = 3
_CAPACITY = 16 * 1000 / STUB_MS  # calls a second
_STUB_OPTIONS = (  # those of grpc_server.py that a client notices
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
)


def say(*words: object) -> None:
    """Prints a line, whole even if several threads do."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


class CountedHealth(Health):
    """Prints each new connection: the client watches health once in each."""

    def __init__(self, host: str) -> None:
        super().__init__()
        self._host = host
        self.set({"": True, channel.LIVE_SERVICE: True})

    def _watch(self, call: Any, request: bytes | None) -> None:
        super()._watch(call, request)
        say("connected", self._host, time.monotonic())


class Stub:
    """A replica without models: health, and RunText, which takes STUB_MS and reports a load as the server does."""

    def __init__(self, host: str, port: int, age_s: float) -> None:
        self._host, self._lock, self._calls = host, threading.Lock(), Counter[int]()
        self._answer = schemas.message("server", "server.Response")(data="1").SerializeToString()
        self._report = schemas.message("orca", "xds.data.orca.v3.OrcaLoadReport")
        self._health = CountedHealth(host)
        options = [*_STUB_OPTIONS, ("grpc.max_connection_age_ms", int(age_s * 1000))]
        self._server = grpc.server(ThreadPoolExecutor(32), options=options)
        handler = grpc.unary_unary_rpc_method_handler(self._run_text)
        self._server.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler("server.Server", {"RunText": handler}),
                self._health.generic_handler(),
            ]
        )
        self._server.add_insecure_port(f"{host}:{port}")
        self._server.start()
        say("up", host)

    def stop(self) -> None:
        """As the server stops: reports that it does not serve, waits, and ends when its calls have ended."""
        self._health.shut_down()
        time.sleep(DRAIN_S)
        stopped = self._server.stop(5)
        self._health.end_watches()
        stopped.wait()
        say("down", self._host)

    def _run_text(self, data: bytes, context: Any) -> bytes:
        time.sleep(STUB_MS / 1000)
        rps = self._count(int(time.monotonic())) / _WINDOW_S
        report = self._report(rps_fractional=rps, application_utilization=rps / _CAPACITY).SerializeToString()
        attempts = dict(context.invocation_metadata()).get("grpc-previous-rpc-attempts", "0")
        context.set_trailing_metadata(
            (("tms-replica", self._host), ("tms-retries", attempts), ("endpoint-load-metrics-bin", report))
        )
        return self._answer

    def _count(self, second: int) -> int:
        """Counts a call; returns how many the last seconds had. Prints the calls of each second when it has passed."""
        with self._lock:
            if second not in self._calls and self._calls:
                last = max(self._calls)
                say("calls", self._host, last, self._calls[last])
            self._calls[second] += 1
            return sum(self._calls[second - ago] for ago in range(_WINDOW_S))


def stubs(port: str, age_s: str) -> None:
    """Starts and stops stubs as the lines of standard input say."""
    running: dict[str, Stub] = {}
    for line in sys.stdin:
        verb, host = line.split()
        if verb == "start":
            running[host] = Stub(host, int(port), float(age_s))
        else:
            threading.Thread(target=running.pop(host).stop).start()


def opened(count: int, address: str, ca: str) -> list[channel.SharedChannel]:
    """So many connections with the client's options, each by a channel of its own."""
    credentials = Credentials(tls=bool(ca), ca=ca).read()
    channels = [channel.SharedChannel(channel.ChannelKey(f"ipv4:{address}", credentials)) for _ in range(count)]
    for one in channels:
        one.health_check()(timeout=60, wait_for_ready=True)
    return channels


def idle(count: str, address: str, keep: str, ca: str = "") -> None:
    """Holds connections without calls. With ``keep`` 1, they are not closed after 10 s as those of a client are."""
    if keep == "1":
        channel._IDLE_S = 1e6
    held = opened(int(count), address, ca)
    say("ready", len(held))
    sys.stdin.read()
    os._exit(0)  # closing all channels would take long


def callers(count: str, address: str, seconds: str, ca: str = "") -> None:
    """Calls from so many threads with a connection each, one call after the other; prints how long each took."""
    request = calls.text("RunText", "echo", "x", None)
    stubs = [one.stub(request.method, True) for one in opened(int(count), address, ca)]
    say("ready", count)
    sys.stdin.readline()
    times: list[float] = []
    end = time.monotonic() + float(seconds)

    def caller(stub: Any) -> None:
        while (begun := time.monotonic()) < end:
            stub(request, timeout=60)
            times.append(round(time.monotonic() - begun, 6))

    threads = [threading.Thread(target=caller, args=(stub,)) for stub in stubs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    say(json.dumps({"times": times}))
    os._exit(0)


def client(addresses: str, rate: str, name: str = "stub") -> None:
    """Calls at a rate through ModelClient until standard input is closed; prints times and failures."""
    times, failures = [], []
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    with ModelClient(name, addresses=addresses) as model:
        model.run_text("x")
        say("ready", 1)
        while not over.wait(1 / float(rate)):
            begun = time.monotonic()
            try:
                model.run_text("x")
            except ModelClientError as error:
                failures.append(str(error))
            times.append(round(time.monotonic() - begun, 6))
        retries = model.stats()["retries"]
    say(json.dumps({"times": times, "failures": failures, "retries": retries}))


if __name__ == "__main__":
    {"stubs": stubs, "idle": idle, "callers": callers, "client": client}[sys.argv[1]](*sys.argv[2:])
