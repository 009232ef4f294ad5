"""The same model on other servers, each in an environment of its own, beside this one (``make bench-peers``).

Prints a Markdown table for BENCHMARKS.md: mosec by HTTP with the bytes as the body, MLServer by
tritonclient over gRPC, this server by the same tritonclient and by ModelClient over gRPC and over the short cut. Every
server has two workers, every caller a kept-alive connection.
"""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model_client import ModelClient  # noqa: E402
from tests import bench  # noqa: E402
from tests.conftest import Server, wait_for  # noqa: E402

FOLDER = ROOT / "build" / "peers"
NEEDS = {
    "mosec": "mosec==0.9.8 numpy",
    "tritonclient": "tritonclient[grpc]==2.73.0",
    "mlserver": "mlserver==1.7.1 uvloop==0.21.0",
    "plot": "matplotlib==3.10.7",
}
TEXT = "twenty bytes of text"
MOSEC = """
import sys, numpy as np
from mosec import Server, Worker
class Length(Worker):
    def deserialize(self, data):
        return np.frombuffer(data, np.uint8)
    def forward(self, data):
        return len(data)
server = Server()
server.append_worker(Length, num=2)
server.run()
"""
MLSERVER = """
import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse
class Length(MLModel):
    async def predict(self, payload):
        data = NumpyCodec.decode_input(payload.inputs[0])
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("n", np.array([len(data)]))])
"""
OIP = """
import sys, threading, time
import numpy as np
import tritonclient.grpc as triton
address, size, at_once, seconds, model, output = sys.argv[1], *map(int, sys.argv[2:5]), *sys.argv[5:]
data = np.random.default_rng(0).integers(0, 256, size, np.uint8)
times = []
for _ in range(600):
    try:
        if triton.InferenceServerClient(address).is_model_ready(model): break
    except triton.InferenceServerException: pass
    time.sleep(0.1)
def caller():
    client = triton.InferenceServerClient(address)
    tensor = triton.InferInput("x", [size], "UINT8")
    tensor.set_data_from_numpy(data)
    for _ in range(20):
        assert client.infer(model, [tensor]).as_numpy(output) is not None
    ready.wait()
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        client.infer(model, [tensor])
        times.append(time.perf_counter() - start)
ready = threading.Barrier(at_once)
threads = [threading.Thread(target=caller) for _ in range(at_once)]
for thread in threads: thread.start()
for thread in threads: thread.join()
p50, p99 = np.percentile(times, [50, 99]) * 1000
print(len(times) / seconds, p50, p99)
"""
LENGTH = bench.LENGTH.replace("    def run", "    workers = 2\n    def run")
TENSOR = LENGTH.replace("return len(data)", "import numpy as np\n        return np.array([len(data)])")
SIDES = [32, 64, 128, 224, 384, 512, 720, 1024, 1440]
PLOT = """
import json, sys
import matplotlib
matplotlib.use("agg")
from matplotlib import pyplot
figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
for name, points in json.load(sys.stdin).items():
    axes.plot([pixels / 1e6 for pixels, _ in points], [ms for _, ms in points], "o-", label=name)
axes.set(xlabel="pixels of the image (millions, 3 bytes each)", ylabel="p50 of one caller, ms", ylim=0)
axes.legend()
axes.grid(alpha=0.3)
figure.savefig(sys.argv[1], dpi=110)
"""


def ports(count: int) -> list[int]:
    """Free ports."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    found = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return found


def python(name: str) -> Path:
    """The interpreter of a peer's environment, made at first."""
    program = FOLDER / name / "bin" / "python"
    if not (FOLDER / name / "ready").exists():
        print(f"installing {NEEDS[name]}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", FOLDER / name], check=True)
        subprocess.run([program, "-m", "pip", "install", "-q", *NEEDS[name].split()], check=True)
        (FOLDER / name / "ready").touch()
    return program


@contextlib.contextmanager
def running(command: list[Any], port: int, cwd: Path, **env: str) -> Iterator[None]:
    """A server's process, once it answers at the port."""
    log = (cwd / "log").open("w")
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | env,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for(answers, f"a server at {port}, see {cwd / 'log'}", timeout=60)
        time.sleep(3)
        yield
    finally:
        os.killpg(process.pid, 15)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
        log.close()


def script(name: str, text: str) -> Path:
    """The folder with this text as main.py."""
    folder = FOLDER / f"{name}-server"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "main.py").write_text(text)
    return folder


def by_http(port: int) -> Callable[[bytes], None]:
    """Posts bytes on a connection of the calling thread's own."""
    import threading

    mine = threading.local()

    def post(data: bytes) -> None:
        if not hasattr(mine, "connection"):
            mine.connection = http.client.HTTPConnection("127.0.0.1", port)
            mine.connection.connect()
            mine.connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        mine.connection.request("POST", "/inference", data)
        answer = mine.connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(answer.read())
        answer.read()

    return post


Row = dict[tuple[str, int], tuple[float, float, float]]


def payloads() -> dict[str, Any]:
    """What is sent, by the names of the table."""
    images = {"x".join(map(str, shape)): np.zeros(shape, np.uint8) for shape in bench.SHAPES}
    rng = np.random.default_rng(0)
    return {"20 B text": TEXT} | {name: rng.integers(0, 256, image.shape, np.uint8) for name, image in images.items()}


def measured(call: Callable[[Any], Any]) -> Row:
    """Every payload by one caller and by eight."""
    found: Row = {}
    for name, data in payloads().items():
        for at_once in (1, 8):
            found[name, at_once] = bench.measure(lambda data=data: call(data), at_once)
    return found


def by_tritonclient(address: str, model: str, output: str) -> Row:
    """The same, by tritonclient in a process of its own."""
    found: Row = {}
    for name, data in payloads().items():
        size = len(data) if isinstance(data, str) else data.nbytes
        for at_once in (1, 8):
            command = [python("tritonclient"), "-c", OIP, address, size, at_once, int(bench.SECONDS), model, output]
            ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
            if ran.returncode:
                raise RuntimeError(ran.stderr)
            rate, p50, p99 = map(float, ran.stdout.split())
            found[name, at_once] = rate, p50, p99
    return found


def mosec() -> Row:
    """mosec by HTTP."""
    (port,) = ports(1)
    folder = script("mosec", MOSEC)
    with running([python("mosec"), "main.py", "--port", port], port, folder):
        post = by_http(port)
        return measured(lambda data: post(data.encode() if isinstance(data, str) else data.tobytes()))


def mlserver() -> Row:
    """MLServer by tritonclient."""
    http_port, grpc_port, metrics_port = ports(3)
    folder = script("mlserver", MLSERVER)
    limits = {"grpc_max_message_length": 1 << 28, "parallel_workers": 2, "metrics_port": metrics_port}
    (folder / "settings.json").write_text(json.dumps({"http_port": http_port, "grpc_port": grpc_port} | limits))
    (folder / "model-settings.json").write_text('{"name": "length", "implementation": "main.Length"}')
    path = f"{python('mlserver').parent}:{os.environ['PATH']}"
    with running([python("mlserver").parent / "mlserver", "start", "."], grpc_port, folder, PATH=path):
        time.sleep(10)
        return by_tritonclient(f"127.0.0.1:{grpc_port}", "length", "n")


def ways(server: Server) -> Iterator[tuple[str, ModelClient]]:
    """ModelClient by the short cut, and without it."""
    for name, wanted in {"same host": "1", "gRPC": "0"}.items():
        os.environ["TMS_LANE"] = wanted
        with ModelClient("length", addresses=[server.address]) as client:
            yield name, client


def ours(server: Server) -> dict[str, Row]:
    """This server, three ways."""
    found: dict[str, Row] = {}
    for name, client in ways(server):
        found[f"ModelClient, {name}"] = measured(
            lambda data, client=client: client.run_text(data) if data is TEXT else client.run_image(data)
        )
    found["tritonclient"] = by_tritonclient(server.address, "tensor", "output")
    return found


def slopes(server: Server) -> dict[str, list[tuple[int, float]]]:
    """(pixels, p50 in ms) of square images of growing size, for each way."""
    found: dict[str, list[tuple[int, float]]] = {}
    for name, client in ways(server):
        for side in SIDES:
            image = np.zeros((side, side, 3), np.uint8)
            _, p50, _ = bench.measure(lambda client=client, image=image: client.run_image(image), 1)
            found.setdefault(name, []).append((side * side, p50))
    return found


def main() -> None:
    """Measures every server in turns, prints the tables and writes the plot."""
    folder = ROOT / "build" / "peer-models"
    for name, body in {"length": LENGTH, "tensor": TENSOR}.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "__init__.py").write_text(body)
    rows: dict[str, Row] = {"mosec": mosec(), "mlserver": mlserver()}
    server = Server(models=folder)
    try:
        rows |= {f"this server: {name}": row for name, row in ours(server).items()}
        points = slopes(server)
    finally:
        server.kill()
    columns = [(name, at_once) for at_once in (1, 8) for name in payloads()]
    titles = [f"{name}, p50 ms" if at_once == 1 else f"{name}, calls/s at 8" for name, at_once in columns]
    print("| server |", " | ".join(titles), "|\n| --- |" + " --- |" * len(columns))
    for name, row in rows.items():
        cells = [f"{row[key][1]:.2f}" if key[1] == 1 else f"{row[key][0]:.0f}" for key in columns]
        print("|", " | ".join([name, *cells]), "|", flush=True)
    image, other = (np.zeros((1440, 1440, 3), np.uint8) for _ in range(2))
    _, copy_ms, _ = bench.measure(lambda: np.copyto(other, image), 1)
    print(f"\nA copy in memory: {image.nbytes / copy_ms / 1e6:.1f} GB/s.")
    for name, line in points.items():
        slope, _ = np.polyfit([3 * pixels for pixels, _ in line], [ms for _, ms in line], 1)
        fit = np.corrcoef([pixels for pixels, _ in line], [ms for _, ms in line])[0, 1] ** 2
        print(f"{name}: {1 / slope / 1e6:.1f} GB/s beyond the first byte, r2 of the line {fit:.3f}.")
    command = [python("plot"), "-c", PLOT, ROOT / "docs" / "images.png"]
    subprocess.run([str(part) for part in command], input=json.dumps(points), text=True, check=True)


if __name__ == "__main__":
    main()
