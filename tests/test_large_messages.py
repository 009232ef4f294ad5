"""Large arrays, over gRPC and on the same host: whole, retried as small ones are, and the application's own."""

import asyncio
import itertools
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest

import model_client
from model_client import AsyncModelClient, ModelClient
from tests.conftest import ROOT, Server, wait_for
from tests.test_faults import write_model
from tiny_model_server import schemas

METHODS = schemas.methods("server", "server.Server")
RANDOM = np.random.default_rng(0)
LARGE = RANDOM.integers(0, 256, (1080, 1920, 3), np.uint8)
ODD = RANDOM.integers(0, 256, (3_000_001,), np.uint8)
VALUES = {
    "an array": LARGE,
    "two": [ODD, LARGE],
    "large and small": {"a": ODD, "b": np.float32([1, 2]), "c": np.zeros((0, 3)), "d": "text"},
    "small and large": [np.zeros((0, 3)), np.arange(5), np.array(["ä"]), ODD.view(np.uint8)],
    "empty at the end": [LARGE, np.zeros((2, 0), np.int16)],
}
SLEEPS = """    max_batch_size = 1
    def __init__(self):
        self.seen = []
    def run(self, data, args):
        import time
        time.sleep(args.get("s", 0))
        if isinstance(data, str):
            return self.seen
        self.seen.append(sorted({int(value) for value in data.reshape(-1)[::1000]}))
        return len(self.seen)"""
DIES_ONCE = """    def run(self, data, args):
        import os, pathlib
        if not pathlib.Path(args["mark"]).exists():
            pathlib.Path(args["mark"]).touch()
            os._exit(1)
        return data"""


@pytest.fixture(params=["same host", "gRPC"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TMS_LOCAL_TRANSPORT", str(int(request.param == "same host")))
    return str(request.param)


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_values_of_all_kinds_both_ways(server: Server, value: Any) -> None:
    with server.client("echo") as client:
        for _ in range(3):
            np.testing.assert_equal(client.run(value), value)
        answers = client.run_batch([value, 1, value])
        np.testing.assert_equal(answers, [value, 1, value])
        np.testing.assert_equal(client.submit(value).result(), value)


def test_images_and_answers_of_all_sizes_in_turns(server: Server) -> None:
    with server.client("echo") as client:
        for image in (LARGE, LARGE[:10, :10], LARGE[:800], LARGE[:100], LARGE, LARGE):
            assert np.array_equal(client.run_image_to_image(image), image)
            assert np.array_equal(client.run_image(image), image)
        assert np.array_equal(client.run_image_batch([LARGE, LARGE[:5]])[1], LARGE[:5])


def test_an_image_and_arrays_beside_it(start_server: Callable[..., Server], tmp_path: Path) -> None:
    body = "    def run(self, data, args):\n        return {'image': data, 'rows': data[:2, 0, 0], 'n': 3}"
    server = start_server(write_model(tmp_path, "more", body))
    with server.client("more") as client:
        assert np.array_equal(client.run_image_to_image(LARGE), LARGE)
        assert np.array_equal(client.run_image(LARGE)["rows"], LARGE[:2, 0, 0])


HOLDERS: dict[str, Callable[[np.ndarray], Any]] = {
    "it": lambda answer: answer,
    "a view": lambda answer: answer[10:20, 5:9],
    "a memoryview": memoryview,
    "a buffer": lambda answer: np.frombuffer(answer, np.uint8),
    "a closure": lambda answer: lambda: answer,
    "a cycle": lambda answer: (held := [answer]).append(held) or held,
    "a generator": lambda answer: (value for value in [answer]),
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_answers_that_are_held_are_never_overwritten(server: Server, hold: Callable[[np.ndarray], Any]) -> None:
    def content(held: Any) -> np.ndarray:
        if isinstance(held, Iterator):
            return next(held)
        if callable(held):
            return held()
        return np.asarray(held[0] if isinstance(held, list) else held)

    numbers = range(1, 9)
    images = [np.full((512, 512, 3), number, np.uint8) for number in numbers]

    async def later() -> list[Any]:
        async with AsyncModelClient("echo", addresses=[server.address]) as client:
            return [hold(answer) for answer in await asyncio.gather(*map(client.run_image, images))]

    with server.client("echo") as client:
        held = [
            [hold(client.run_image(image)) for image in images],
            [hold(client.run_image_to_image(image)) for image in images],
            [hold(client.run({"deep": [image, image]})["deep"][1]) for image in images],
            [hold(future.result()) for future in [client.submit_image(image) for image in images]],
            [hold(answer) for answer in client.map(images, in_flight=3)],
            [hold(answer) for answer in client.run_image_batch(images)],
            asyncio.run(later()),
        ]
        for answers in held:
            assert [set(np.unique(content(answer)).tolist()) for answer in answers] == [{number} for number in numbers]


def test_answers_are_the_applications_own(server: Server) -> None:
    with server.client("echo") as client:
        kept = [client.run_image(LARGE ^ value) for value in range(8)]
        kept[0][:] = 7  # which is writable
        assert all(np.array_equal(answer, LARGE ^ value) for value, answer in enumerate(kept) if value)
        small = client.run([LARGE, np.arange(9)])[1]
        assert small.base is None or small.base.nbytes < 1000  # which does not hold the large one


def test_requests_under_way_are_never_overwritten(server: Server) -> None:
    """Each of many requests sent at once arrives as it was."""
    images = [np.full((600, 1000, 3), number, np.uint8) for number in range(40)]

    async def gather() -> list[Any]:
        async with AsyncModelClient("echo", addresses=[server.address]) as client:
            return await asyncio.gather(*map(client.run_image, images))

    with server.client("echo") as client:
        for answers in ([future.result() for future in map(client.submit_image, images)], asyncio.run(gather())):
            assert [int(answer.max()) for answer in answers] == list(range(40))
            assert [int(answer.min()) for answer in answers] == list(range(40))


def test_more_than_the_server_takes(start_server: Callable[..., Server], tmp_path: Path) -> None:
    body = (
        "    def run(self, data, args):\n        import numpy\n        return numpy.zeros(args.get('size', 1), 'uint8')"
    )
    server = start_server(write_model(tmp_path / "models", "zeros", body), TMS_MAX_MESSAGE_MB=4)
    with server.client("zeros") as client:
        with pytest.raises(model_client.Overloaded):
            client.run_image(LARGE)
        assert client.run_image(LARGE[:600]).nbytes == 1
        assert client.run(1, {"size": 3 << 20}).nbytes == 3 << 20


def test_failed_calls_leave_no_descriptors(server: Server) -> None:
    process = psutil.Process(server.process.pid)
    with server.client("misbehave") as client:

        def fail() -> None:
            with pytest.raises(model_client.ModelFailed):
                client.run(ODD, {"do": "raise"})

        fail()
        before = process.num_fds()
        for _ in range(20):
            fail()
        wait_for(lambda: process.num_fds() <= before, "the descriptors to be closed")


def test_memory_of_a_call_that_was_given_up_is_nobody_elses(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    server = start_server(write_model(tmp_path / "models", "sleeps", SLEEPS))
    with server.client("sleeps") as client:
        for value in (1, 2, 3):
            with pytest.raises(model_client.DeadlineExceeded):
                client.run_image(np.full_like(LARGE, value), {"s": 1}, timeout=0.5)
            client.run_image(np.full_like(LARGE, 10 * value))
        assert client.run_text("seen") == [[1], [10], [2], [20], [3], [30]]


def test_a_model_may_keep_its_input(server: Server) -> None:
    with server.client("keeps") as client:
        client.run(np.full(1_000_000, 1))
        for value in range(2, 6):
            before = client.run(np.full(1_000_000, value))
            assert before.min() == before.max() == value - 1


def test_a_worker_that_dies(start_server: Callable[..., Server], tmp_path: Path) -> None:
    """Another gets the same, from where it came to."""
    server = start_server(write_model(tmp_path / "models", "dies", DIES_ONCE))
    with server.client("dies") as client:
        assert np.array_equal(client.run_image(LARGE, {"mark": str(tmp_path / "1")}), LARGE)
        with pytest.raises(model_client.ModelFailed):
            client.run_image(LARGE, {"mark": str(tmp_path / "2")}, retry=False)
        assert np.array_equal(client.run_image(LARGE, {"mark": str(tmp_path / "2")}), LARGE)


def test_many_callers_get_their_own(server: Server) -> None:
    numbers = itertools.count()
    with server.client("echo") as client:

        def call() -> None:
            for _ in range(10):
                image = LARGE[: 700 + next(numbers) % 300] ^ next(numbers) % 256
                assert np.array_equal(client.run_image(image), image)

        with ThreadPoolExecutor(8) as threads:
            for done in [threads.submit(call) for _ in range(8)]:
                done.result()


@pytest.mark.parametrize("way", ["gRPC"], indirect=True)  # which is how two addresses are reached
def test_replicas_that_are_killed_again_and_again(start_server: Callable[..., Server], way: str) -> None:
    """No call with an image of 6 MB fails while one of two replicas is killed, and started again, several times."""
    steady, other = start_server(), start_server()
    stop, failed, made = threading.Event(), [], itertools.count()

    def call(client: ModelClient) -> None:
        while not stop.is_set():
            number = next(made)
            try:
                answer = client.run_image(LARGE ^ number % 251)
                if not np.array_equal(answer, LARGE ^ number % 251):
                    failed.append("another image")
            except model_client.ModelClientError as error:
                failed.append(repr(error))

    with ModelClient("echo", addresses=[steady.address, other.address], timeout=60) as client:
        client.run_text("x")
        with ThreadPoolExecutor(3) as threads:
            calls = [threads.submit(call, client) for _ in range(3)]
            try:
                for _ in range(4):
                    before = next(made)
                    other.kill()
                    other = start_server(TMS_PORT=other.port)
                    wait_for(lambda before=before: next(made) > before + 20, "more calls", timeout=60)
            finally:
                stop.set()
            for done in calls:
                done.result()
    assert not failed


def test_messages_of_any_generated_stub(server: Server) -> None:
    """A large request of another client has its bytes where protobuf puts them."""
    method = METHODS["RunImage"]
    image = {"height": 1080, "width": 1920, "channels": 3, "data": LARGE.tobytes()}
    request = method.request(image=image, model="echo", accept_arrays=True)
    with grpc.insecure_channel(server.address, [("grpc.max_receive_message_length", -1)]) as channel:
        ask = channel.unary_unary(method.path, method.request.SerializeToString, method.response.FromString)
        assert ask(request, timeout=20).arrays[0].data == LARGE.tobytes()


FAULTS = """
import resource, sys, threading
import numpy as np
from model_client import ModelClient
client, image = ModelClient("describe", addresses=[sys.argv[1]]), np.ones((1080, 1920, 3), np.uint8)
def faults(calls):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        client.run_image(image)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls
def run():
    faults(10)
    print(faults(30))
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc's malloc")
def test_no_call_faults_its_memory_anew(server: Server) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", FAULTS, server.address], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert float(ran.stdout or "inf") < 300, ran.stderr  # an image has 1519 pages
