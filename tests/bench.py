"""Measures the server against a bare grpcio echo of the same payload, in one run: ``make bench``.

Prints a Markdown table for BENCHMARKS.md. Machines are noisy: trust the ratios.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.conftest import Server  # noqa: E402

SECONDS = 2.0
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
SHAPES = [(224, 224, 3), (480, 640, 3), (1080, 1920, 3)]
MODEL = """
from model_interface import ModelInterface
class Model(ModelInterface):
    def run(self, data, args):
        return len(data)
"""


def bare_echo() -> None:
    """Serves a grpcio method that answers two bytes to any payload, until killed."""
    server = grpc.server(ThreadPoolExecutor(16), options=UNLIMITED)
    handler = grpc.unary_unary_rpc_method_handler(lambda data, context: b"ok")
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("bare.Echo", {"Call": handler})])
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    server.wait_for_termination()


def measure(call: Callable[[], Any], at_once: int) -> tuple[float, float, float]:
    """(calls a second, p50 in ms, p99 in ms) of ``call`` from this many threads."""
    for _ in range(20):
        call()
    times: list[float] = []
    end = time.perf_counter() + SECONDS

    def caller() -> None:
        while (start := time.perf_counter()) < end:
            call()
            times.append(time.perf_counter() - start)

    threads = [threading.Thread(target=caller) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    p50, p99 = np.percentile(times, [50, 99]) * 1000
    return len(times) / SECONDS, p50, p99


def main() -> None:
    """Runs every measurement and prints the table."""
    bare = subprocess.Popen([sys.executable, __file__, "bare"], stdout=subprocess.PIPE, text=True)
    assert bare.stdout
    folder = ROOT / "build" / "bench-models" / "length"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text(MODEL)
    server = Server(models=folder.parent)
    channel = grpc.insecure_channel(f"127.0.0.1:{bare.stdout.readline().strip()}", UNLIMITED)
    stub = channel.unary_unary("/bare.Echo/Call")
    client = server.client("length")
    text = "twenty bytes of text"
    rows: list[tuple[str, Callable[[], Any], Callable[[], Any]]] = [
        ("20 B text", lambda: stub(text.encode()), lambda: client.run_text(text))
    ]
    for shape in SHAPES:
        image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        data = image.tobytes()
        name = "x".join(map(str, shape))
        rows.append((name, lambda data=data: stub(data), lambda image=image: client.run_image(image)))
    print(
        "| payload | in flight | bare: calls/s | p50 ms | p99 ms | ours: calls/s | p50 ms | p99 ms | p50 ours / bare |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    try:
        for name, bare_call, our_call in rows:
            for at_once in (1, 8):
                theirs, ours = measure(bare_call, at_once), measure(our_call, at_once)
                figures = [f"{rate:.0f} | {p50:.2f} | {p99:.2f}" for rate, p50, p99 in (theirs, ours)]
                print(f"| {name} | {at_once} | {figures[0]} | {figures[1]} | {ours[1] / theirs[1]:.2f} |", flush=True)
    finally:
        client.close()
        channel.close()
        bare.kill()
        bare.wait()
        server.kill()


if __name__ == "__main__":
    bare_echo() if sys.argv[1:] == ["bare"] else main()
