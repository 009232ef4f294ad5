"""The same model on other servers, each in an environment of its own, beside this one (``make bench-peers``).

Prints Markdown tables for BENCHMARKS.md: mosec, BentoML and LitServe by HTTP (the bytes as the body, in a form for
LitServe), Triton and MLServer by tritonclient over gRPC, this server by the same tritonclient and by ModelClient over
gRPC and over the short cut. Every server has two workers, every caller a kept-alive connection. Then what open doors
cost one another.
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
from tiny_model_server.grpc_server import DOORS  # noqa: E402

FOLDER = ROOT / "build" / "peers"
NEEDS = {
    "mosec": "mosec==0.9.8 numpy",
    "litserve": "litserve==0.2.19 python-multipart==0.0.20",
    "bentoml": "bentoml==1.4.39",
    "triton": "nvidia-pytriton==0.7.0",
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
LITSERVE = """
import sys, litserve
from fastapi import Request
class Length(litserve.LitAPI):
    def setup(self, device):
        pass
    def decode_request(self, request: Request):
        return request["data"].file.read()
    def predict(self, data):
        return len(data)
    def encode_response(self, length):
        return {"length": length}
if __name__ == "__main__":
    server = litserve.LitServer(Length(api_path="/inference"), accelerator="cpu", workers_per_device=2)
    server.run(port=int(sys.argv[2]), generate_client_file=False, log_level="warning")
"""
BENTOML = """
from pathlib import Path
from typing import Annotated
import bentoml
from bentoml.validators import ContentType
@bentoml.service(workers=2)
class Length:
    @bentoml.api(route="/inference")
    def length(self, data: Annotated[Path, ContentType("application/octet-stream")], /) -> int:
        return len(data.read_bytes())
"""
TRITON = """
import sys, numpy as np
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig
def length(requests):
    return [{"n": np.array([len(request["x"])])} for request in requests]
if __name__ == "__main__":  # its workers import this file
    grpc_port, http_port, metrics_port = map(int, sys.argv[1:])
    x, n = Tensor(name="x", dtype=np.uint8, shape=(-1,)), Tensor(name="n", dtype=np.int64, shape=(1,))
    config = TritonConfig(grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port)
    with Triton(config=config) as triton:
        triton.bind("length", [length, length], [x], [n], config=ModelConfig(batching=False))
        triton.serve()
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
DOOR_TURNS = 5
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


def by_http(port: int, form: bool = False) -> Callable[[bytes], None]:
    """Posts bytes, as the body or in a form, on a connection of the calling thread's own."""
    import threading

    mine = threading.local()

    def post(data: bytes) -> None:
        if not hasattr(mine, "connection"):
            mine.connection = http.client.HTTPConnection("127.0.0.1", port)
            mine.connection.connect()
            mine.connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        kind = "application/octet-stream"
        if form:
            kind = "multipart/form-data; boundary=xxx"
            data = (
                b'--xxx\r\nContent-Disposition: form-data; name="data"; filename="f"\r\n\r\n'
                + data
                + b"\r\n--xxx--\r\n"
            )
        mine.connection.request("POST", "/inference", data, {"Content-Type": kind})
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
            found[name, at_once] = by_tritonclient_once(address, size, at_once, model, output)
    return found


def by_tritonclient_once(address: str, size: int, at_once: int, model: str, output: str) -> tuple[float, float, float]:
    """(calls a second, p50, p99 in ms) of so many callers that send so many bytes."""
    command = [python("tritonclient"), "-c", OIP, address, size, at_once, int(bench.SECONDS), model, output]
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(ran.stderr)
    rate, p50, p99 = map(float, ran.stdout.split())
    return rate, p50, p99


def http_peer(name: str, text: str, *command: str) -> Row:
    """A server that answers HTTP: by default its script is run by Python."""
    (port,) = ports(1)
    folder = script(name, text)
    with running([python(name), *(command or ["main.py"]), "--port", port], port, folder):
        time.sleep(10)
        post = by_http(port, form=name == "litserve")
        return measured(lambda data: post(data.encode() if isinstance(data, str) else data.tobytes()))


def triton() -> Row:
    """Triton by tritonclient, started by pytriton."""
    chosen = ports(3)
    program = python("triton")
    # Its workers' program must find the library of the interpreter that made the environment, not the system's.
    ask = [program, "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"]
    libraries = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    with running([program, "main.py", *chosen], chosen[0], script("triton", TRITON), LD_LIBRARY_PATH=libraries):
        return by_tritonclient(f"127.0.0.1:{chosen[0]}", "length", "n")


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


def doors(folder: Path) -> None:
    """Prints what the other doors cost a call: one door open and all of them, in turns."""
    every = ",".join(DOORS)
    servers = {
        "native": [Server(models=folder, TMS_DOORS="native"), Server(models=folder, TMS_DOORS=every)],
        "open_inference": [Server(models=folder, TMS_DOORS="open_inference"), Server(models=folder, TMS_DOORS=every)],
    }
    print("\n| door | payload | alone, p50 ms | with all others | ratio |\n| --- | --- | --- | --- | --- |")
    try:
        for door, pair in servers.items():
            for name, data in payloads().items():
                found: list[list[float]] = [[], []]
                for _ in range(DOOR_TURNS):
                    for server, times in zip(pair, found, strict=True):
                        times.append(door_ms(door, server, data))
                alone, among = (float(np.median(times)) for times in found)
                print(f"| {door} | {name} | {alone:.3f} | {among:.3f} | {among / alone:.2f} |", flush=True)
    finally:
        for pair in servers.values():
            for server in pair:
                server.kill()


def door_ms(door: str, server: Server, data: Any) -> float:
    """p50 of one caller at a door, over gRPC."""
    if door == "open_inference":
        size = len(data) if isinstance(data, str) else data.nbytes
        return by_tritonclient_once(server.address, size, 1, "tensor", "output")[1]
    os.environ["TMS_LANE"] = "0"
    with ModelClient("length", addresses=[server.address]) as client:
        return bench.measure(lambda: client.run_text(data) if data is TEXT else client.run_image(data), 1)[1]


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
    rows: dict[str, Row] = {
        "mosec": http_peer("mosec", MOSEC),
        "LitServe": http_peer("litserve", LITSERVE, "main.py"),
        "BentoML": http_peer("bentoml", BENTOML, "-m", "bentoml", "serve", "main:Length"),
        "Triton": triton(),
        "MLServer": mlserver(),
    }
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
    doors(folder)
    command = [python("plot"), "-c", PLOT, ROOT / "docs" / "images.png"]
    subprocess.run([str(part) for part in command], input=json.dumps(points), text=True, check=True)


if __name__ == "__main__":
    main()
