"""What one caller can take of the server: threads, descriptors, bytes, a model's worker; and how long it may end."""

import collections
import os
import queue
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest

import model_client
from tests.conftest import ROOT, Server, only, wait_for
from tiny_model_server import schemas
from tiny_model_server.errors import bounded, message_of

StartServer = Callable[..., Server]
RUN_TEXT = schemas.methods("server", "server.Server")["RunText"]
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"
HALF_OPEN = [RUN_TEXT.path, "/server.Server/RunStream", REFLECTION, STREAM_INFER]


def channel(server: Server) -> grpc.Channel:
    """A connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    return grpc.insecure_channel(server.address, options=options)


def text(model: str = "echo", args: str = "") -> bytes:
    return bytes(RUN_TEXT.request(text="x", model=model, args=args).SerializeToString())


@contextmanager
def silent_calls(server: Server, path: str, count: int, connections: int = 1) -> Iterator[list[Any]]:
    """Calls whose headers are sent and nothing else, without a deadline."""
    with ExitStack() as stack:
        channels = [stack.enter_context(channel(server)) for _ in range(connections)]
        never: queue.Queue[Any] = queue.Queue()
        calls = [channels[i % connections].stream_stream(path)(iter(never.get, None)) for i in range(count)]
        yield calls
        for call in calls:
            call.cancel()
        for _ in calls:
            never.put(None)


def codes(calls: list[Any]) -> collections.Counter[str]:
    return collections.Counter(call.code().name if call.done() else "OPEN" for call in calls)


def others_are_answered(server: Server, **options: Any) -> None:
    """A caller with a connection of its own, and one of health, get their answers as ever."""
    times = []
    with channel(server) as other, channel(server) as probe:
        for _ in range(7):
            begun = time.monotonic()
            other.unary_unary(RUN_TEXT.path)(text(), timeout=10, **options)
            assert probe.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=10) == b"\x08\x01"
            times.append(time.monotonic() - begun)
    assert statistics.median(times) < 1, times  # ten milliseconds where nothing else runs


@pytest.mark.parametrize("path", HALF_OPEN)
def test_silent_calls_of_one_connection_hold_a_quarter_of_the_threads(server: Server, path: str) -> None:
    with silent_calls(server, path, 300) as calls:
        wait_for(lambda: codes(calls)["OPEN"] <= 64, "refusals")
        assert codes(calls) == {"OPEN": 64, "RESOURCE_EXHAUSTED": 236}
        refused = next(call for call in calls if call.done())
        assert "a quarter of TMS_THREADS" in refused.details()
        assert int(dict(refused.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
        others_are_answered(server)


@pytest.mark.parametrize("path", [*HALF_OPEN, "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"])
def test_silent_calls_of_many_connections_stop_nobody(server: Server, path: str) -> None:
    with silent_calls(server, path, 400, connections=20):
        others_are_answered(server)


def test_without_the_token_nothing_is_held(start_server: StartServer) -> None:
    server = start_server(TMS_TOKEN="secret", TMS_THREADS=4)
    before = psutil.Process(server.process.pid).num_threads()
    with ExitStack() as stack:
        for path in HALF_OPEN:
            calls = stack.enter_context(silent_calls(server, path, 100))
            wait_for(lambda calls=calls: codes(calls)["UNAUTHENTICATED"] == 100, f"refusals of {path}")
            assert psutil.Process(server.process.pid).num_threads() == before
        others_are_answered(server, metadata=(("authorization", "Bearer secret"),))


@pytest.fixture(scope="module")
def impatient() -> Iterator[Server]:
    """A server whose streams may be silent for half a second."""
    server = Server(TMS_STREAM_IDLE_S=0.5)
    yield server
    server.kill()


@pytest.mark.parametrize("path", [*HALF_OPEN, "/grpc.health.v1.Health/Check"])
def test_calls_that_bring_nothing_are_ended(impatient: Server, path: str) -> None:
    with silent_calls(impatient, path, 2) as calls:
        wait_for(lambda: not codes(calls)["OPEN"], "their end")
        assert codes(calls) == {"DEADLINE_EXCEEDED": 2}
        assert "TMS_STREAM_IDLE_S" in calls[0].details()


def test_a_request_that_is_long_on_its_way_is_waited_for(impatient: Server) -> None:
    arrives = threading.Event()

    def late() -> Iterator[bytes]:
        arrives.wait(2)
        yield text()

    with channel(impatient) as one:
        answer = one.stream_unary(RUN_TEXT.path)(late(), timeout=60)
    assert RUN_TEXT.response.FromString(answer).data == '"x"'


def test_a_stream_may_be_long_if_it_brings_something(start_server: StartServer) -> None:
    server = start_server(TMS_STREAM_IDLE_S=1)
    infer = schemas.methods("open_inference", "inference.GRPCInferenceService")["ModelStreamInfer"]
    tensor = {"name": "x", "datatype": "INT32", "shape": [1], "contents": {"int_contents": [7]}}
    request = infer.request(model_name="echo", inputs=[tensor]).SerializeToString()

    def requests() -> Iterator[bytes]:
        for _ in range(4):
            yield request
            time.sleep(0.5)  # the pause is what is tested

    with channel(server) as one:
        answers = list(one.stream_stream(STREAM_INFER)(requests()))
    assert len(answers) == 4


@contextmanager
def silent_streams(server: Server, count: int, connections: int) -> Iterator[list[Any]]:
    """Streams that hold a thread: each has sent one request, got its answer, and then sends nothing."""
    with ExitStack() as stack:
        channels = [stack.enter_context(channel(server)) for _ in range(connections)]
        never: queue.Queue[Any] = queue.Queue()
        streams = [
            channels[i % connections].stream_stream(REFLECTION)(chain([b"\x3a\x00"], iter(never.get, None)))
            for i in range(count)
        ]
        yield streams
        for stream in streams:
            stream.cancel()
        for _ in streams:
            never.put(None)


def test_a_stream_that_falls_silent_is_ended(impatient: Server) -> None:
    with silent_streams(impatient, 2, 1) as streams:
        for stream in streams:
            assert next(stream)
            with pytest.raises(grpc.RpcError) as caught:
                next(stream)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "TMS_STREAM_IDLE_S" in caught.value.details()


def test_silent_streams_of_many_connections_stop_nobody(start_server: StartServer) -> None:
    server = start_server(TMS_THREADS=16)
    with silent_streams(server, 60, connections=20):
        others_are_answered(server)
    server.wait_for_log("too many calls wait for their callers")


def test_a_call_without_a_message_is_refused(server: Server) -> None:
    with channel(server) as one, pytest.raises(grpc.RpcError) as caught:
        one.stream_unary(RUN_TEXT.path)(iter(()))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_silent_connections_leave_descriptors_for_workers(start_server: StartServer) -> None:
    command = ["sh", "-c", 'ulimit -n 300; exec "$0" server.py', sys.executable]
    server = start_server(command=command, TMS_HTTP_PORT="off")
    process = psutil.Process(server.process.pid)
    with channel(server) as known, ExitStack() as stack:
        assert known.unary_unary(RUN_TEXT.path)(text("worker"), timeout=20)
        for _ in range(400):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        assert process.num_fds() < 250
        os.kill(server.client("worker").model_info()[0]["worker_pids"][0], signal.SIGKILL)
        assert known.unary_unary(RUN_TEXT.path)(text("worker"), timeout=20)
        wait_for(lambda: process.num_fds() < 150, "the end of silent connections")
        others_are_answered(server)


# ---- bytes under way


def test_bytes_under_way_are_bounded(start_server: StartServer) -> None:
    server = start_server(TMS_MAX_INFLIGHT_MB=1, TMS_LOCAL_TRANSPORT=0)
    client = server.client("echo")
    half = "x" * (600 << 10)
    for _ in range(5):  # what is answered is under way no more
        assert client.run_text(half, retry=False) == half
    with pytest.raises(model_client.Overloaded, match="TMS_MAX_INFLIGHT_MB"):
        client.run_text(half * 2, retry=False)
    with channel(server) as one, pytest.raises(grpc.RpcError) as caught:
        one.unary_unary(RUN_TEXT.path)(RUN_TEXT.request(text=half * 2, model="echo").SerializeToString())
    assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"] == "-1"  # it would never fit
    slow = RUN_TEXT.request(text=half, model="worker", args='{"sleep": 1}').SerializeToString()
    with channel(server) as one:
        calls = [one.unary_unary(RUN_TEXT.path).future(slow, timeout=30) for _ in range(3)]
        found = collections.Counter(call.code().name for call in calls)
    assert found == {"OK": 1, "RESOURCE_EXHAUSTED": 2}


# ---- callers that do not read


def test_a_caller_that_does_not_read_loses_its_stream(start_server: StartServer) -> None:
    server = start_server(only("tokens", "worker"), TMS_STREAM_IDLE_S=1)
    stream = schemas.methods("server", "server.Server")["RunStream"]
    request = stream.request(model="tokens")
    request.data.json = "100000"
    process = psutil.Process(server.process.pid)
    with channel(server) as one:
        call = one.unary_stream(stream.path)(request.SerializeToString())
        next(call)
        begun = time.monotonic()
        tokens = server.client("tokens", timeout=30)
        assert len(list(tokens.run_stream(2))) == 2  # of the model's only worker
        assert time.monotonic() - begun < 10
        with pytest.raises(grpc.RpcError) as caught:
            for _ in call:
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "TMS_STREAM_IDLE_S" in caught.value.details()
    wait_for(lambda: not metric(server, 'tms_in_flight{model="tokens"}'), "an idle model")
    assert process.is_running()


def test_a_caller_of_open_inference_that_does_not_read_loses_its_stream(start_server: StartServer) -> None:
    server = start_server(TMS_STREAM_IDLE_S=1)
    infer = schemas.methods("open_inference", "inference.GRPCInferenceService")["ModelStreamInfer"]
    tensor = {"name": "x", "datatype": "UINT8", "shape": [1_000_000]}
    request = infer.request(model_name="echo", inputs=[tensor], raw_input_contents=[bytes(1_000_000)])
    requests = (request.SerializeToString() for _ in range(1000))
    with channel(server) as one:
        call = one.stream_stream(STREAM_INFER)(requests)
        server.wait_for_log("the caller read nothing", timeout=30)
        with pytest.raises(grpc.RpcError) as caught:
            for _ in call:
                pass
    assert caught.value.code().name in ("DEADLINE_EXCEEDED", "CANCELLED")


def metric(server: Server, name: str) -> float:
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


# ---- error paths that could fail themselves

RAISES = """
from model_interface import InvalidInput, ModelInterface

class Text(str):
    def __getitem__(self, at): raise RuntimeError("no items")

class NoText(Exception):
    def __str__(self): raise SystemExit(3)
    __repr__ = __str__

class NoInput(InvalidInput):
    def __str__(self): raise ValueError("no text")

class Derived(InvalidInput):
    def __str__(self): return Text("derived")

ERRORS = {
    "surrogate": lambda: InvalidInput("half an emoji: \\ud83d"),
    "surrogate key": lambda: KeyError("\\udfff"),
    "nul": lambda: InvalidInput("before\\x00after"),
    "japanese": lambda: InvalidInput("\\u65e5" * 5000),
    "emoji": lambda: InvalidInput("\\U0001f600" * 5000),
    "percent": lambda: InvalidInput("%" * 9000),
    "lines": lambda: ValueError("line\\n" * 3000),
    "no text": NoText,
    "no input": NoInput,
    "derived": Derived,
    "exit": lambda: SystemExit(5),
    "interrupt": KeyboardInterrupt,
}

class Model(ModelInterface):
    def run(self, data, args):
        if data in ERRORS: raise ERRORS[data]()
        return data
    def run_batch(self, items, args):
        return [ERRORS[item]() if item in ERRORS else item for item in items]
"""
EXPECTED = {
    "surrogate": "half an emoji: \\ud83d",
    "surrogate key": "\\udfff",
    "nul": "before\\x00after",
    "japanese": "\u65e5\u65e5...",
    "emoji": "\U0001f600...",
    "percent": "%%...",
    "lines": "line\nline\n",
    "no text": "__str__ raised",
    "no input": "__str__ raised",
    "derived": "derived",
    "exit": "SystemExit",
    "interrupt": "KeyboardInterrupt",
}


@pytest.fixture(scope="module")
def raising(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose model raises what its input names."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "raises").mkdir()
    (folder / "raises" / "__init__.py").write_text(RAISES)
    server = Server(folder, TMS_PROTOCOLS="native,open_inference,modzy", TMS_MODZY_MODEL="raises")
    yield server
    server.kill()


@pytest.mark.parametrize("what", EXPECTED)
def test_whatever_a_model_raises_each_caller_gets_one_status(raising: Server, what: str) -> None:
    wrong = ("INVALID_ARGUMENT", "INTERNAL")
    method = schemas.methods("server", "server.Server")
    with channel(raising) as one:  # gRPC
        request = RUN_TEXT.request(text=what, model="raises").SerializeToString()
        with pytest.raises(grpc.RpcError) as caught:
            one.unary_unary(RUN_TEXT.path)(request, timeout=20)
        assert caught.value.code().name in wrong
        assert EXPECTED[what] in caught.value.details()
        batch = method["RunBatch"].request(model="raises")  # the error of one item
        for value in ("good", what):
            batch.items.add().json = f'"{value}"'
        answer = one.unary_unary(method["RunBatch"].path)(batch.SerializeToString(), timeout=20)
        good, bad = method["RunBatch"].response.FromString(answer).items
        assert good.value.json == '"good"'
        assert EXPECTED[what] in bad.error.message
        infer = schemas.methods("open_inference", "inference.GRPCInferenceService")["ModelStreamInfer"]
        tensor = {"name": "x", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [what.encode()]}}
        asked = infer.request(model_name="raises", inputs=[tensor]).SerializeToString()
        (answered,) = one.stream_stream(infer.path)(iter([asked]), timeout=20)
        assert EXPECTED[what] in infer.response.FromString(answered).error_message or what == "interrupt"
    client = raising.client("raises", timeout=20)  # the local transport
    with pytest.raises(model_client.ModelClientError) as failed:
        client.run(what, retry=False)
    assert EXPECTED[what] in str(failed.value)
    assert not isinstance(failed.value, model_client.Overloaded | model_client.DeadlineExceeded)


def test_messages_are_bounded_as_grpc_writes_them() -> None:
    for character in ("a", "%", "\n", "\u00e9", "\u65e5", "\U0001f600", "\ud83d", "\x00"):
        cut = bounded(character * 5000)
        assert cut.endswith("...")
        written = sum(
            1 if part.isascii() and part.isprintable() and part != "%" else 3 * len(part.encode()) for part in cut
        )
        assert 2048 - 12 <= written <= 2048
        assert bounded(cut) == cut
    assert bounded("plain: \u00e9\n") == "plain: \u00e9\n"
    assert message_of(ValueError("x"), named=True) == "ValueError: x"


# ---- batches larger than the queue

COUNTS = """
import time
from model_interface import ModelInterface
class Model(ModelInterface):
    max_batch_size = 16
    queue_size = 64
    def run(self, data, args): return data
    def run_batch(self, items, args):
        time.sleep(args.get("sleep", 0))
        return list(items)
"""


@pytest.fixture
def counting(tmp_path: Path) -> Path:
    """A folder with one model, whose queue is short."""
    (tmp_path / "counts").mkdir()
    (tmp_path / "counts" / "__init__.py").write_text(COUNTS)
    return tmp_path


def test_a_batch_larger_than_the_queue_flows_through_it_in_order(start_server: StartServer, counting: Path) -> None:
    client = start_server(counting).client("counts", timeout=60)
    for size in (64, 65, 127, 5000):
        texts = [str(number) for number in range(size)]
        assert client.run_text_batch(texts) == texts
    assert client.stats()["retries"] == 0


def test_a_large_batch_leaves_room_for_others(start_server: StartServer, counting: Path) -> None:
    server = start_server(counting)
    with ThreadPoolExecutor(3) as threads:
        many = list(range(2000))
        batches = [
            threads.submit(server.client("counts", timeout=60).run_batch, many, {"sleep": 0.02}) for _ in range(2)
        ]
        other = server.client("counts", timeout=20)
        wait_for(lambda: other.model_info()[0]["queue_depth"] > 0, "a queue")
        times = []
        for number in range(5):
            begun = time.monotonic()
            assert other.run(number, {"sleep": 0.001}, retry=False) == number
            times.append(time.monotonic() - begun)
        assert not any(batch.done() for batch in batches)
        assert statistics.median(times) < 1
        assert all(batch.result() == many for batch in batches)


def test_a_large_batch_ends_with_its_deadline_or_its_caller(start_server: StartServer, counting: Path) -> None:
    server = start_server(counting)
    client = server.client("counts")
    begun = time.monotonic()
    with pytest.raises(model_client.DeadlineExceeded):
        client.run_batch(list(range(3000)), {"sleep": 0.2}, timeout=1)
    assert time.monotonic() - begun < 5
    wait_for(lambda: client.model_info()[0]["queue_depth"] == 0, "an empty queue")
    wait_for(lambda: metric(server, "tms_in_flight") == 0, "an idle model")
    assert client.run(1) == 1


def test_the_items_of_a_request_are_bounded(start_server: StartServer, counting: Path) -> None:
    client = start_server(counting, TMS_MAX_ITEMS=100).client("counts")
    assert len(client.run_batch(list(range(100)), retry=False)) == 100
    with pytest.raises(model_client.InvalidInput, match="TMS_MAX_ITEMS allows 100 items"):
        client.run_batch(list(range(101)), retry=False)


# ---- more models than may be loaded

TURNS = """
from model_interface import ModelInterface
class Model(ModelInterface):
    def run(self, data, args): return data
"""
PIPELINE = """
from model_interface import Pipeline
class Model(Pipeline):
    stages = ["a", "b"]
"""


@pytest.mark.parametrize("transport", ["0", "1"])
def test_models_in_turns_fail_no_call(start_server: StartServer, tmp_path: Path, transport: str) -> None:
    for name in "abcd":
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(TURNS)
    (tmp_path / "line").mkdir()
    (tmp_path / "line" / "__init__.py").write_text(PIPELINE)
    server = start_server(tmp_path, TMS_LAZY=1, TMS_MAX_LOADED=1, TMS_LOCAL_TRANSPORT=transport)

    def call(number: int) -> int:
        name = ["a", "b", "c", "d", "line"][number % 5]
        answer: int = server.client(name, timeout=120).run(number, retry=False)
        return answer

    with ThreadPoolExecutor(5) as threads:
        assert list(threads.map(call, range(15))) == list(range(15))
    loaded = [name for name in "abcd" if server.client(name).model_info()[0]["worker_pids"]]
    assert len(loaded) <= 1


# ---- the end

ENDS = """
import sys, threading, time
from tiny_model_server import cli, serve
from tiny_model_server.engine import engine
def spin():
    while True: pass
serve._STOP_WORKERS_S = serve._STOP_REST_S = 1.0
{before}
sys.exit(cli.main([]))
"""


@pytest.mark.parametrize(
    ("before", "code"),
    [
        ("threading.Thread(target=spin).start()", 0),  # as a thread that parses for long
        ("engine.Engine.stop = lambda self, grace_s: time.sleep(1000)", 1),
        ("engine.Engine.stop = lambda self, grace_s: spin()", 1),
    ],
)
def test_the_process_ends_whatever_a_thread_is_busy_with(before: str, code: int) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("TMS_")}
    env |= {"TMS_HOST": "127.0.0.1", "TMS_PORT": "0", "TMS_HTTP_PORT": "off", "TMS_MODELS_DIR": str(only("echo"))}
    env |= {"TMS_GRACE_S": "0.5", "TMS_DRAIN_DELAY_S": "0", "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(
        [sys.executable, "-c", ENDS.format(before=before)], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
    )
    assert started.stderr
    with started, started.stderr as log:
        try:
            assert any("serving" in line for line in log)
            started.terminate()
            begun = time.monotonic()
            threading.Thread(target=log.read, daemon=True).start()
            assert started.wait(30) == code
            assert time.monotonic() - begun < 20
        finally:
            started.kill()


def test_arrays_of_a_stream_are_whole(server: Server) -> None:
    values = list(server.client("tokens").run_stream(50))
    assert [value["index"] for value in values] == list(range(50))
    assert all(np.all(value["array"] == value["index"]) for value in values)
