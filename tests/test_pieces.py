"""Large arrays over gRPC in pieces: by our clients and by generated stubs, and what may go wrong on the way."""

import asyncio
import itertools
import platform
import subprocess
import sys
import threading
import time
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
from tiny_model_server import codec, errors, grpc_server, pieces, wire
from tiny_model_server.engine import Call

METHODS = wire.methods("server", "server.Server")
PIECE = wire.message("server", "server.Piece")
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


@pytest.fixture(autouse=True)
def over_grpc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMS_LANE", "0")


def used(client: Any) -> set[str]:
    """The ways in pieces that a client has gone."""
    return {method for method, _ in client._stubs if method.endswith("InPieces")}


def stub(channel: grpc.Channel, name: str) -> Any:
    """What a generated stub has for this method."""
    method = METHODS[name]
    make = getattr(channel, method.kind)
    return make(method.path, method.request.SerializeToString, method.response.FromString)


def answers(channel: grpc.Channel, way: str, sent: list[Any]) -> list[Any]:
    """The pieces that come back."""
    found = stub(channel, way)(iter(sent), timeout=20)
    return list(found) if METHODS[way].server_streaming else [found]


def described(image: np.ndarray, **place: int) -> dict[str, Any]:
    height, width, channels = image.shape
    place = {"offset": 0, "length": image.nbytes} | place
    return {"height": height, "width": width, "channels": channels, "place": place}


def cut(image: np.ndarray, model: str, step: int = 100_003, method: str = "RunImage", **place: int) -> list[Any]:
    """The pieces of a call with an image, cut by hand."""
    request = METHODS["RunImage"].request(image=described(image, **place), model=model, accept_arrays=True)
    first = PIECE(method=method, message=request.SerializeToString(), size=image.nbytes)
    data = image.tobytes()
    return [first, *(PIECE(data=data[at : at + step]) for at in range(0, len(data), step))]


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_values_of_all_kinds_both_ways(server: Server, value: Any) -> None:
    with server.client("echo") as client:
        for _ in range(3):
            np.testing.assert_equal(client.run(value), value)
        assert used(client) == {"SendInPieces", "InPieces"}  # the first answer was not known to be large
        answers = client.run_batch([value, 1, value])
        np.testing.assert_equal(answers, [value, 1, value])
        np.testing.assert_equal(client.submit(value).result(), value)


def test_images_and_answers_of_all_sizes_in_turns(server: Server) -> None:
    with server.client("echo") as client:
        for image in (LARGE, LARGE[:10, :10], LARGE[:800], LARGE[:100], LARGE, LARGE):
            assert np.array_equal(client.run_image_to_image(image), image)
            assert np.array_equal(client.run_image(image), image)
        assert np.array_equal(client.run_image_batch([LARGE, LARGE[:5]])[1], LARGE[:5])
        assert used(client) == {"SendInPieces", "GetInPieces", "InPieces"}


def test_answers_are_the_applications_own(server: Server) -> None:
    with server.client("echo") as client:
        kept = [client.run_image(LARGE ^ value) for value in range(8)]
        kept[0][:] = 7  # which is writable
        assert all(np.array_equal(answer, LARGE ^ value) for value, answer in enumerate(kept) if value)
        small = client.run([LARGE, np.arange(9)])[1]
        small = client.run([LARGE, small])[1]  # in pieces
        assert small.base is None or small.base.nbytes < 1000  # which does not hold the large one


@pytest.mark.parametrize("way", ["InPieces", "SendInPieces"])
def test_generated_stubs(server: Server, way: str) -> None:
    with grpc.insecure_channel(server.address, [("grpc.max_receive_message_length", -1)]) as channel:
        found = answers(channel, way, cut(LARGE, "echo"))
        request = METHODS["RunText"].request(text="x", model="echo", accept_arrays=True)
        one = PIECE(method="RunText", message=request.SerializeToString())
        (text,) = stub(channel, "GetInPieces")(one, timeout=20)
    assert (len(found) > 1) == (way == "InPieces")
    answer, data = METHODS["RunImage"].response.FromString(found[0].message), b"".join(one.data for one in found)
    assert found[0].size == len(data)
    place = answer.arrays[0].place
    assert data[place.offset : place.offset + place.length] == LARGE.tobytes()
    assert METHODS["RunText"].response.FromString(text.message).data == '"x"'


GOOD = cut(LARGE, "echo")
LIES = {
    "no piece": ([], "the pieces ended after 0 of at least one piece"),
    "one missing": (GOOD[:-1], "the pieces ended after"),
    "one too many": ([*GOOD, PIECE(data=b"x")], "more than the 6220800 bytes"),
    "a negative size": ([PIECE(method="RunImage", size=-1)], "a size of -1 bytes"),
    "no such method": (cut(LARGE, "echo", method="RunNothing"), "no method 'RunNothing' in pieces; there are RunText"),
    "a stream": (cut(LARGE, "echo", method="RunStream"), "no method 'RunStream'"),
    "itself": (cut(LARGE, "echo", method="InPieces"), "no method 'InPieces'"),
    "no request": ([PIECE(method="RunImage", message=b"\xff")], "the request is no server.ImageArgs"),
    "beyond the end": (cut(LARGE, "echo", offset=64), "do not lie in"),
    "not aligned": (cut(LARGE, "echo", offset=1), "aligned to 64"),
    "before the beginning": (cut(LARGE, "echo", offset=-64), "do not lie in"),
    "a length that does not fit": (cut(LARGE, "echo", length=64), "needs 6220800 bytes, but there are 64"),
}


@pytest.mark.parametrize(("sent", "message"), LIES.values(), ids=LIES)
def test_lies(server: Server, sent: list[Any], message: str) -> None:
    with grpc.insecure_channel(server.address) as channel:
        for way in ("SendInPieces", "InPieces"):
            with pytest.raises(grpc.RpcError) as failed:
                answers(channel, way, sent)
            assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT, failed.value.details()
            assert message in failed.value.details()
    with server.client("describe") as client:
        assert client.run_image(LARGE)["shape"] == list(LARGE.shape)


def test_what_is_no_piece(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        for way in ("SendInPieces", "InPieces"):
            raw = getattr(channel, METHODS[way].kind)(METHODS[way].path)
            with pytest.raises(grpc.RpcError, match=r"the request is no server\.Piece"):
                list(raw(iter([b"\xff\xff"]), timeout=20))


def test_nobody_reads_what_others_have_sent(server: Server) -> None:
    """The memory is used again, and larger than what this caller sends."""
    secret, mine = np.full((1080, 1920, 3), 0x55, np.uint8), np.full((480, 640, 3), 1, np.uint8)
    with server.client("echo") as client, grpc.insecure_channel(server.address) as channel:
        for offset in (0, 64, mine.nbytes, mine.nbytes + 64):
            assert client.run_image(secret).shape == secret.shape
            lie = cut(mine, "echo", offset=offset)
            lie[0].size = mine.nbytes
            if not offset:
                stub(channel, "SendInPieces")(iter(lie), timeout=20)
                continue
            with pytest.raises(grpc.RpcError, match="do not lie in"):
                stub(channel, "SendInPieces")(iter(lie), timeout=20)


def test_more_than_the_server_takes(start_server: Callable[..., Server], tmp_path: Path) -> None:
    body = (
        "    def run(self, data, args):\n        import numpy\n        return numpy.zeros(args.get('size', 1), 'uint8')"
    )
    server = start_server(write_model(tmp_path / "models", "zeros", body), TMS_MAX_MESSAGE_MB=4)
    begun = time.monotonic()
    with server.client("zeros") as client:
        with pytest.raises(model_client.Overloaded, match=r"6220800 bytes, more than TMS_MAX_MESSAGE_MB allows"):
            client.run_image(LARGE)
        assert client.run_image(LARGE[:600]).nbytes == 1
        for size, way in ((3 << 20, "Run"), (4 << 20, "GetInPieces")):  # the first tells the client that they are large
            assert client.run(1, {"size": size}).nbytes == size
            assert ("GetInPieces" in used(client)) == (way == "GetInPieces")
        with pytest.raises(model_client.Overloaded, match=r"5242880 bytes, more than TMS_MAX_MESSAGE_MB allows"):
            client.run(1, {"size": 5 << 20})
    assert time.monotonic() - begun < 10  # nothing of it is tried again


def test_no_memory_is_no_fault() -> None:
    def none(size: int) -> np.ndarray:
        raise OSError(12, "Cannot allocate memory")

    with pytest.raises(errors.Overloaded, match="no memory for 5 bytes: .* Cannot allocate memory"):
        pieces.Gathered(none).add(PIECE(size=5), None)


def test_failed_calls_leave_their_memory_to_the_next(server: Server) -> None:
    process = psutil.Process(server.process.pid)
    with server.client("misbehave") as client:

        def fail() -> None:
            with pytest.raises(model_client.ModelFailed):
                client.run(ODD, {"do": "raise"})

        fail()
        before = process.num_fds()
        for _ in range(20):
            fail()
            assert process.num_fds() <= before


def test_a_server_that_knows_no_pieces() -> None:
    """The client learns it once, and sends one message."""
    asked: list[str] = []

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        image = METHODS["RunImage"].request.FromString(request).image
        shape = image.height, image.width, image.channels
        back = {"dtype": "uint8", "shape": shape, "data": image.data}
        return METHODS["RunImage"].response(data=codec.ARRAY, arrays=[back]).SerializeToString()  # type: ignore[no-any-return]

    class Old(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            asked.append(details.method.rpartition("/")[2])
            return grpc.unary_unary_rpc_method_handler(answer) if details.method.endswith("/RunImage") else None

    old = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1)])
    old.add_generic_rpc_handlers([Old()])
    port = old.add_insecure_port("127.0.0.1:0")
    old.start()

    async def ask() -> None:
        async with AsyncModelClient("any", "127.0.0.1", port) as client:
            for image in (LARGE, LARGE[:5], LARGE, LARGE[:5]):
                assert np.array_equal(await client.run_image(image), image)

    with ModelClient("any", "127.0.0.1", port) as client:
        for _ in range(2):
            assert np.array_equal(client.run_image(LARGE), LARGE)
    assert [name for name in asked if name.endswith(("Image", "Pieces"))] == ["SendInPieces", "RunImage", "RunImage"]
    asked.clear()
    asyncio.run(ask())
    assert [name for name in asked if name.endswith(("Image", "Pieces"))] == [
        "RunImage",
        "GetInPieces",
        *["RunImage"] * 3,
    ]
    old.stop(0)


def test_callers_that_vanish_leave_nothing(start_server: Callable[..., Server]) -> None:
    server = start_server(TMS_THREADS=4)
    process, sent, over = psutil.Process(server.process.pid), threading.Semaphore(0), threading.Event()

    def forever() -> Iterator[Any]:
        yield from cut(LARGE, "echo")[:10]
        sent.release()
        over.wait(60)

    def vanish() -> None:
        with grpc.insecure_channel(server.address) as channel:
            calls = [stub(channel, way)(forever(), timeout=60) for way in ("InPieces",) * 3]
            assert all(sent.acquire(timeout=10) for _ in calls)
            for call in calls:
                call.cancel()

    with server.client("echo") as client:
        assert client.run_text("x") == "x"
        before = process.num_fds(), process.memory_info().rss
        for _ in range(20):
            vanish()
        assert np.array_equal(client.run_image(LARGE), LARGE)
        # Four memories are kept for the next calls, each with a socket, two files and, in mappings, these files again.
        wait_for(lambda: process.num_fds() <= before[0] + 4 * 5, "the memory to be let go")
        assert process.memory_info().rss < before[1] + (64 << 20)
    over.set()
    assert not [line for line in server.log if "failed" in line]


def test_what_grpc_keeps_of_a_caller_that_has_gone() -> None:
    """Is the error that it raises, which must not hold the call and its bytes."""
    gone = grpc.RpcError()

    def data() -> Iterator[bytes]:
        yield PIECE(size=1).SerializeToString()
        raise gone

    with pytest.raises(errors.Cancelled):
        list(grpc_server._requests(METHODS["InPieces"], data(), Call()))
    assert gone.__traceback__ is None


def test_very_large_memory_is_given_back(server: Server) -> None:
    """By server and worker, who map it."""
    value = np.zeros(100 << 20, np.uint8)
    with server.client("echo") as client:
        assert np.array_equal(client.run(LARGE), LARGE)
        before = psutil.virtual_memory().shared
        for _ in range(3):
            assert client.run(value).nbytes == value.nbytes
        wait_for(lambda: psutil.virtual_memory().shared < before + (50 << 20), "the memory to be given back")
        assert np.array_equal(client.run(LARGE), LARGE)


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


def test_a_model_may_keep_what_came_in_pieces(server: Server) -> None:
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


def test_calls_that_end_while_pieces_come(server: Server) -> None:
    with server.client("echo") as client, server.client("unknown") as unknown:
        unknown._answer_large.add("RunImage")
        client.run_text("x")
        for round_ in range(20):
            with pytest.raises(model_client.DeadlineExceeded):
                client.run_image(LARGE, timeout=0.001 + 0.0001 * round_)
            with pytest.raises(model_client.ModelNotFound):
                unknown.run_image(LARGE[:5] if round_ % 2 else LARGE)
            if not round_ % 5:
                assert np.array_equal(client.run_image(LARGE), LARGE)


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


def test_asyncio(server: Server) -> None:
    async def calls() -> None:
        async with AsyncModelClient("echo", addresses=[server.address]) as client:
            for image in (LARGE, LARGE[:5], LARGE, LARGE[:5]):
                assert np.array_equal(await client.run_image(image), image)
            assert used(client) == {"GetInPieces"}
            answers = await asyncio.gather(*(client.run_image(LARGE ^ value) for value in range(6)))
            assert all(np.array_equal(answer, LARGE ^ value) for value, answer in enumerate(answers))
        for model, error in {"unknown": model_client.ModelNotFound, "misbehave": model_client.DeadlineExceeded}.items():
            async with AsyncModelClient(model, addresses=[server.address]) as client:
                client._answer_large.add("Run")
                with pytest.raises(error):
                    await client.run(1, {"do": "hang"}, timeout=0.5)
                assert used(client) == {"GetInPieces"}
        async with AsyncModelClient("misbehave", addresses=[server.address]) as client:
            client._answer_large.add("Run")
            with pytest.raises(TimeoutError):  # which cancels the call
                await asyncio.wait_for(client.run(1, {"do": "hang"}), 0.5)
            assert used(client) == {"GetInPieces"}
            assert await client.run(1)  # waits for the worker that hangs to be replaced

    asyncio.run(calls())


def test_the_layout_of_both_ends() -> None:
    """What is cut by one end is gathered by the other, whatever the sizes."""
    for sizes in itertools.product((0, 1, 64, pieces.LARGE + 1), repeat=3):
        arrays = [RANDOM.integers(0, 256, size, np.uint8) for size in sizes]
        places, size = pieces.layout(arrays)
        for whole in (False, True):
            gathered = pieces.Gathered(lambda size: np.empty(size, np.uint8))
            for piece in pieces.cut(PIECE, arrays, whole=whole, method="m"):
                gathered.add(*wire.parsed(PIECE, wire.serialized(piece)))
            assert gathered.end().method == "m"
            assert gathered.data.nbytes == size
            for (offset, *_), array in zip(places, arrays, strict=True):
                assert gathered.data[offset : offset + array.nbytes].tobytes() == codec.raw(array).tobytes()
