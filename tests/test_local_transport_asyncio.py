"""The local transport from an event loop, which waits for nothing but answers there."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import model_client
from model_client import AsyncModelClient
from tests.conftest import Server, only
from tests.test_faults import write_model
from tiny_model_server.client import local
from tiny_model_server.client.calls import Request

IMAGE = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
MODEL = """    max_batch_size = 1
    def run(self, data, args):
        import time
        if log := args.get("log"):
            open(log, "a").write(data)
        time.sleep(args.get("s", 0))
        if args.get("raise"):
            raise ValueError("as intended")
        return data * args.get("times", 1)"""


@pytest.fixture
def sleeper(start_server: Callable[..., Server], tmp_path: Path) -> Server:
    """A server of a model that does what args say."""
    return start_server(write_model(tmp_path / "models", "sleeper", MODEL))


def idle_connections(client: AsyncModelClient) -> int:
    """Connections of the local transport that wait for the client's next calls."""
    connections = client._transport.locals
    return len(connections[0].idle.get(None, ())) if connections else 0


def local_calls(client: AsyncModelClient) -> int:
    """Connections that a call uses now."""
    return sum(len(one.busy) for one in client._transport.locals)


async def until(condition: Callable[[], Any]) -> None:
    """Waits for it, ten seconds at most."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def connected(server: Server, model: str, count: int = 1, **options: Any) -> Any:
    """A client that has so many connections; its first calls go by gRPC, while those are made."""
    async with AsyncModelClient(model, addresses=[server.address], **options) as client:
        async with asyncio.timeout(10):
            while idle_connections(client) < count:
                await asyncio.gather(*(client.run_text("x") for _ in range(4 * count)))
                await asyncio.sleep(0.01)
        yield client


async def taken(client: AsyncModelClient, call: Coroutine[Any, Any, Any]) -> Any:
    """The call's answer, which comes by the local transport."""
    calling = asyncio.ensure_future(call)
    await asyncio.sleep(0)
    assert local_calls(client) == 1
    return await calling


def test_answers_are_those_of_grpc(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[Any] = []  # of calls that gRPC makes
    inline = Request.inline
    monkeypatch.setattr(Request, "inline", lambda one: messages.append(one) or inline(one))

    async def main() -> None:
        async with connected(server, "echo") as client:
            messages.clear()
            assert await client.run_text("text") == "text"
            assert np.array_equal(await client.run_image(IMAGE), IMAGE)
            assert np.array_equal(await client.run_image_to_image(IMAGE), IMAGE)
            assert await client.run_text_batch(["a", "b"]) == ["a", "b"]
            frame = model_client.shared_array(IMAGE.shape)
            frame[:] = IMAGE
            before = len(messages)
            assert np.array_equal(await client.run_image(frame), IMAGE)  # by gRPC, while its connection is made
            await until(lambda: len(client._transport.locals[0].idle) == 2)
            assert np.array_equal(await client.run_image(frame), IMAGE)
            assert (before, len(messages)) == (0, 1)
            assert await client.run_text("x" * 100_000) == "x" * 100_000  # too long to be sent without waiting
            assert len(messages) == 2
            assert list(client.stats()["replicas"]) == [f"127.0.0.1:{server.port}"]

    asyncio.run(main())


def test_many_at_once_get_their_own_answers(start_server: Callable[..., Server]) -> None:
    server = start_server(only("echo"), TMS_THREADS=1024)  # a quarter of which one connection may use

    async def main() -> None:
        async with connected(server, "echo", 4) as client:
            images = [np.full((200, 200, 3), number, np.uint8) for number in range(250)]
            most = 0

            async def call(image: Any) -> None:
                nonlocal most
                calling = asyncio.ensure_future(client.run_image(image))
                await asyncio.sleep(0)
                most = max(most, local_calls(client))
                assert np.array_equal(await calling, image)

            for _ in range(3):
                await asyncio.gather(*map(call, images))
            assert 4 <= most <= 64
            numbers = [number async for number in client.map(range(300))]
            assert numbers == list(range(300))

    asyncio.run(main())


def test_the_event_loop_goes_on(sleeper: Server) -> None:
    async def main() -> None:
        async with connected(sleeper, "sleeper") as client:
            calling = asyncio.ensure_future(client.run_text("x", {"s": 0.5}))
            await asyncio.sleep(0)
            assert local_calls(client) == 1
            ticks = 0
            while not calling.done():
                await asyncio.sleep(0.01)
                ticks += 1
            assert ticks > 15
            assert await calling == "x"

    asyncio.run(main())


def test_long_answers_and_memory_that_a_model_keeps(
    sleeper: Server, start_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What takes several messages to come is waited for in a thread."""
    threads: list[Any] = []
    to_thread = asyncio.to_thread
    monkeypatch.setattr(asyncio, "to_thread", lambda *call: threads.append(call) or to_thread(*call))

    async def main() -> None:
        async with connected(sleeper, "sleeper") as client:
            threads.clear()
            for times in (100, 70_000, 3_000_000, 1):
                assert await taken(client, client.run_text("y", {"times": times})) == "y" * times
            assert len(threads) == 2
        async with connected(retaining, "keeps") as client:
            threads.clear()
            before: Any = "x"
            for number in range(5):
                image = np.full((300, 300, 3), number, np.uint8)
                assert np.array_equal(await taken(client, client.run_image(image)), before)
                before = image[:1]
            assert len(threads) == 5

    retaining = start_server(only("keeps"))
    asyncio.run(main())


def test_deadlines_and_failures(sleeper: Server) -> None:
    async def main() -> None:
        async with connected(sleeper, "sleeper") as client:
            started = time.monotonic()
            with pytest.raises(model_client.DeadlineExceeded):
                await taken(client, client.run_text("late", {"s": 0.8}, timeout=0.2))
            assert time.monotonic() - started < 0.5
        async with connected(sleeper, "sleeper") as client:
            with pytest.raises(model_client.ModelFailed, match="as intended") as failed:
                await taken(client, client.run_text("x", {"raise": True}))
            assert failed.value.replica.endswith(f":{sleeper.port}")
            with pytest.raises(model_client.InvalidInput, match="(no|not an) image file"):
                await taken(client, client.run_image(b"no image"))
            assert await taken(client, client.run_text("next")) == "next"

    asyncio.run(main())


def test_a_call_that_is_cancelled_is_not_run(sleeper: Server, tmp_path: Path) -> None:
    log = tmp_path / "ran"

    async def main() -> None:
        async with connected(sleeper, "sleeper", 2) as client:
            args = {"log": str(log), "s": 0.4}
            first = asyncio.ensure_future(client.run_text("1", args))
            await until(log.exists)
            second = asyncio.ensure_future(client.run_text("2", args))
            await asyncio.sleep(0)
            assert local_calls(client) == 2
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            assert await first == "1"
            assert await client.run_text("3", args) == "3"
            assert log.read_text() == "13"

    asyncio.run(main())


def test_closing_ends_what_is_under_way(sleeper: Server) -> None:
    async def main() -> None:
        async with connected(sleeper, "sleeper") as client:
            calling = asyncio.ensure_future(client.run_text("x", {"s": 2}))
            await asyncio.sleep(0)
            assert local_calls(client) == 1
            started = time.monotonic()
        with pytest.raises(model_client.Cancelled):
            await calling
        assert time.monotonic() - started < 1
        assert await client.run_text("again") == "again"
        await client.close()

    asyncio.run(main())


def test_a_server_that_comes_back(start_server: Callable[..., Server]) -> None:
    server = start_server()

    async def main() -> None:
        async with connected(server, "echo", timeout=20) as client:
            server.kill()
            starting = asyncio.ensure_future(asyncio.to_thread(start_server, TMS_PORT=server.port))
            assert np.array_equal(await client.run_image(IMAGE), IMAGE)
            await starting
            async with asyncio.timeout(10):
                while not idle_connections(client):
                    assert await client.run_text("y") == "y"
                    await asyncio.sleep(0.05)

    asyncio.run(main())


def test_each_event_loop_has_connections_of_its_own(server: Server) -> None:
    client = AsyncModelClient("echo", addresses=[server.address])

    async def main() -> None:
        await client.run_text("x")  # at the second loop, the connections of the first are let go
        async with asyncio.timeout(10):
            while not idle_connections(client):
                assert await client.run_text("x") == "x"
                await asyncio.sleep(0.01)
        assert np.array_equal(await client.run_image(IMAGE), IMAGE)

    for _ in range(3):
        asyncio.run(main())
        assert idle_connections(client) >= 1


def test_a_server_without_it_costs_nothing(
    start_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No connection is tried for each call."""
    server = start_server(TMS_LOCAL_TRANSPORT=0)
    attempts: list[Any] = []

    async def main() -> None:
        async with AsyncModelClient("echo", addresses=[server.address]) as client:
            await client.run_text("x")
            await until(lambda: client._transport.locals[0].not_before)
            client._transport.locals[0].not_before += 60  # type: ignore[union-attr]
            monkeypatch.setattr(local, "LocalConnection", lambda *args: attempts.append(args))
            for _ in range(20):
                assert await client.run_text("x") == "x"
            assert not attempts
            assert idle_connections(client) == 0

    asyncio.run(main())
