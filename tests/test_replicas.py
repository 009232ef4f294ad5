"""Several replicas by one command: spread, replaced, stopped together, with one health and one page of metrics."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from model_client import AsyncModelClient, ModelClient
from tests.conftest import MODELS, ROOT, Server, only, wait_for
from tests.test_cli import run as run_command
from tests.test_security import Certificates, tls
from tiny_model_server.client import siblings
from tiny_model_server.server.siblings import labelled

StartServer = Callable[..., Server]


def start(start_server: StartServer, count: int = 2, **env: object) -> Server:
    """A supervisor with ``count`` replicas that are ready; ``port`` and ``http_port`` are those of the first."""
    server = start_server(**{"TMS_REPLICAS": count, **env})
    ports = server.wait_for_log(r"replicas: gRPC on ports (\d+) to \d+(?:, HTTP on ports (\d+))?")
    server.port, server.http_port = int(ports[1]), int(ports[2] or 0)
    server.address = f"127.0.0.1:{server.port}"
    wait_for(lambda: len([line for line in server.log if "serving" in line]) >= count, "every replica", timeout=60)
    return server


@pytest.fixture(scope="module")
def three() -> Iterator[Server]:
    """Three replicas, for tests that leave them as they were."""
    server = start(Server, 3)
    yield server
    server.kill()


def get(server: Server, path: str, replica: int = 1) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port + replica - 1}{path}", timeout=10) as answer:
        return str(answer.read().decode())


def ready(server: Server) -> Any:
    """What /readyz answers, also with 503."""
    try:
        return json.loads(get(server, "/readyz"))
    except urllib.error.HTTPError as error:
        return json.loads(error.read())


def pids(server: Server) -> dict[int, int]:
    """The process of each replica that listens, by its gRPC port: the last one that the log names."""
    lines = (re.search(r"listening: gRPC on \S+:(\d+),.* pid (\d+)", line) for line in list(server.log))
    return {int(found[1]): int(found[2]) for found in lines if found}


def exists(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@contextmanager
def load(client: ModelClient, callers: int = 4) -> Iterator[list[BaseException]]:
    """Calls without a pause, by several threads, while the block runs; their failures."""
    failures: list[BaseException] = []
    ended = threading.Event()

    def call() -> None:
        while not ended.is_set():
            try:
                client.run_text("x", {"sleep": 0.01})
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    try:
        yield failures
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def counts(client: ModelClient | AsyncModelClient) -> dict[int, int]:
    """How many calls each replica has answered, by its port."""
    return {int(name.rpartition(":")[2]): one["calls"] for name, one in client.stats()["replicas"].items()}


@pytest.mark.parametrize("local", ["0", "1"])
def test_calls_from_the_first_address_reach_all(three: Server, local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMS_LOCAL_TRANSPORT", local)
    with three.client("echo") as client:
        ports = {three.port, three.port + 1, three.port + 2}
        for _ in range(600):  # shares follow the load that replicas report: they are equal in the long run only
            client.run_text("x")
            found = counts(client)
            if set(found) == ports and min(found.values()) >= 10:
                break
        assert set(found) == ports
        assert min(found.values()) >= 10
        addresses = [f"127.0.0.1:{port}" for port in sorted(found)]
        assert client.health_check() == {"serving": addresses, "stopped_serving": []}
        assert len({one["worker_pids"][0] for one in client.model_info()}) == 3


def test_from_any_other_port_too_and_by_name(three: Server) -> None:
    with ModelClient("echo", addresses=[f"localhost:{three.port + 1}"]) as client:
        for _ in range(30):
            client.run_text("x")
        assert set(counts(client)) == {three.port, three.port + 1, three.port + 2}


@pytest.mark.parametrize("local", ["0", "1"])
def test_asyncio(three: Server, local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMS_LOCAL_TRANSPORT", local)

    async def main() -> None:
        async with AsyncModelClient("echo", addresses=[three.address]) as client:
            for _ in range(60):
                await client.run_text("x")
            assert set(counts(client)) == {three.port, three.port + 1, three.port + 2}

    asyncio.run(main())


class Forward:
    """A port that leads to another one, as a tunnel or a container's published port does."""

    def __init__(self, to: int) -> None:
        self._to = to
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            far = socket.create_connection(("127.0.0.1", self._to))
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=pair, daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def test_what_else_listens_beside_a_forwarded_port_is_not_called(three: Server, start_server: StartServer) -> None:
    forward = Forward(three.port)
    stranger = start_server(TMS_PORT=forward.port + 1, TMS_HTTP_PORT="off")
    with ModelClient("echo", addresses=[f"127.0.0.1:{forward.port}"]) as client:
        for _ in range(30):
            client.run_text("x")
        assert set(counts(client)) == {three.port}
        assert client.health_check() == {"serving": client.addresses, "stopped_serving": []}
    assert stranger.stop() == 0


@pytest.mark.parametrize(
    ("name", "ports"),
    [
        ("", ""),
        ("host", "1-2"),
        ("host:1", "1"),
        ("host:1", "2-3"),
        ("host:3", "4-2"),
        ("h:1", "1-65535"),
        ("h:x", "1-2"),
    ],
)
def test_nonsense_of_a_server_is_not_followed(name: str, ports: str) -> None:
    assert siblings.replica([("tms-replica", name), ("tms-ports", ports)]) is None


def test_metrics_of_a_stranger_are_shown_as_far_as_they_are_text() -> None:
    """Another process may have taken the port of a replica that died."""
    shown = labelled({1: b"# HELP a b\na{} 1\n", 2: b"\xeb{} 1\n"})
    assert shown.decode() == '# HELP a b\na{replica="1",} 1\n'


def test_ports_that_are_mapped_in_order() -> None:
    one = siblings.replica([("tms-replica", "models:50001"), ("tms-ports", "50000-50002")])
    assert one == ("models", 50001, 50000, 50002)
    found = siblings.siblings("[::1]:7001", one)
    assert {address: other.port for address, other in found.items()} == {"[::1]:7000": 50000, "[::1]:7002": 50002}


def test_one_health(three: Server) -> None:
    assert ready(three) == {"ready": True, "replicas": {"1": True, "2": True, "3": True}}
    assert json.loads(get(three, "/readyz?own", 2)) == {"ready": True}


def test_one_page_of_metrics(three: Server) -> None:
    with three.client("worker") as client:
        for _ in range(30):
            client.run_text("x")
        expected = {str(port - three.port + 1): calls for port, calls in counts(client).items()}
    families = {family.name: family for family in text_string_to_metric_families(get(three, "/metrics", 2))}
    found = {
        one.labels["replica"]: one.value
        for one in families["tms_requests"].samples
        if (one.labels["model"], one.labels["status"]) == ("worker", "OK")
    }
    assert found == expected
    assert sum(found.values()) == 30
    assert sum(one.value for one in families["tms_model_items"].samples if one.name.endswith("_total")) == 30
    own = get(three, "/metrics?own", 2)
    assert "replica=" not in own
    assert {f"tms_{name}" for name in ("requests", "queue_seconds", "workers")} <= families.keys()


@pytest.mark.parametrize("local", ["0", "1"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_replica_is_replaced_and_no_call_fails(
    start_server: StartServer, victim: int, local: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMS_LOCAL_TRANSPORT", local)
    server = start(start_server)
    with server.client("worker") as client:
        client.run_text("x")
        workers = client.model_info()[victim]["worker_pids"]
        with load(client) as failures:
            wait_for(lambda: len(counts(client)) == 2, "calls of both")
            port = server.port + victim
            killed = pids(server)[port]
            os.kill(killed, signal.SIGKILL)
            wait_for(lambda: pids(server)[port] != killed, "another process")
            before = counts(client)[port]
            wait_for(lambda: counts(client)[port] > before + 10, "calls of the new one", timeout=30)
        assert failures == []
    assert not any(map(exists, workers))
    assert wait_for(lambda: ready(server)["ready"], "health")
    assert any("replica" in line and "killed by SIGKILL" in line for line in server.log)
    assert server.stop() == 0


def test_one_that_was_missing_at_first_is_found(start_server: StartServer) -> None:
    server = start(start_server)
    second = pids(server)[server.port + 1]
    os.kill(second, signal.SIGKILL)
    with server.client("echo") as client:
        client.run_text("x")
        assert not ready(server)["ready"] or pids(server)[server.port + 1] != second
        wait_for(lambda: client.run_text("x") and len(counts(client)) == 2, "the second replica", timeout=40)


@pytest.mark.parametrize("everyone", [False, True], ids=["the supervisor", "every process, as systemd does"])
def test_sigterm_loses_no_accepted_call(start_server: StartServer, everyone: bool) -> None:
    server = start(start_server, TMS_MODEL_WORKER_CONCURRENCY=16, TMS_MODEL_WORKER_MAX_BATCH_SIZE=1)
    with server.client("worker") as client:
        client.run_text("x")
        calls = [client.submit_text("x", {"sleep": 2}) for _ in range(16)]
        wait_for(lambda: in_flight(server) == len(calls), "all calls")
        for pid in [server.process.pid, *(pids(server).values() if everyone else ())]:
            os.kill(pid, signal.SIGTERM)
        assert {call.result(timeout=20)["item"] for call in calls} == {"x"}
        assert len(counts(client)) == 2
    assert server.process.wait(20) == 0


def in_flight(server: Server) -> float:
    families = {family.name: family for family in text_string_to_metric_families(get(server, "/metrics"))}
    return sum(one.value for one in families["tms_in_flight"].samples)


def test_a_second_signal_hurries(start_server: StartServer) -> None:
    server = start(start_server)
    with server.client("worker") as client:
        client.run_text("x")
        call = client.submit_text("x", {"sleep": 50}, timeout=8)
        wait_for(lambda: in_flight(server) == 1, "the call")
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log("stopping")
        begun = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(20) == 0
        assert time.monotonic() - begun < 10
        assert call.exception(timeout=60)


def test_a_frozen_replica_does_not_prevent_the_stop(start_server: StartServer) -> None:
    server = start(start_server, TMS_DRAIN_DELAY_S=0, TMS_GRACE_S=0, TMS_MODELS_DIR=only("echo"))
    processes = pids(server).values()
    os.kill(pids(server)[server.port], signal.SIGSTOP)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 1
    assert not any(map(exists, processes))


def test_stop_server_at_one_port_stops_all(start_server: StartServer) -> None:
    server = start(start_server)
    with grpc.insecure_channel(f"127.0.0.1:{server.port + 1}") as channel:
        channel.unary_unary("/server.Server/StopServer")(b"", timeout=10)
    assert server.process.wait(20) == 0


def test_the_supervisors_death_ends_all(start_server: StartServer) -> None:
    server = start(start_server, TMS_MODELS_DIR=only("worker"))
    with server.client("worker") as client:
        client.run_text("x")
        wait_for(lambda: client.run_text("x") and len(counts(client)) == 2, "both")
        workers = [pid for one in client.model_info() for pid in one["worker_pids"]]
    processes = [*pids(server).values(), *workers]
    assert len(processes) == 4
    server.process.kill()
    wait_for(lambda: not any(map(exists, processes)), "the end of every process", timeout=5)


def test_workers_and_gpus_are_divided(start_server: StartServer) -> None:
    env = {"CUDA_VISIBLE_DEVICES": "a,b,c,d", "TMS_MODEL_WORKER_WORKERS": 3, "TMS_MODELS_DIR": only("worker")}
    server = start(start_server, **env)
    with server.client("worker") as client:
        assert [len(one["worker_pids"]) for one in client.model_info()] == [2, 1]
        found: dict[int, str] = {}
        with load(client):
            wait_for(lambda: found.update(pair(client)) or len(found) == 3, "all workers")
        assert sorted(found.values()) == ["a", "b", "c"]


def pair(client: ModelClient) -> dict[int, str]:
    """The process of the worker that answers, and its GPU."""
    answer = client.run_text("x")
    return {answer["pid"]: answer["env"]["CUDA_VISIBLE_DEVICES"]}


def test_each_keeps_to_a_core_of_its_own(three: Server) -> None:
    cores = [os.sched_getaffinity(pid) for _, pid in sorted(pids(three).items())]
    assert [len(one) for one in cores] == [1, 1, 1]
    assert len({frozenset(one) for one in cores}) == min(3, len(os.sched_getaffinity(0)))


def test_the_supervisor_is_small(three: Server) -> None:
    """It serves nothing, so it has none of the libraries that serve, and no threads."""
    status = Path(f"/proc/{three.process.pid}/status").read_text()
    assert "Threads:\t1\n" in status
    mapped = Path(f"/proc/{three.process.pid}/maps").read_text()
    assert "grpc" not in mapped
    assert "numpy" not in mapped


def test_a_fork_after_the_first_call(three: Server) -> None:
    code = (
        "import os, sys\nfrom model_client import ModelClient\n"
        "client = ModelClient('echo', addresses=[sys.argv[1]])\nclient.run_text('x')\n"
        "child = os.fork()\n"
        "for _ in range(9):\n    assert client.run_text('y') == 'y'\n"
        "assert len(client.stats()['replicas']) == 3\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 0)"
    )
    subprocess.run([sys.executable, "-c", code, three.address], cwd=ROOT, check=True, timeout=60)


def test_tls_with_clients_certificates(start_server: StartServer, tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    issued = certificates.issue("server", "models.test", "localhost")
    env = tls(issued, TMS_TLS_CLIENT_CA=certificates.ca)
    server = start(start_server, **env)
    options = {"ca": certificates.ca, **certificates.issue("client", "client.test")}
    with ModelClient("echo", addresses=[f"localhost:{server.port}"], **options) as client:
        for _ in range(20):
            client.run_text("x")
        assert len(counts(client)) == 2
        assert len(client.health_check()["serving"]) == 2
    own = ["--cacert", certificates.ca, "--cert", options["cert"], "--key", options["key"]]
    asked = ["curl", "-s", *map(str, own), f"https://localhost:{server.http_port}/readyz"]
    answer = subprocess.run(asked, capture_output=True, check=True, text=True).stdout
    assert json.loads(answer) == {"ready": True, "replicas": {"1": True, "2": True}}


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"TMS_TLS_CERT": "/no/such/file", "TMS_TLS_KEY": "/no/such/file"}, "TMS_TLS_CERT.* cannot be used"),
        ({"TMS_SOCKET": "/tmp/one.sock"}, "TMS_SOCKET is one path, and TMS_REPLICAS=2"),
        ({"TMS_REPLICAS": "0"}, "TMS_REPLICAS='0' must be a whole number from 1 to 256"),
        ({"TMS_REPLICA": "3"}, "TMS_REPLICA=3 must be at most TMS_REPLICAS=2"),
        ({"TMS_PORT": "65535"}, "65536"),
        ({"TMS_STRICT": "1", "TMS_MODEL_WORKER_ARGS": '{"wrong": 1}'}, "TMS_STRICT=1: stopping"),
    ],
)
def test_what_prevents_a_start_ends_it(env: dict[str, str], message: str) -> None:
    done = run_command(**({"TMS_REPLICAS": "2", "TMS_PORT": "0", "TMS_MODELS_DIR": str(only("worker"))} | env))
    assert done.returncode == (1 if "TMS_STRICT" in env else 2)
    assert re.search(message, done.stderr), done.stderr


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("0.0.0.0", 0)) as other:
        port = other.getsockname()[1]
        done = run_command(TMS_REPLICAS="2", TMS_PORT=str(port - 1), TMS_HTTP_PORT="off")
    assert done.returncode == 2
    assert f"TMS_PORT={port} cannot be listened on" in done.stderr


def test_the_other_commands(three: Server) -> None:
    common = {"TMS_REPLICAS": "3", "TMS_HOST": "127.0.0.1", "TMS_PORT": str(three.port)}
    checked = run_command("check", "echo", **common, TMS_MODELS_DIR=str(MODELS))
    assert "READY" in checked.stdout
    assert run_command("list", **common, TMS_MODELS_DIR=str(only("echo"))).stdout.startswith("echo\t")
    assert run_command("health", **common).returncode == 0
    more = run_command("health", **common | {"TMS_REPLICAS": "4"})
    assert more.returncode == 1
    assert f"not ready by gRPC at 127.0.0.1:{three.port + 3}" in more.stderr


def test_a_model_that_failed_in_one_replica_is_answered_by_the_other(start_server: StartServer, tmp_path: Path) -> None:
    (tmp_path / "once").mkdir()
    (tmp_path / "once" / "__init__.py").write_text(
        "from pathlib import Path\n"
        "from model_interface import ModelInterface\n"
        "class Model(ModelInterface):\n"
        "    def __init__(self):\n"
        "        Path(__file__).with_name('taken').touch(exist_ok=False)\n"
        "    def run(self, data, args):\n"
        "        return len(data)\n"
    )
    server = start(start_server, TMS_MODELS_DIR=tmp_path)

    async def by_asyncio() -> list[object]:
        async with AsyncModelClient("once", addresses=[server.address]) as client:
            await client.health_check()
            return [await client.run_text("x") for _ in range(9)]

    with ModelClient("once", addresses=[server.address]) as client:
        client.health_check()  # it finds the other replica, for which a first call waits half a second only
        assert [client.run_text("x") for _ in range(9)] == [1] * 9
    assert asyncio.run(by_asyncio()) == [1] * 9
