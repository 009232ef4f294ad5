"""The ways to call: futures, asyncio, map, retries or none; and what a client is after a fork or a pickle."""

import asyncio
import logging
import multiprocessing
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import model_client
from model_client import AsyncModelClient, ModelClient
from tests.conftest import ROOT, Server, wait_for
from tests.test_faults import write_model
from tiny_model_server import schemas

IMAGE = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)


def test_images_by_grpc_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread writes its messages over the one before, but not over one that is still being sent."""
    monkeypatch.setenv("TMS_LOCAL_TRANSPORT", "0")
    images = [np.full((size, size, 3), size % 251, np.uint8) for size in (200, 700, 201, 699, 90, 1000, 202, 203)]
    with server.client("echo") as client:
        futures = [client.submit_image(image) for image in images * 3]
        for image, future in zip(images * 3, futures, strict=True):
            assert np.array_equal(future.result(timeout=30), image)
        with ThreadPoolExecutor(4) as threads:
            for image, answer in zip(images * 3, threads.map(client.run_image, images * 3), strict=True):
                assert np.array_equal(answer, image)


def test_futures(server: Server) -> None:
    with server.client("echo") as client:
        futures = [
            client.submit_image(IMAGE),
            client.submit_image_batch([IMAGE, IMAGE]),
            client.submit_text("a", {"n": 1}),
            client.submit_text_batch(["a", "b"]),
            client.submit({"x": IMAGE}),
            client.submit_batch([1, None]),
            client.submit_image_to_image(IMAGE),
        ]
        image, images, text, texts, value, values, made = [future.result(timeout=20) for future in futures]
        assert np.array_equal(image, IMAGE)
        assert np.array_equal(made, IMAGE)
        assert [np.array_equal(one, IMAGE) for one in images] == [True, True]
        assert text == {"data": "a", "args": {"n": 1}}
        assert texts == ["a", "b"]
        assert np.array_equal(value["x"], IMAGE)
        assert values == [1, None]
        with pytest.raises(TypeError, match="args must be a dict"):
            client.submit_text("a", 7)  # type: ignore[arg-type]


def test_futures_fail_and_are_cancelled(server: Server, start_server: Callable[..., Server], tmp_path: Path) -> None:
    with server.client("nobody") as client:
        assert isinstance(client.submit_text("x").exception(timeout=20), model_client.ModelNotFound)
    nowhere = ModelClient("echo", addresses=["127.0.0.1:1"], connect_timeout=0.3)
    begun = time.monotonic()
    future = nowhere.submit_text("x")
    assert time.monotonic() - begun < 0.2  # who submits never waits
    with pytest.raises(model_client.ServerUnavailable, match="was not ready within 0.3 s.*refused"):
        future.result(timeout=20)
    log = tmp_path / "ran"
    body = f"    def run(self, data, args):\n        open({str(log)!r}, 'a').write(data); __import__('time').sleep(.5)"
    slow = start_server(write_model(tmp_path / "models", "slow", body))
    with slow.client("slow") as client:
        first = client.submit_text("1")
        wait_for(log.exists, "the first to run")
        second = client.submit_text("2")
        assert second.cancel()
        assert first.result(timeout=20) is None
        assert client.run_text("3") is None
        assert log.read_text() == "13"
        closed = client.submit_text("4")
        time.sleep(0.05)
        client.close()
        with pytest.raises(model_client.Cancelled):
            closed.result(timeout=20)


def test_map_keeps_the_order_and_its_bound(start_server: Callable[..., Server], tmp_path: Path) -> None:
    body = (
        "    workers = 4\n    def run(self, data, args):\n"
        "        __import__('time').sleep(.02 * (data % 3))\n        assert data != 13, 'unlucky'\n        return data"
    )
    server = start_server(write_model(tmp_path, "sleepy", body))
    taken, given = 0, 0
    widest = 0

    def items(count: int) -> Iterator[int]:
        nonlocal taken, widest
        for number in range(count):
            taken += 1
            widest = max(widest, taken - given)
            yield number

    with server.client("sleepy") as client:
        for expected, answer in enumerate(client.map(items(12), in_flight=6)):
            assert answer == expected
            given += 1
        assert given == 12
        assert 2 <= widest <= 7
        answers = list(client.map(items(20), return_exceptions=True))
        assert [a for a in answers if isinstance(a, int)] == [n for n in range(20) if n != 13]
        assert isinstance(answers[13], model_client.ModelFailed)
        seen = []
        with pytest.raises(model_client.ModelFailed, match="unlucky"):
            seen.extend(client.map(items(20)))
        leaving = client.map(items(1000), in_flight=4)
        assert [next(leaving), next(leaving)] == [0, 1]
        leaving.close()
        with pytest.raises(ValueError, match="at least 1"):
            next(client.map([1], in_flight=0))


def test_map_calls_by_the_kind_of_the_item(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    with server.client("echo") as client:
        text, image, value = client.map(["a", IMAGE, {"n": 1}], progress=True)
        assert text == "a"
        assert np.array_equal(image, IMAGE)
        assert value == {"n": 1}
        (row,) = client.map([np.arange(3.0)])
        assert row.tolist() == [0, 1, 2]
        (made,) = client.map([IMAGE], method="run_image_to_image")
        assert np.array_equal(made, IMAGE)
    assert "3/3" in capfd.readouterr().err


def test_progress_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    for kind in (ModelClient, AsyncModelClient):
        with pytest.raises(ImportError, match=r"pip install 'tiny-model-server\[progress\]'"):
            kind("m", "localhost:1").map(["a"], progress=True)


def test_asyncio(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        async with AsyncModelClient("echo", addresses=[server.address]) as client:
            many = await asyncio.gather(*(client.run(number) for number in range(100)))
            assert many == list(range(100))
            assert np.array_equal(await client.run_image(IMAGE), IMAGE)
            assert np.array_equal(await client.run_image_to_image(IMAGE), IMAGE)
            assert await client.run_text_batch(["a", "b"]) == ["a", "b"]
            assert await client.get_input_shape() is None
            assert {"name": "echo", "state": "READY", "reason": ""} in await client.list_models()
            assert await client.health_check() == {"serving": [server.address], "stopped_serving": []}
            assert (await client.model_info())[0]["state"] == "READY"
            assert [answer async for answer in client.map(range(30), in_flight=3)] == list(range(30))

            async def frames() -> AsyncIterator[str]:
                for text in "ab":
                    yield text

            assert [answer async for answer in client.map(frames())] == ["a", "b"]
            assert [answer async for answer in client.map(frames(), progress=True)] == ["a", "b"]
            assert [answer async for answer in client.map("xyz".split("y"), progress=True)] == ["x", "z"]
            assert client.stats()["calls"] > 130
        async with AsyncModelClient("tokens", addresses=[server.address]) as client:
            assert repr([token async for token in client.run_stream(3)]) == repr(with_blocking_client)
        async with AsyncModelClient("nobody", addresses=[server.address]) as client:
            with pytest.raises(model_client.ModelNotFound, match="nobody"):
                await client.run_text("x")
            failed = [e async for e in client.map(["x"], return_exceptions=True)]
            assert isinstance(failed[0], model_client.ModelNotFound)
        nowhere = AsyncModelClient("echo", addresses=["127.0.0.1:1"], connect_timeout=0.3)
        with pytest.raises(model_client.ServerUnavailable, match="was not ready within 0.3 s"):
            await nowhere.run_text("x")

    with server.client("tokens") as blocking:
        with_blocking_client = list(blocking.run_stream(3))
    assert len(with_blocking_client) == 3
    asyncio.run(main())
    shown = capfd.readouterr().err
    assert "echo: 2item" in shown  # of how many is not known
    assert "2/2" in shown


def test_one_async_client_in_two_event_loops(server: Server) -> None:
    client = AsyncModelClient("echo", addresses=[server.address])
    assert asyncio.run(client.run(1)) == 1
    assert asyncio.run(client.run(2)) == 2


def test_an_async_call_can_be_cancelled(start_server: Callable[..., Server], tmp_path: Path) -> None:
    log = tmp_path / "ran"
    body = f"    def run(self, data, args):\n        open({str(log)!r}, 'a').write(data); __import__('time').sleep(.4)"
    server = start_server(write_model(tmp_path / "models", "slow", body))

    async def main() -> None:
        async with AsyncModelClient("slow", addresses=[server.address]) as client:
            first = asyncio.create_task(client.run_text("1"))
            await asyncio.to_thread(wait_for, log.exists, "the first to run")
            second = asyncio.create_task(client.run_text("2"))
            await asyncio.sleep(0.1)
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            await first
            await client.run_text("3")
            assert log.read_text() == "13"
            last = asyncio.create_task(client.run_text("4"))
            await asyncio.sleep(0.1)
        with pytest.raises(model_client.Cancelled):
            await last

    asyncio.run(main())


class Flaky:
    """A server of the contract that answers UNAVAILABLE while it is set to, and counts the attempts.

    It sends any bytes as its answers, and any trailing metadata.
    """

    def __init__(self) -> None:
        self.attempts = 0
        self.down = False
        self.pushback = ""
        self.metadata: dict[str, Any] = {}
        self.answer = b'\x0a\x04"ok"'  # Response.data = '"ok"'
        self.trailing: tuple[tuple[str, str], ...] = ()
        self._server = grpc.server(ThreadPoolExecutor(8))
        handler = grpc.unary_unary_rpc_method_handler(self._answer)
        stream = grpc.unary_stream_rpc_method_handler(lambda request, context: iter([self.answer]))
        table = {"RunText": handler, "RunStream": stream}
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("server.Server", table)])
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _answer(self, request: bytes, context: Any) -> bytes:
        self.attempts += 1
        self.metadata = dict(context.invocation_metadata())
        if self.down:
            if self.pushback:
                context.set_trailing_metadata((("grpc-retry-pushback-ms", self.pushback),))
            context.abort(grpc.StatusCode.UNAVAILABLE, "down")
        context.set_trailing_metadata(self.trailing)
        return self.answer

    def stop(self) -> None:
        self._server.stop(0)


@pytest.fixture
def flaky() -> Iterator[Flaky]:
    server = Flaky()
    yield server
    server.stop()


@pytest.mark.parametrize("data", ["", "{", '{"$array": 0}', '{"$float": "x"}', "9" * 5000], ids=range(5))
def test_an_answer_that_cannot_be_read(flaky: Flaky, data: str) -> None:
    flaky.answer = schemas.message("server", "server.Response")(data=data).SerializeToString()
    unreadable = partial(pytest.raises, model_client.ModelFailed, match="server's answer cannot be read")

    async def asynchronously() -> None:
        async with AsyncModelClient("x", addresses=[flaky.address]) as client:
            with unreadable():
                await client.run_text("a")
            with unreadable():
                _ = [one async for one in client.run_stream("a")]

    with ModelClient("x", addresses=[flaky.address]) as client:
        with unreadable() as caught:
            client.run_text("a")
        assert caught.value.request_id
        with unreadable():
            list(client.run_stream("a"))
    asyncio.run(asynchronously())


def test_a_count_that_is_none_fails_no_call(flaky: Flaky) -> None:
    flaky.trailing = (("tms-retries", "many"),)
    with ModelClient("x", addresses=[flaky.address]) as client:
        assert client.run_text("a") == "ok"
        assert client.stats()["retries"] == 0


def test_what_is_not_safe_to_repeat_is_not_repeated(flaky: Flaky) -> None:
    with ModelClient("x", addresses=[flaky.address]) as client:
        assert client.run_text("a") == "ok"
        flaky.down, flaky.attempts = True, 0
        with pytest.raises(model_client.ServerUnavailable, match="down"):
            client.run_text("a", retry=False)
        assert flaky.attempts == 1
        assert flaky.metadata["tms-retry"] == "no"
        with pytest.raises(model_client.ServerUnavailable, match="down"):
            client.run_text("a")
        assert flaky.attempts == 1 + 5
        assert "tms-retry" not in flaky.metadata


def test_the_server_does_not_repeat_it_either(start_server: Callable[..., Server], tmp_path: Path) -> None:
    log = tmp_path / "ran"
    body = (
        "    max_batch_size = 8\n    def run(self, data, args):\n        return self.run_batch([data], args)[0]\n"
        f"    def run_batch(self, items, args):\n        open({str(log)!r}, 'a').write(''.join(items))\n"
        "        if 'd' in items:\n            __import__('os').abort()\n"
        "        assert 'r' not in items\n        return items"
    )
    server = start_server(write_model(tmp_path / "models", "counts", body))
    with server.client("counts") as client:
        with pytest.raises(model_client.ModelFailed, match="SIGABRT"):
            client.run_text("d", retry=False)
        assert log.read_text() == "d"
        with pytest.raises(model_client.ModelFailed, match="SIGABRT"):
            client.run_text("d")
        assert log.read_text() == "ddd"
        with pytest.raises(model_client.ModelFailed):
            client.run_text_batch(["a", "r"], retry=False)
        assert sorted(log.read_text()[3:]) == ["a", "r"]


def test_retries_have_a_budget(flaky: Flaky) -> None:
    calls = 600
    with ModelClient("x", addresses=[flaky.address]) as client:
        client.run_text("warm")
        flaky.down, flaky.pushback, flaky.attempts = True, "1", 0
        failed = sum(isinstance(error, model_client.ServerUnavailable) for error in errors(client, calls))
        assert failed == calls
        assert calls + 100 < flaky.attempts <= calls + 510  # 5 attempts each would be 3000


def errors(client: ModelClient, calls: int) -> list[BaseException | None]:
    futures = [client.submit_text("x") for _ in range(calls)]
    return [future.exception(timeout=60) for future in futures]


def test_retries_obey_the_pushback_and_the_deadline(flaky: Flaky) -> None:
    with ModelClient("x", addresses=[flaky.address]) as client:
        client.run_text("warm")
        flaky.down, flaky.pushback, flaky.attempts = True, "-1", 0
        with pytest.raises(model_client.ServerUnavailable):
            client.run_text("x")
        assert flaky.attempts == 1
        flaky.pushback, flaky.attempts = "400", 0
        begun = time.monotonic()
        with pytest.raises(model_client.ModelClientError):
            client.run_text("x", timeout=1)
        assert 0.75 < time.monotonic() - begun < 1.5
        assert flaky.attempts == 3
        flaky.pushback = "300"
        threading.Timer(0.2, lambda: setattr(flaky, "down", False)).start()
        assert client.run_text("x") == "ok"


def test_an_answer_too_large_to_send_is_not_computed_again(start_server: Callable[..., Server], tmp_path: Path) -> None:
    log = tmp_path / "ran"
    body = f"    def run(self, data, args):\n        open({str(log)!r}, 'a').write('x')\n        return 'y' * (2 << 20)"
    server = start_server(write_model(tmp_path / "models", "long", body), TMS_MAX_MESSAGE_MB=1)
    with server.client("long") as client, pytest.raises(model_client.Overloaded, match="TMS_MAX_MESSAGE_MB"):
        client.run_text("x")
    assert log.read_text() == "x"


def test_stats_and_debug_log_name_the_replica_answered(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with server.client("echo") as client:
        assert client.stats() == {"calls": 0, "failed": 0, "retries": 0, "replicas": {}}
        client.run_text("x")
        with caplog.at_level(logging.DEBUG, "tiny_model_server.client"):
            client.run_text("x")
        with pytest.raises(model_client.InvalidInput) as caught:
            client.run_batch([])
        name = f"127.0.0.1:{server.port}"
        assert f"RunText by {name}: OK in" in caplog.text
        assert caught.value.replica == name
        stats = client.stats()
        assert (stats["calls"], stats["failed"], stats["retries"]) == (3, 1, 0)
        assert 0 < stats["replicas"][name]["p50_ms"] <= stats["replicas"][name]["p99_ms"] < 5000


def test_a_unix_socket(start_server: Callable[..., Server], tmp_path: Path) -> None:
    path = tmp_path / "tms.sock"
    server = start_server(TMS_SOCKET=path)
    with ModelClient("echo", addresses=f"unix:{path}") as client:
        assert client.run_text("x") == "x"
        assert client.health_check()["serving"] == [f"unix:{path}"]
    second = Server.__new__(Server)
    with pytest.raises(AssertionError, match=f"TMS_SOCKET={str(path)!r}: another server listens there"):
        second.__init__(TMS_SOCKET=path)  # type: ignore[misc]
    with ModelClient("echo", addresses=f"unix:{path}") as client:
        assert client.run_text("still the first one") == "still the first one"
    server.kill()
    assert start_server(TMS_SOCKET=path).port  # what a killed server left is no hindrance


def test_a_pickled_client_connects_anew(server: Server) -> None:
    with server.client("echo", timeout=5, balancing="round_robin", token="secret") as client:
        client.run_text("x")
        again = pickle.loads(pickle.dumps(client))
        with again:
            assert again.run_text("y") == "y"
        assert repr(again) == repr(client)
        assert again._options == client._options
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            assert pool.map(client.run_text, ["a", "b"]) == ["a", "b"]
    with pytest.raises(TypeError, match="unexpected keyword"):
        ModelClient("echo", adresses=["x:1"])  # type: ignore[call-arg]


FORKS = """
import os, signal, sys, threading, time
sys.path.insert(0, {root!r})
from model_client import AsyncModelClient, ModelClient
client = ModelClient({model!r}, addresses=[{address!r}])

def child(action):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = repr(action())
        except BaseException as error:
            said = repr(error)
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    killer = threading.Timer(15, os.kill, (pid, signal.SIGKILL))
    killer.start()
    said = os.fdopen(reading).read()
    os.waitpid(pid, 0)
    killer.cancel()
    return said or "hung"

{script}
"""


def forks(server: Server, script: str, model: str = "echo") -> list[str]:
    """The lines that a script printed that forks, in a process without any other use of gRPC."""
    code = FORKS.format(root=str(ROOT), model=model, address=server.address, script=script)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_a_forked_child_has_a_working_client(server: Server) -> None:
    script = """
print(client.run_text("before"), client.submit_text("future").result())
for _ in range(5):
    print(child(lambda: client.run_text("child")), client.run_text("parent"))
"""
    assert forks(server, script) == ["before future", *["'child' parent"] * 5]


def test_a_fork_under_load_waits_for_the_calls(server: Server) -> None:
    script = """
done = []
def call():
    for number in range(10 ** 9):
        client.run_text("x")
        done.append(number)
for _ in range(4):
    threading.Thread(target=call, daemon=True).start()
while len(done) < 20: time.sleep(0.01)
for _ in range(5):
    before = len(done)
    print(child(lambda: client.run_text("child")))
    while len(done) < before + 20: time.sleep(0.01)
os._exit(sys.stdout.flush() or 0)
"""
    assert forks(server, script) == ["'child'"] * 5


def test_a_fork_in_the_middle_of_a_long_call_raises(start_server: Callable[..., Server], tmp_path: Path) -> None:
    body = "    def run(self, data, args):\n        __import__('time').sleep(2)\n        return data"
    script = """
from tiny_model_server.client import fork_safety
fork_safety._PATIENCE_S = 0.2
client.run_text("warm")
future = client.submit_text("x")
time.sleep(1)
print(child(lambda: client.run_text("child")))
print(future.result())
"""
    said, answer = forks(start_server(write_model(tmp_path, "slow", body)), script, "slow")
    assert "forked while its parent was in a call" in said
    assert answer == "x"


def test_a_fork_after_asyncio_raises(server: Server) -> None:
    script = """
import asyncio
async_client = AsyncModelClient("echo", addresses=client.addresses)
print(asyncio.run(async_client.run(1)), child(lambda: client.run_text("child")), client.run_text("parent"))
"""
    (said,) = forks(server, script)
    assert "used AsyncModelClient" in said
    assert (said.split()[0], said.split()[-1]) == ("1", "parent")


def test_loaded_for_a_while(start_server: Callable[..., Server]) -> None:
    server = start_server(TMS_LAZY=1)
    with server.client("echo") as client:
        with client.loaded(workers=2) as same:
            assert same.run_text("x") == "x"
            assert len(client.model_info()[0]["worker_pids"]) == 2
        assert client.model_info()[0]["state"] == "UNLOADED"
