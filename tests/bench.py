"""Measures the server: against a bare grpcio echo, its batching, its recovery (``make bench``).

Prints Markdown tables for BENCHMARKS.md. Machines are noisy: trust the ratios.
"""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model_client import AsyncModelClient, ModelClient  # noqa: E402
from tests.conftest import Server, running_engine  # noqa: E402
from tiny_model_server import codec, schemas  # noqa: E402
from tiny_model_server.engine.call import Call  # noqa: E402
from tiny_model_server.settings import Settings  # noqa: E402

SECONDS = float(os.environ.get("BENCH_SECONDS", "2"))
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
SHAPES = [(224, 224, 3), (480, 640, 3), (1080, 1920, 3)]
LENGTH = """
from model_interface import ModelInterface
class Model(ModelInterface):
    def run(self, data, args):
        return len(data)
"""
LENGTHS = f"""{LENGTH}    def run_batch(self, items, args):
        return [len(item) for item in items]
"""
BATCHES = """
import time
from model_interface import ModelInterface
class Model(ModelInterface):
    max_batch_size = 32
    def run(self, data, args):
        return self.run_batch([data], args)[0]
    def run_batch(self, items, args):
        time.sleep(({base} + {item} * len(items)) / 1000)
        return [1] * len(items)
"""
ANSWERS = """
import numpy as np
from model_interface import ModelInterface
class Model(ModelInterface):
    def __init__(self):
        self.made = {}
    def run(self, data, args):
        if not isinstance(data, str):
            return data if args.get("back") else len(data)
        shape = tuple(args["shape"])
        if shape not in self.made:
            self.made[shape] = np.ones(shape, args["dtype"])
        return self.made[shape]
"""
COSTS = {"heavy": (10, 0.5), "light": (2, 0.1)}  # ms a batch, ms an item
POLL_US = (0, 150, 300, 500)


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


def models() -> Path:
    """A folder with the models that are measured."""
    folder = ROOT / "build" / "bench-models"
    bodies = {name: BATCHES.format(base=base, item=item) for name, (base, item) in COSTS.items()} | {
        "length": LENGTH,
        "lengths": LENGTHS,
        "answers": ANSWERS,
    }
    for name, body in bodies.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "__init__.py").write_text(body)
    return folder


def echo_table(server: Server, stub: Any) -> None:
    """Every payload: bare, ModelClient over gRPC and by the local transport; with the CPU that a call takes."""
    text = "twenty bytes of text"
    payloads: dict[str, Any] = {"20 B text": text}
    for shape in SHAPES:
        payloads["x".join(map(str, shape))] = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    front = psutil.Process(server.process.pid)
    print("| payload | in flight | way | calls/s | p50 ms | p99 ms | p50 of bare | CPU ms: caller | front | worker |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    os.environ["TMS_LOCAL_TRANSPORT"] = "0"
    with server.client("length") as by_grpc:
        os.environ["TMS_LOCAL_TRANSPORT"] = "1"
        with server.client("length") as by_local:
            worker = psutil.Process(by_local.model_info()[0]["worker_pids"][0])
            processes = [psutil.Process(), front, worker]
            for name, data in payloads.items():
                raw = data.encode() if data is text else data.tobytes()
                ways: dict[str, Callable[[], Any]] = {"bare": lambda raw=raw: stub(raw)}
                for way, client in {"gRPC": by_grpc, "same host": by_local}.items():
                    run = client.run_text if data is text else client.run_image
                    ways[way] = lambda run=run, data=data: run(data)
                for at_once in (1, 8):
                    bare = 0.0
                    for way, call in ways.items():
                        before = [sum(one.cpu_times()[:2]) for one in processes]
                        rate, p50, p99 = measure(call, at_once)
                        used = [sum(one.cpu_times()[:2]) - was for one, was in zip(processes, before, strict=True)]
                        bare = bare or p50
                        cpu = [f"{1000 * one / (rate * SECONDS + 20):.2f}" for one in used]
                        cells = [name, at_once, way, f"{rate:.0f}", f"{p50:.2f}", f"{p99:.2f}", f"{p50 / bare:.2f}"]
                        print("|", " | ".join(map(str, [*cells, *(cpu if way != "bare" else "   ")])), "|", flush=True)


def answers_table(server: Server) -> None:
    """An array sent for a number, an array got for a text, and an image for an image; medians of five turns."""
    print("\n| array | way | sent | got | both | got / sent |\n| --- | --- | --- | --- | --- | --- |")
    for dtype, shape in [("float32", (32, 768)), ("bool", SHAPES[1][:2]), *(("uint8", shape) for shape in SHAPES)]:
        array = np.ones(shape, dtype)
        for way, os.environ["TMS_LOCAL_TRANSPORT"] in {"gRPC": "0", "same host": "1"}.items():
            with server.client("answers") as client:
                calls = [
                    partial(client.run, array),
                    partial(client.run, "x", {"shape": shape, "dtype": dtype}),
                    partial(client.run, array, {"back": True}),
                ]
                sent, got, both = np.median([[p50_of(call) for call in calls] for _ in range(5)], axis=0)
            name = f"{dtype} {'x'.join(map(str, shape))}"
            cells = [name, way, *(f"{figure:.2f}" for figure in (sent, got, both, got / sent))]
            print("|", " | ".join(cells), "|", flush=True)


def asyncio_table(server: Server) -> None:
    """``AsyncModelClient`` over gRPC and by the local transport, with one call in flight and with 16."""
    print("\n| asyncio | in flight | gRPC: p50 ms | calls/s | same host: p50 ms | calls/s |")
    print("| --- | --- | --- | --- | --- | --- |")

    async def measured(call: Callable[[], Any], at_once: int) -> tuple[float, float]:
        times: list[float] = []
        end = time.perf_counter() + SECONDS / 4

        async def caller() -> None:
            while (start := time.perf_counter()) < end:
                await call()
                times.append(time.perf_counter() - start)

        await asyncio.gather(*(caller() for _ in range(at_once)))
        return float(np.median(times)) * 1000, 4 * len(times) / SECONDS

    async def main() -> None:
        clients = []
        for os.environ["TMS_LOCAL_TRANSPORT"] in ("0", "1"):
            clients.append(AsyncModelClient("length", addresses=[server.address]))
            await asyncio.gather(*(clients[-1].run_text("x") for _ in range(20)))
        for shape in [(), *SHAPES]:
            image = np.zeros(shape, np.uint8)
            for at_once in (1, 16):
                calls = [partial(one.run_image, image) if shape else partial(one.run_text, "x" * 20) for one in clients]
                turns = [[figure for call in calls for figure in await measured(call, at_once)] for _ in range(5)]
                cells = [f"{figure:.2f}" if index % 2 == 0 else f"{figure:.0f}" for index, figure in
                         enumerate(np.median(turns, axis=0))]  # fmt: skip
                name = "x".join(map(str, shape)) or "20 B text"
                print("|", " | ".join([name, str(at_once), *cells]), "|", flush=True)
        for client in clients:
            await client.close()

    asyncio.run(main())


def map_table(server: Server) -> None:
    """Frames one call after the other, and by ``map``, on a model that takes one at a time and one that batches."""
    frames = [np.random.default_rng(number).integers(0, 256, SHAPES[1], np.uint8) for number in range(8)]
    print("\n| frames of 480x640x3 | run_image/s | map/s | ratio |\n| --- | --- | --- | --- |")
    for model in ("length", "lengths"):
        with server.client(model) as client:
            rates = []
            for _ in range(5):
                begun, count = time.perf_counter(), 0
                while time.perf_counter() - begun < SECONDS / 2:
                    client.run_image(frames[count % 8])
                    count += 1
                alone = count / (time.perf_counter() - begun)
                begun = time.perf_counter()
                for _ in client.map(frames[number % 8] for number in range(2 * count)):
                    pass
                rates.append((alone, 2 * count / (time.perf_counter() - begun)))
        alone, mapped = np.median(rates, axis=0)
        name = "a batch at once" if model == "lengths" else "one at a time"
        print(f"| {name} | {alone:.0f} | {mapped:.0f} | {mapped / alone:.2f} |", flush=True)


def batching_table(server: Server, stub: Any) -> None:
    """64 callers and one, on models that cost so much a batch and so much an item."""
    print("\n| model | callers | calls/s | ideal | part of it | p50 ms | the sleep alone, ms |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, (base, item) in COSTS.items():
        for callers in (1, 64):
            most = min(callers, 32)
            cost = base + item * most
            call = [sys.executable, __file__, "callers", server.address, name, str(callers), str(cost)]
            ran = subprocess.run(call, capture_output=True, text=True, check=True)
            rate, p50, _, alone = map(float, ran.stdout.split())
            ideal = most / cost * 1000
            cells = [f"{base} ms + {item} ms an item", callers, f"{rate:.0f}", f"{ideal:.0f}", f"{rate / ideal:.2f}"]
            print("|", " | ".join(map(str, [*cells, f"{p50:.2f}", f"{alone:.2f}"])), "|", flush=True)
    rate, p50, _ = measure(lambda: stub(b""), 64)
    print(f"| none: the bare echo | 64 | {rate:.0f} | | | {p50:.2f} | |", flush=True)


def busy_polling_table() -> None:
    """One caller of servers that poll for so long before they sleep, in turns, beside one that never polls."""
    os.environ["TMS_LOCAL_TRANSPORT"] = "1"
    servers = [Server(models(), TMS_BUSY_POLL_US=us) for us in POLL_US]
    columns: dict[str, list[Callable[[], Any]]] = {}
    for server in servers:
        clients = {name: server.client(name) for name in ("heavy", "light", "length")}
        for name, (base, _) in COSTS.items():
            columns.setdefault(f"{base} ms", []).append(partial(clients[name].run_text, "x"))
        columns.setdefault("20 B text", []).append(partial(clients["length"].run_text, "twenty bytes of text"))
        for shape in SHAPES:
            call = partial(clients["length"].run_image, np.zeros(shape, np.uint8))
            columns.setdefault("x".join(map(str, shape)), []).append(call)
    p50s = np.array([[[p50_of(call) for call in calls] for calls in columns.values()] for _ in range(10)])
    print("\n| us |", " | ".join(columns), "|\n| --- |" + " --- |" * len(columns))
    middle, ratios = np.median(p50s, axis=0), np.median(p50s / p50s[:, :, :1], axis=0)
    for number, us in enumerate(POLL_US):
        cells = [f"{ms:.2f} ({ratio:.2f})" for ms, ratio in zip(middle[:, number], ratios[:, number], strict=True)]
        print(f"| {us} |", " | ".join(cells), "|", flush=True)
    for server in servers:
        server.kill()


def p50_of(call: Callable[[], Any]) -> float:
    """The median time in ms of the calls of a quarter of a second."""
    times: list[float] = []
    end = time.perf_counter() + 0.25
    while (start := time.perf_counter()) < end:
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1000


def client_overhead(server: Server) -> None:
    """What ModelClient adds to a call of the bare stub with the same messages, to the same server."""
    method = schemas.methods("server", "server.Server")["RunText"]
    message = method.request(text="twenty bytes of text", model="length", accept_arrays=True)
    os.environ["TMS_LOCAL_TRANSPORT"] = "0"
    client = server.client("length")
    with grpc.insecure_channel(server.address) as channel:
        stub = channel.unary_unary(method.path, method.request.SerializeToString, method.response.FromString)
        ways = {"bare stub": lambda: stub(message), "ModelClient": lambda: client.run_text("twenty bytes of text")}
        print("\n| 20 B text, one caller | p50 ms | client CPU ms a call |\n| --- | --- | --- |")
        for _ in range(2):
            for name, call in ways.items():
                cpu = time.process_time()
                rate, p50, _ = measure(call, 1)
                calls = rate * SECONDS + 20
                print(f"| {name} | {p50:.3f} | {1000 * (time.process_time() - cpu) / calls:.3f} |", flush=True)
    client.close()


def hop() -> None:
    """The time through queue, worker process and back, for a model that takes no time."""
    logging.disable()
    value = codec.encode("x")
    with running_engine(Settings(models_dir=models())) as engine:
        engine.wait(engine.load("length"))
        _, p50, p99 = measure(lambda: engine.run("length", value, {}, Call()), 1)
    print(f"\nQueue, worker process and back, without gRPC: p50 {p50:.2f} ms, p99 {p99:.2f} ms.")


def recovery(server: Server) -> None:
    """The time from SIGKILL of the only worker to the next answer, and the calls of another model meanwhile."""
    client, other = server.client("length"), server.client("light")
    killed = []
    phases: dict[str, list[float]] = {"before": [], "during": [], "after": []}
    phase, end = "before", False

    def call_other() -> None:
        while not end:
            started = time.perf_counter()
            other.run_text("x")
            phases[phase].append((time.perf_counter() - started) * 1000)

    thread = threading.Thread(target=call_other)
    thread.start()
    time.sleep(2)
    phase = "during"
    for _ in range(10):
        client.run_text("x")
        os.kill(client.model_info()[0]["worker_pids"][0], signal.SIGKILL)
        started = time.perf_counter()
        client.run_text("x")
        killed.append((time.perf_counter() - started) * 1000)
    phase = "after"
    time.sleep(2)
    end = True
    thread.join()
    print("\n| first ms | median ms | worst ms |\n| --- | --- | --- |")
    print(f"| {killed[0]:.0f} | {np.median(killed):.0f} | {max(killed):.0f} |")
    print("\n| |", " | ".join(phases), "|\n| --- |" + " --- |" * len(phases))
    for name, percent in {"p50 ms": 50, "p99 ms": 99}.items():
        print(f"| {name} |", " | ".join(f"{np.percentile(times, percent):.2f}" for times in phases.values()), "|")


def callers(address: str, model: str, count: str, cost: str) -> None:
    """Prints rate, p50 and p99 of this many callers in this process, and the p50 of sleeping for the model's cost."""
    with ModelClient(model, addresses=[address]) as client:
        measured = measure(lambda: client.run_text("x"), int(count))
    print(*measured, measure(lambda: time.sleep(float(cost) / 1000), 1)[1])


def main() -> None:
    """Runs every measurement and prints the tables."""
    bare = subprocess.Popen([sys.executable, __file__, "bare"], stdout=subprocess.PIPE, text=True)
    assert bare.stdout
    server = Server(models=models())
    channel = grpc.insecure_channel(f"127.0.0.1:{bare.stdout.readline().strip()}", UNLIMITED)
    stub = channel.unary_unary("/bare.Echo/Call")
    try:
        echo_table(server, stub)
        answers_table(server)
        map_table(server)
        asyncio_table(server)
        batching_table(server, stub)
        client_overhead(server)
        recovery(server)
        hop()
        busy_polling_table()
    finally:
        channel.close()
        bare.kill()
        bare.wait()
        server.kill()


if __name__ == "__main__":
    if sys.argv[1:2] == ["callers"]:
        callers(*sys.argv[2:])
    else:
        {"bare": bare_echo}.get("".join(sys.argv[1:]), main)()
