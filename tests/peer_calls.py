"""Callers of one server, in a process of their own: ``peer_calls.py WAY ADDRESS ...``, started by ``peer_servers.py``.

It prints "up" when the server has answered a first call. Then it reads lines with a payload, a number of callers, and
seconds. For each it prints "ready" when the callers are connected and warm, and starts them at the next line. It prints
JSON: the calls, the seconds that they took, their p50 in ms, and the CPU seconds of this process. Each answer is
checked.

It runs in environments that have other packages, so each way imports what it needs.
"""

import functools
import http.client
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

TEXT = "twenty bytes of text"
START_S = 60.0
WARM_S, WARM_CALLS = 0.25, 20
LEAST = 3
"""Calls of each caller, however slow they are."""

Connect = Callable[[np.ndarray], Any]
"""A context manager that connects. It gives a function that sends the bytes, and returns the length in the answer."""


def http_calls(address: str, path: str, form: str = "") -> Connect:
    """The bytes as the body, or in a form."""

    @contextmanager
    def connect(array: np.ndarray) -> Iterator[Callable[[], int]]:
        connection = http.client.HTTPConnection(address)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        body, kind = memoryview(array).cast("B"), "application/octet-stream"
        if form:
            kind = "multipart/form-data; boundary=xxx"
            head = b'Content-Disposition: form-data; name="data"; filename="data"'
            body = memoryview(b"--xxx\r\n" + head + b"\r\n\r\n" + bytes(body) + b"\r\n--xxx--\r\n")
        headers = {"Content-Type": kind, "Content-Length": str(len(body))}

        def call() -> int:
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            said = answer.read().decode()
            assert answer.status == 200, said
            return int("".join(filter(str.isdigit, said)))

        yield call
        connection.close()

    return connect


def open_inference(address: str, model: str, output: str) -> Connect:
    """tritonclient, with the bytes as a tensor."""
    import tritonclient.grpc as triton

    @contextmanager
    def connect(array: np.ndarray) -> Iterator[Callable[[], int]]:
        tensor = triton.InferInput("x", [array.size], "UINT8")

        def call() -> int:
            tensor.set_data_from_numpy(array.reshape(-1))
            return int(client.infer(model, [tensor]).as_numpy(output).item())

        with triton.InferenceServerClient(address) as client:
            yield call

    return connect


def grpc_calls(address: str) -> Connect:
    """grpcio, with the bytes as the only field of a message."""
    import grpc
    from google.protobuf.wrappers_pb2 import BytesValue, Int64Value

    @contextmanager
    def connect(array: np.ndarray) -> Iterator[Callable[[], int]]:
        with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = channel.unary_unary("/peers.Peer/Length", BytesValue.SerializeToString, Int64Value.FromString)
            yield lambda: int(stub(BytesValue(value=array.tobytes()), timeout=60).value)

    return connect


def model_client(address: str, model: str, shared: str = "") -> Connect:
    """``ModelClient``, one for all callers; a text as such, and an image as such or in a ``shared_array``."""
    from model_client import ModelClient, shared_array

    client = ModelClient(model, addresses=[address])

    @functools.cache
    def in_shared_memory(shape: tuple[int, ...]) -> Any:
        return shared_array(shape)

    @contextmanager
    def connect(array: np.ndarray) -> Iterator[Callable[[], int]]:
        if array.ndim == 1:
            text = array.tobytes().decode()
            yield lambda: int(client.run_text(text))
            return
        sent = array
        if shared:
            sent = in_shared_memory(array.shape)
            sent[:] = array
        yield lambda: int(client.run_image(sent))

    return connect


WAYS: dict[str, Callable[..., Connect]] = {
    "http": http_calls,
    "open_inference": open_inference,
    "grpc": grpc_calls,
    "model_client": model_client,
}


def bytes_of(payload: str) -> np.ndarray:
    """The array that a payload's name stands for: a text's bytes, or an image of that shape."""
    if payload == "20 B text":
        return np.frombuffer(TEXT.encode(), np.uint8).copy()
    return np.random.default_rng(0).integers(0, 256, [int(side) for side in payload.split("x")], np.uint8)


def wait_until_it_answers(connect: Connect) -> None:
    """Calls until it is answered."""
    end = time.monotonic() + START_S
    while True:
        try:
            with connect(bytes_of("20 B text")) as call:
                assert call() == len(TEXT)
            return
        except Exception:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def measure(connect: Connect, array: np.ndarray, count: int, seconds: float) -> dict[str, float]:
    """Calls for so many seconds from so many threads."""
    times: list[float] = []
    failed: list[BaseException] = []
    ready, go = threading.Barrier(count + 1), threading.Event()
    begun = 0.0

    def checked(call: Callable[[], int]) -> None:
        found = call()
        assert found == array.nbytes, f"{array.nbytes} bytes came back as {found}"

    def warm(call: Callable[[], int]) -> None:
        end = time.monotonic() + WARM_S
        for done in range(WARM_CALLS):
            if done < LEAST or time.monotonic() < end:
                checked(call)

    def caller() -> None:
        try:
            with connect(array) as call:
                warm(call)
                ready.wait()
                go.wait()
                done = 0
                while (start := time.perf_counter()) - begun < seconds or done < LEAST:
                    checked(call)
                    times.append(time.perf_counter() - start)
                    done += 1
        except BaseException as error:
            failed.append(error)
            ready.abort()

    threads = [threading.Thread(target=caller) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        ready.wait()
        print("ready", flush=True)
        sys.stdin.readline()
    except threading.BrokenBarrierError:
        pass  # the caller's own error is raised below
    cpu, begun = time.process_time(), time.perf_counter()
    go.set()
    for thread in threads:
        thread.join()
    took, cpu = time.perf_counter() - begun, time.process_time() - cpu
    if failed:
        raise failed[0]
    return {"calls": len(times), "seconds": took, "p50": float(np.median(times)) * 1000, "cpu": cpu}


def main(way: str, *arguments: str) -> None:
    """Serves the lines of standard input."""
    connect = WAYS[way](*arguments)
    wait_until_it_answers(connect)
    print("up", flush=True)
    for line in sys.stdin:
        payload, count, seconds = line.rstrip("\n").split("\t")
        print(json.dumps(measure(connect, bytes_of(payload), int(count), float(seconds))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
