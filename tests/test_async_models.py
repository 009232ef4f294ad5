"""Models whose methods are coroutines: several calls at once on one event loop, each cancelled with its caller."""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import model_client
from tests.conftest import Server, running_engine, wait_for
from tests.test_workers import own_interpreter, write
from tiny_model_server.errors import ModelUnavailable
from tiny_model_server.settings import Settings

StartServer = Callable[..., Server]

WAITS = """
    import asyncio, os, sys, time
    from model_interface import InvalidInput, ModelInterface

    class Model(ModelInterface):
        timeout_s = 2
        example = "warm"

        def __init__(self):
            self.loop = asyncio.get_running_loop()
            self.at_work = self.most = 0
            self.cancelled, self.ended, self.background = [], [], []
            self.together = asyncio.Event()

        async def warmup(self):
            assert self.loop is asyncio.get_running_loop()
            await asyncio.sleep(0)
            self.background.append(asyncio.create_task(self.count()))

        async def count(self):
            while True:
                self.ended.append("tick")
                await asyncio.sleep(0.01)

        async def run(self, data, args):
            assert self.loop is asyncio.get_running_loop()
            self.at_work += 1
            self.most = max(self.most, self.at_work)
            try:
                return await getattr(self, args.get("do", "echo"))(data)
            except asyncio.CancelledError:
                self.cancelled.append(data)
                raise
            finally:
                self.at_work -= 1

        async def echo(self, data):
            return data

        async def meet(self, count):
            if self.at_work == count:
                self.together.set()
            await self.together.wait()
            return os.getpid()

        async def forever(self, data):
            await asyncio.Event().wait()

        async def stubborn(self, data):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                await asyncio.Event().wait()

        async def block(self, data):
            time.sleep(60)

        async def nap(self, data):
            await asyncio.sleep(0.5)
            return os.getpid()

        async def fail(self, data):
            raise ValueError("as usual")

        async def refuse(self, data):
            raise InvalidInput("the caller's mistake")

        async def exit(self, data):
            sys.exit(3)

        async def task_exits(self, data):
            asyncio.create_task(self.exit(data))
            await asyncio.sleep(0.01)
            return "still here"

        async def stop_loop(self, data):
            self.loop.stop()
            await asyncio.sleep(0.01)
            return "still here"

        async def cancel_itself(self, data):
            asyncio.current_task().cancel()
            await asyncio.sleep(1)

        async def fork(self, data):
            os.fork()
            return data

        async def subprocess(self, data):
            process = await asyncio.create_subprocess_exec("echo", data, stdout=asyncio.subprocess.PIPE)
            return (await process.communicate())[0].decode().strip()

        async def state(self, data):
            return {"cancelled": self.cancelled, "most": self.most, "at_work": self.at_work, "pid": os.getpid(),
                    "ticks": len(self.ended)}
"""
STREAMS = """
    import asyncio, contextvars, os
    from model_interface import ModelInterface

    place = contextvars.ContextVar("place")

    class Model(ModelInterface):
        timeout_s = 20
        example = 2

        def __init__(self):
            self.closed = []

        async def run(self, data, args):
            if data == "closed":
                yield self.closed
                return
            if data == "pid":
                yield os.getpid()
                return
            token = place.set(data)
            try:
                for number in range(data):
                    if args.get("fail") == number:
                        raise ValueError("in the middle")
                    if args.get("cancel") == number:
                        asyncio.current_task().cancel()
                    yield "x" * args["wide"] if args.get("wide") else number
                    if args.get("wait"):
                        await asyncio.Event().wait()
                    await asyncio.sleep(0)
                place.reset(token)
            finally:
                await asyncio.sleep(0)
                self.closed.append(args.get("name"))
"""
BATCHES = """
    import asyncio, pathlib
    from model_interface import ModelInterface

    class Model(ModelInterface):
        def run(self, data, args):
            return self.run_batch([data], args)  # a coroutine, though it does not look so

        async def run_batch(self, items, args):
            if args.get("wait"):
                try:
                    await asyncio.Event().wait()
                finally:
                    self.gone = len(items)
            await asyncio.sleep(0)
            if args.get("state"):
                return [getattr(self, "gone", None) for _ in items]
            return [ValueError("minus") if item < 0 else len(items) for item in items]

        async def close(self):
            await asyncio.sleep(0)
            (pathlib.Path(__file__).parent / "closed").touch()
"""
SINGLY = """
    import asyncio
    from model_interface import ModelInterface

    class Model(ModelInterface):
        max_batch_size = 8
        concurrency = 1

        async def run(self, data, args):
            await asyncio.sleep(0)
            if data < 0:
                raise ValueError("minus")
            return data + 1
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("async")
    for name, code in {"waits": WAITS, "streams": STREAMS, "batches": BATCHES, "singly": SINGLY}.items():
        write(folder, name, code)
    return folder


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[Server]:
    server = Server(models)
    yield server
    server.kill()


@pytest.fixture(params=["localhost", "127.0.0.1"], ids=["local", "gRPC"])
def client(server: Server, request: pytest.FixtureRequest) -> Iterator[model_client.ModelClient]:
    with model_client.ModelClient("waits", addresses=[f"{request.param}:{server.port}"], timeout=30) as client:
        yield client


def of(client: model_client.ModelClient, model: str) -> model_client.ModelClient:
    return model_client.ModelClient(model, addresses=client.addresses, timeout=30)


def state(client: model_client.ModelClient) -> Any:
    return client.run(0, {"do": "state"})


def test_calls_run_at_once_in_one_worker(client: model_client.ModelClient) -> None:
    with ThreadPoolExecutor(10) as pool:
        pids = set(pool.map(lambda _: client.run(10, {"do": "meet"}), range(10)))
    assert len(pids) == 1
    assert state(client)["most"] >= 10
    assert client.model_info()[0]["state"] == "READY"


def test_arrays_come_back_and_are_not_kept(client: model_client.ModelClient) -> None:
    image = np.arange(300_000, dtype=np.uint8).reshape(300, 1000)
    for number in range(20):
        assert np.array_equal(client.run_image(image + np.uint8(number)), image + np.uint8(number))


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("fail", model_client.ModelFailed, "raised ValueError: as usual"),
        ("refuse", model_client.InvalidInput, "the caller's mistake"),
        ("exit", model_client.ModelFailed, "raised SystemExit: 3"),
        ("cancel_itself", model_client.ModelFailed, "raised CancelledError"),
    ],
)
def test_errors(client: model_client.ModelClient, what: str, kind: type[Exception], message: str) -> None:
    pid = state(client)["pid"]
    with pytest.raises(kind, match=message):
        client.run(1, {"do": what})
    assert state(client)["pid"] == pid


@pytest.mark.parametrize("what", ["task_exits", "stop_loop"])
def test_the_loop_survives_what_tasks_do(client: model_client.ModelClient, what: str) -> None:
    pid = state(client)["pid"]
    assert client.run(1, {"do": what}) == "still here"
    assert state(client)["pid"] == pid


def test_programs_and_forks(client: model_client.ModelClient) -> None:
    assert client.run("hello", {"do": "subprocess"}) == "hello"
    for number in range(5):
        assert client.run(["first", number], {"do": "fork"}) == ["first", number]
        assert client.run(["next", number]) == ["next", number]


def test_a_task_of_the_model_goes_on_between_calls(client: model_client.ModelClient) -> None:
    before = state(client)["ticks"]
    wait_for(lambda: state(client)["ticks"] > before + 2, "ticks")


def test_a_call_is_cancelled_at_its_deadline(client: model_client.ModelClient) -> None:
    name = f"deadline {client.addresses}"
    pid = state(client)["pid"]
    with pytest.raises(model_client.DeadlineExceeded):
        client.run(name, {"do": "forever"}, timeout=0.3)
    after = wait_for(lambda: name in (seen := state(client))["cancelled"] and seen, "the cancellation")
    assert after["pid"] == pid


def test_a_call_is_cancelled_with_its_caller(client: model_client.ModelClient) -> None:
    name = f"caller {client.addresses}"
    pid = state(client)["pid"]
    future = client.submit(name, {"do": "forever"})
    wait_for(lambda: state(client)["at_work"] > 1, "the call")
    future.cancel()
    after = wait_for(lambda: name in (seen := state(client))["cancelled"] and seen, "the cancellation")
    assert after["pid"] == pid


def test_a_call_that_takes_too_long_is_cancelled_and_the_worker_stays(client: model_client.ModelClient) -> None:
    pid = state(client)["pid"]
    with pytest.raises(model_client.DeadlineExceeded, match="timeout_s=2"):
        client.run("slow", {"do": "forever"})
    assert state(client)["pid"] == pid


@pytest.mark.parametrize("what", ["block", "stubborn"])
def test_what_cannot_be_cancelled_ends_with_its_worker(client: model_client.ModelClient, what: str) -> None:
    pid = state(client)["pid"]
    with pytest.raises(model_client.DeadlineExceeded, match="timeout_s=2"):
        client.run("slow", {"do": what})
    wait_for(lambda: state(client)["pid"] != pid, "another worker")


def test_many_cancelled_calls_leave_every_slot_usable(client: model_client.ModelClient) -> None:
    pid = state(client)["pid"]
    for _ in range(5):
        futures = [client.submit("gone", {"do": "forever"}) for _ in range(20)]
        for future in futures:
            future.cancel()
        assert [client.run(number) for number in range(20)] == list(range(20))
    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(client.run, range(100))) == list(range(100))
    wait_for(lambda: state(client)["at_work"] == 1, "the end of the others")
    assert state(client)["pid"] == pid


def test_a_call_may_be_cancelled_at_any_moment(client: model_client.ModelClient) -> None:
    pid = state(client)["pid"]
    for number in range(300):
        client.submit("gone", {"do": "forever"}).cancel()
        assert client.run(number) == number
    wait_for(lambda: state(client)["at_work"] == 1, "the end of the others")
    assert state(client)["pid"] == pid


def test_a_stream_may_be_left_at_any_moment(client: model_client.ModelClient) -> None:
    streams = of(client, "streams")
    names = {f"{number} {client.addresses}" for number in range(40)}
    for name in names:
        values = streams.run_stream(1000, {"name": name, "wait": True})
        next(values)
        values.close()
    wait_for(lambda: names <= {*streams.run("closed")[0]}, "the end of all", 10)


def test_calls_that_are_cancelled_while_they_end_harm_no_other(
    client: model_client.ModelClient, caplog: pytest.LogCaptureFixture
) -> None:
    def some(number: int) -> None:
        for wait_ms in range(40):
            future = client.submit(number)
            time.sleep(wait_ms / 20_000)
            future.cancel()
            assert client.run([number, wait_ms]) == [number, wait_ms]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(some, range(16)))
    assert not caplog.records


def test_streams_that_are_left_at_once_leave_every_slot_usable(client: model_client.ModelClient) -> None:
    streams = of(client, "streams")
    pid = streams.run("pid")

    def leave(number: int) -> None:
        values = streams.run_stream(1000)
        assert [next(values) for _ in range(number % 20 + 1)] == list(range(number % 20 + 1))
        values.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(leave, range(200)))
    assert streams.run("pid") == pid


def test_an_async_generator_streams(client: model_client.ModelClient) -> None:
    streams = of(client, "streams")
    assert list(streams.run_stream(40)) == list(range(40))
    assert streams.run(3) == [0, 1, 2]
    with ThreadPoolExecutor(4) as pool:
        assert all(values == list(range(50)) for values in pool.map(lambda _: list(streams.run_stream(50)), range(8)))


def test_an_async_generator_fails_in_the_middle(client: model_client.ModelClient) -> None:
    streams, found = of(client, "streams"), []
    with pytest.raises(model_client.ModelFailed, match="in the middle"):
        found.extend(streams.run_stream(9, {"fail": 2}))  # which takes what comes before
    with pytest.raises(model_client.ModelFailed, match="in the middle"):
        streams.run(9, {"fail": 2})


def test_a_stream_that_cancels_itself_does_not_end_as_if_it_were_whole(client: model_client.ModelClient) -> None:
    streams = of(client, "streams")
    with pytest.raises(model_client.ModelFailed, match="raised CancelledError"):
        list(streams.run_stream(9, {"cancel": 3}))
    with pytest.raises(model_client.ModelFailed, match="raised CancelledError"):
        streams.run(9, {"cancel": 3})


@pytest.mark.parametrize("wait", [False, True], ids=["at a yield", "between two"])
def test_an_async_generator_is_closed_when_its_reader_leaves(client: model_client.ModelClient, wait: bool) -> None:
    streams = of(client, "streams")
    name = f"left {wait} {client.addresses}"
    values = streams.run_stream(1000, {"name": name, "wait": wait})
    assert next(values) == 0
    values.close()
    wait_for(lambda: name in streams.run("closed")[0], "its end", 10)


def test_batches(client: model_client.ModelClient) -> None:
    batches = of(client, "batches")
    assert batches.run_batch([1, 2, 3]) == [3, 3, 3]
    assert batches.run(1) == [1]
    found = batches.run_batch([1, -2], return_exceptions=True)
    assert found[0] == 2
    assert "minus" in str(found[1])


def test_a_batch_is_cancelled_when_all_its_callers_have_gone(client: model_client.ModelClient) -> None:
    batches = of(client, "batches")
    with pytest.raises(model_client.DeadlineExceeded):
        batches.run_batch([1, 2, 3, 4], {"wait": 1}, timeout=0.3)
    assert batches.run_batch([1, 2], {"state": 1}) == [4, 4]


def test_a_batch_without_a_run_batch_runs_its_items_at_once(client: model_client.ModelClient) -> None:
    found = of(client, "singly").run_batch([1, 2, -3, 4], return_exceptions=True)
    assert [one for one in found if isinstance(one, int)] == [2, 3, 5]
    assert isinstance(found[2], model_client.ModelFailed)


def test_many_callers_of_the_asyncio_client(server: Server) -> None:
    asyncio.run(many_callers(server))


async def many_callers(server: Server) -> None:
    async with model_client.AsyncModelClient("waits", addresses=[server.address], timeout=30) as client:
        assert await asyncio.gather(*(client.run(number) for number in range(200))) == list(range(200))


def test_an_async_close_runs_at_the_end(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(write(tmp_path, "batches", BATCHES))
    assert server.client("batches").run_batch([1, 2]) == [2, 2]
    assert server.stop() == 0
    assert (tmp_path / "batches" / "closed").exists()


def test_a_method_that_returns_a_coroutine_unexpectedly_is_reported(start_server: StartServer, tmp_path: Path) -> None:
    code = """
        from model_interface import ModelInterface
        class Model(ModelInterface):
            def run(self, data, args):
                return self.later()
            async def later(self):
                return 1
    """
    client = start_server(write(tmp_path, "later", code)).client("later")
    with pytest.raises(model_client.ModelFailed, match="returned coroutine: declare its run with 'async def'"):
        client.run(1)


def test_an_answer_to_the_example_that_cannot_be_encoded_is_reported_at_load(tmp_path: Path) -> None:
    code = """
        from model_interface import ModelInterface
        class Model(ModelInterface):
            example = 1
            async def run(self, data, args):
                return object()
    """
    settings = Settings(models_dir=write(tmp_path, "odd", code), lazy=True)
    message = "answer to its example cannot be encoded: cannot serialize"
    with running_engine(settings) as engine, pytest.raises(ModelUnavailable, match=message):
        engine.wait(engine.load("odd"))


@pytest.mark.timeout(200)
def test_async_models_run_on_the_oldest_python(start_server: StartServer, tmp_path: Path) -> None:
    for name, code in {"waits": WAITS, "streams": STREAMS}.items():
        own_interpreter(write(tmp_path, name, code) / name, "3.9", "numpy")
    server = start_server(tmp_path)
    client = server.client("waits", timeout=30)
    assert client.run("hello", {"do": "subprocess"}) == "hello"
    with pytest.raises(model_client.DeadlineExceeded):
        client.run("late", {"do": "forever"}, timeout=0.3)
    wait_for(lambda: state(client)["cancelled"] == ["late"], "the cancellation")
    values = server.client("streams", timeout=30).run_stream(1000, {"name": "left", "wait": True})
    assert next(values) == 0
    values.close()
    wait_for(lambda: "left" in server.client("streams").run("closed")[0], "the end of the stream")


def test_a_reader_that_reads_nothing_ends_the_stream_and_not_the_worker(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server(write(tmp_path, "streams", STREAMS), TMS_STREAM_IDLE_S=0.5)
    client = server.client("streams", timeout=30)
    pid = client.model_info()[0]["worker_pids"]
    values = client.run_stream(100_000, {"name": "idle", "wide": 1_000_000})
    assert len(next(values)) == 1_000_000
    wait_for(lambda: "idle" in client.run("closed")[0], "the end of the stream")
    with pytest.raises(model_client.DeadlineExceeded, match="TMS_STREAM_IDLE_S"):
        list(values)
    assert client.model_info()[0]["worker_pids"] == pid


def test_calls_under_way_finish_while_their_model_is_reloaded(start_server: StartServer, tmp_path: Path) -> None:
    client = start_server(write(tmp_path, "waits", WAITS)).client("waits", timeout=30)
    before = state(client)["pid"]
    with ThreadPoolExecutor(8) as pool:
        naps = [pool.submit(client.run, None, {"do": "nap"}) for _ in range(8)]
        wait_for(lambda: state(client)["at_work"] == 9, "eight calls beside this one")
        assert client.reload_model()[0]["state"] == "READY"
        assert [one.result() for one in naps] == [before] * 8
    assert state(client)["pid"] != before
