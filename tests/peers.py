"""The same model on other servers, each in an environment of its own, beside this one (``make bench-peers``).

Prints Markdown tables for BENCHMARKS.md: mosec, BentoML and LitServe by HTTP (the bytes as the body, in a form for
LitServe), Triton and MLServer by tritonclient over gRPC, this server by the same tritonclient and by ModelClient over
gRPC and over the local transport. Every server has two workers, every caller a kept-alive connection. All servers run
at the same time, and each figure is the median of several turns, since machines are noisy. Then what the other
protocols cost.
"""

import contextlib
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

from tests import bench  # noqa: E402
from tests.conftest import Server, wait_for  # noqa: E402
from tiny_model_server.server.grpc_server import PROTOCOLS  # noqa: E402

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
CALLER = """
import http.client, socket, sys, threading, time
import numpy as np
address, payload, at_once, seconds, *rest = sys.argv[1:]
if payload == "20 B text":
    data = "twenty bytes of text"
    array = np.frombuffer(data.encode(), np.uint8)
else:
    data = array = np.random.default_rng(0).integers(0, 256, [int(side) for side in payload.split("x")], np.uint8)
{connect}
times = []
def caller():
    call = connect()
    for _ in range(20):
        call()
    ready.wait()
    end = time.perf_counter() + float(seconds)
    while (start := time.perf_counter()) < end:
        call()
        times.append(time.perf_counter() - start)
ready = threading.Barrier(int(at_once))
threads = [threading.Thread(target=caller) for _ in range(int(at_once))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(times) / float(seconds), np.median(times) * 1000)
"""
BY_HTTP = """
def connect():
    connection = http.client.HTTPConnection(address)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    body, kind = memoryview(array).cast("B"), "application/octet-stream"
    if rest == ["form"]:
        kind = "multipart/form-data; boundary=xxx"
        head = b'Content-Disposition: form-data; name="data"; filename="data"'
        body = b"--xxx\\r\\n" + head + b"\\r\\n\\r\\n" + bytes(body) + b"\\r\\n--xxx--\\r\\n"
    def call():
        connection.request("POST", "/inference", body, {"Content-Type": kind, "Content-Length": str(len(body))})
        answer = connection.getresponse()
        assert (answer.status, int("".join(filter(str.isdigit, answer.read().decode())))) == (200, array.nbytes)
    return call
"""
BY_OIP = """
import tritonclient.grpc as triton
model, output = rest
for _ in range(600):
    try:
        if triton.InferenceServerClient(address).is_model_ready(model): break
    except triton.InferenceServerException: pass
    time.sleep(0.1)
def connect():
    client = triton.InferenceServerClient(address)
    tensor = triton.InferInput("x", [array.size], "UINT8")
    def call():
        tensor.set_data_from_numpy(array.reshape(-1))
        assert client.infer(model, [tensor]).as_numpy(output)[0] == array.nbytes
    return call
"""
BY_MODEL_CLIENT = """
from model_client import ModelClient, shared_array
client = ModelClient("length", addresses=[address])
if rest == ["shared_array"] and data is array:
    data = shared_array(array.shape)
    data[:] = array
def connect():
    return (lambda: client.run_text(data)) if isinstance(data, str) else (lambda: client.run_image(data))
"""
LENGTH = bench.LENGTH.replace("    def run", "    workers = 2\n    def run")
TENSOR = LENGTH.replace("return len(data)", "import numpy as np\n        return np.array([len(data)])")
PAYLOADS = ["20 B text", *("x".join(map(str, shape)) for shape in bench.SHAPES)]
MALLOC = {  # what docs/tuning.md advises for callers with large arrays
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
    "MALLOC_TOP_PAD_": "67108864",
}
_CALL_S = 0.0003  # about the time between two calls of one caller
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


Caller = Callable[[str, int], tuple[float, float]]
"""(calls a second, p50 in ms) of a payload by so many callers."""


def caller(program: Any, connect: str, address: str, *rest: str, **env: str) -> Caller:
    """Callers in a process of their own, made anew for each measurement."""

    def call(payload: str, at_once: int) -> tuple[float, float]:
        code = CALLER.format(connect=connect)
        command = [program, "-c", code, address, payload, at_once, bench.SECONDS, *rest]
        ran = subprocess.run(
            [str(part) for part in command], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False
        )
        if ran.returncode:
            raise RuntimeError(ran.stderr)
        rate, p50 = map(float, ran.stdout.split())
        return rate, p50

    return call


@contextlib.contextmanager
def http_peer(name: str, text: str, *command: str) -> Iterator[Caller]:
    """A server that answers HTTP."""
    (port,) = ports(1)
    folder = script(name, text)
    with running([python(name), *command, "--port", port], port, folder):
        yield caller(sys.executable, BY_HTTP, f"127.0.0.1:{port}", *(["form"] if name == "litserve" else []))


@contextlib.contextmanager
def triton() -> Iterator[Caller]:
    """Triton by tritonclient, started by pytriton."""
    chosen = ports(3)
    program = python("triton")
    # Its workers must find the library of the interpreter that made the environment, not the system's.
    ask = [program, "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"]
    libraries = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    with running([program, "main.py", *chosen], chosen[0], script("triton", TRITON), LD_LIBRARY_PATH=libraries):
        yield caller(python("tritonclient"), BY_OIP, f"127.0.0.1:{chosen[0]}", "length", "n")


@contextlib.contextmanager
def mlserver() -> Iterator[Caller]:
    """MLServer by tritonclient."""
    http_port, grpc_port, metrics_port = ports(3)
    folder = script("mlserver", MLSERVER)
    limits = {"grpc_max_message_length": 1 << 28, "parallel_workers": 2, "metrics_port": metrics_port}
    (folder / "settings.json").write_text(json.dumps({"http_port": http_port, "grpc_port": grpc_port} | limits))
    (folder / "model-settings.json").write_text('{"name": "length", "implementation": "main.Length"}')
    path = f"{python('mlserver').parent}:{os.environ['PATH']}"
    with running([python("mlserver").parent / "mlserver", "start", "."], grpc_port, folder, PATH=path):
        yield caller(python("tritonclient"), BY_OIP, f"127.0.0.1:{grpc_port}", "length", "n")


@contextlib.contextmanager
def ours(folder: Path, **settings: str) -> Iterator[dict[str, Caller]]:
    """This server, in several ways."""
    server = Server(models=folder, **settings)
    address = server.address
    try:
        yield {
            "ModelClient, same host": caller(sys.executable, BY_MODEL_CLIENT, address, TMS_LOCAL_TRANSPORT="1"),
            "ModelClient, shared_array": caller(
                sys.executable, BY_MODEL_CLIENT, address, "shared_array", TMS_LOCAL_TRANSPORT="1"
            ),
            "ModelClient, gRPC": caller(sys.executable, BY_MODEL_CLIENT, address, TMS_LOCAL_TRANSPORT="0"),
            "ModelClient, gRPC, malloc set": caller(
                sys.executable, BY_MODEL_CLIENT, address, TMS_LOCAL_TRANSPORT="0", **MALLOC
            ),
            "tritonclient": caller(python("tritonclient"), BY_OIP, address, "tensor", "output"),
            "tritonclient, malloc set": caller(python("tritonclient"), BY_OIP, address, "tensor", "output", **MALLOC),
        }
    finally:
        server.kill()


def in_turns(callers: dict[str, Caller], at_once: int, count: int = 3) -> dict[str, dict[str, tuple[float, float]]]:
    """(calls a second, p50 in ms), medians of several turns, of each caller and payload."""
    found: dict[str, dict[str, tuple[float, float]]] = {name: {} for name in callers}
    for payload in PAYLOADS:
        turns = [{name: call(payload, at_once) for name, call in callers.items()} for _ in range(count)]
        for name in callers:
            rate, p50 = np.median([turn[name] for turn in turns], axis=0)
            found[name][payload] = float(rate), float(p50)
    return found


def table(head: str, rows: dict[str, dict[str, tuple[float, float]]], index: int, digits: int) -> None:
    """Prints one figure, the rate (0) or the p50 (1), of every row."""
    print(f"\n| {head} |", " | ".join(PAYLOADS), "|\n| --- |" + " --- |" * len(PAYLOADS))
    for name, row in rows.items():
        print("|", " | ".join([name, *(f"{row[payload][index]:.{digits}f}" for payload in PAYLOADS)]), "|", flush=True)


def protocols(folder: Path) -> None:
    """Prints what enabling the other protocols costs a call: one protocol and all of them, in turns."""
    with contextlib.ExitStack() as stack:
        every = stack.enter_context(ours(folder, TMS_PROTOCOLS=",".join(PROTOCOLS)))
        for protocol, way in {
            "native": "ModelClient, gRPC, malloc set",
            "open_inference": "tritonclient, malloc set",
        }.items():
            alone = stack.enter_context(ours(folder, TMS_PROTOCOLS=protocol))
            rows = in_turns({f"{protocol} alone": alone[way], f"{protocol} with all others": every[way]}, 1, 5)
            table("p50 in ms", rows, 1, 3)


def slopes(callers: dict[str, Caller]) -> dict[str, list[tuple[int, float]]]:
    """(pixels, p50 in ms) of square images of growing size, for each way; medians of three turns."""
    turns = [[[call(f"{side}x{side}x3", 1)[1] for side in SIDES] for call in callers.values()] for _ in range(3)]
    lines = zip(callers, np.median(turns, axis=0), strict=True)
    return {name: [(side * side, float(ms)) for side, ms in zip(SIDES, line, strict=True)] for name, line in lines}


def copies(pause_s: float) -> float:
    """GB/s of copies of an image, with a pause before each."""
    image = np.random.default_rng(0).integers(0, 256, (1440, 1440, 3), np.uint8)
    other, times = np.zeros_like(image), []
    for _ in range(300):
        time.sleep(pause_s)
        begun = time.perf_counter()
        np.copyto(other, image)
        times.append(time.perf_counter() - begun)
    return float(image.nbytes / np.median(times) / 1e9)


def main() -> None:
    """Measures every server in turns, prints the tables and writes the plot."""
    folder = ROOT / "build" / "peer-models"
    for name, body in {"length": LENGTH, "tensor": TENSOR}.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "__init__.py").write_text(body)
    with contextlib.ExitStack() as stack:
        peers = {
            "mosec": http_peer("mosec", MOSEC, "main.py"),
            "LitServe": http_peer("litserve", LITSERVE, "main.py"),
            "BentoML": http_peer("bentoml", BENTOML, "-m", "bentoml", "serve", "main:Length"),
            "Triton": triton(),
            "MLServer": mlserver(),
        }
        callers = {name: stack.enter_context(peer) for name, peer in peers.items()}
        ways = stack.enter_context(ours(folder))
        callers |= {f"this server: {name}": way for name, way in ways.items()}
        table("p50 in ms of one caller", in_turns(callers, 1), 1, 2)
        table("calls a second of eight", in_turns(callers, 8), 0, 0)
        points = slopes(
            {
                name.partition(", ")[2]: way
                for name, way in ways.items()
                if "ModelClient" in name and "malloc" not in name
            }
        )
    at_once, paused = copies(0), copies(_CALL_S)
    print("\n| way | GB/s beyond the first byte | r2 of the line |\n| --- | --- | --- |")
    print(f"| a copy in memory | {at_once:.1f} ({paused:.1f} with {_CALL_S * 1000:g} ms between copies) | |")
    for name, line in points.items():
        slope, _ = np.polyfit([3 * pixels for pixels, _ in line], [ms for _, ms in line], 1)
        fit = np.corrcoef([pixels for pixels, _ in line], [ms for _, ms in line])[0, 1] ** 2
        print(f"| {name} | {1 / slope / 1e6:.1f} | {fit:.3f} |")
    protocols(folder)
    command = [python("plot"), "-c", PLOT, ROOT / "docs" / "images.png"]
    subprocess.run([str(part) for part in command], input=json.dumps(points), text=True, check=True)


if __name__ == "__main__":
    main()
