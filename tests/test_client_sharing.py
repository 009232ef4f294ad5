"""Clients of the same servers share connections; one that is closed ends its own calls only; idle ones cost nothing."""

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import model_client
from model_client import AsyncModelClient, ModelClient
from tests.conftest import Server, wait_for
from tests.test_faults import write_model
from tiny_model_server.client import channel

SLEEPS = """    workers = 4
    def run(self, data, args):
        import time
        open(data, "a").write("x")
        time.sleep(args["s"])
        return args["s"]"""


@pytest.fixture
def by_grpc(
    start_server: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Server]:
    """Starts servers whose connections are not renewed, for clients that do not use the local transport."""
    monkeypatch.setenv("TMS_LOCAL_TRANSPORT", "0")
    models = write_model(tmp_path / "models", "sleeps", SLEEPS)
    return lambda: start_server(models, TMS_MAX_CONNECTION_AGE_S=1000)


def connections(server: Server) -> int:
    """How many connections the server has at its gRPC port."""
    every = psutil.Process(server.process.pid).net_connections("tcp")
    return sum(one.status == "ESTABLISHED" and one.laddr.port == server.port for one in every)


def test_clients_of_the_same_servers_share_one_connection_to_each(by_grpc: Callable[[], Server]) -> None:
    servers = [by_grpc(), by_grpc()]
    clients = [ModelClient(addresses=[one.address for one in servers]) for _ in range(10)]
    for client in clients:
        assert client.list_models()
        assert client.submit_text_batch([]).exception()
    wait_for(lambda: [connections(one) for one in servers] == [1, 1], "one connection to each server")
    for client in clients[1:]:
        client.close()
    assert clients[0].list_models()
    assert [connections(one) for one in servers] == [1, 1]
    clients[0].close()
    wait_for(lambda: [connections(one) for one in servers] == [0, 0], "the end of the last client's connections")


def test_other_credentials_and_policies_are_not_shared(by_grpc: Callable[[], Server]) -> None:
    server = by_grpc()
    with server.client() as one, server.client(balancing="round_robin") as other:
        assert one.list_models() == other.list_models()
        assert connections(server) == 2


def test_asyncio_clients_share_one_connection(by_grpc: Callable[[], Server]) -> None:
    server = by_grpc()

    async def main() -> None:
        clients = [AsyncModelClient(addresses=server.address) for _ in range(10)]
        await asyncio.gather(*(client.list_models() for client in clients))
        assert connections(server) == 1
        for client in clients[1:]:
            await client.close()
        assert await clients[0].list_models()
        assert connections(server) == 1
        await clients[0].close()
        await asyncio.to_thread(wait_for, lambda: not connections(server), "the end of the connection")

    asyncio.run(main())


@pytest.mark.parametrize("way", ["blocking", "future", "stream"])
def test_a_client_that_is_closed_ends_its_own_calls_only(
    by_grpc: Callable[[], Server], tmp_path: Path, way: str
) -> None:
    server = by_grpc()
    leaving, staying = server.client("sleeps"), server.client("sleeps")
    staying.list_models()
    ended: dict[str, Any] = {}

    def calls(name: str, client: ModelClient, s: float) -> None:
        log = str(tmp_path / name)
        try:
            if way == "blocking":
                ended[name] = client.run_text(log, {"s": s})
            elif way == "future":
                ended[name] = client.submit_text(log, {"s": s}).result()
            else:
                (ended[name],) = client.run_stream(log, {"s": s})
        except model_client.ModelClientError as error:
            ended[name] = error

    threads = [
        threading.Thread(target=calls, args=("staying", staying, 1.5)),
        threading.Thread(target=calls, args=("leaving", leaving, 20)),
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: (tmp_path / "staying").exists() and (tmp_path / "leaving").exists(), "both calls to run")
    leaving.close()
    for thread in threads:
        thread.join(10)
    assert ended["staying"] == 1.5
    assert isinstance(ended["leaving"], model_client.Cancelled)
    assert leaving.list_models() == staying.list_models()
    leaving.close()
    staying.close()
    wait_for(lambda: not connections(server), "the end of the connections")


def test_an_idle_client_makes_no_traffic(by_grpc: Callable[[], Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection ends, and comes back with the next call."""
    monkeypatch.setattr(channel, "_IDLE_S", 1.0)
    server = by_grpc()
    with server.client("sleeps") as client:
        for _ in range(3):
            assert client.list_models()
            assert connections(server) == 1
            wait_for(lambda: not connections(server), "the idle client to disconnect", timeout=5)
        begun = time.monotonic()
        assert client.list_models()
        assert time.monotonic() - begun < 1
