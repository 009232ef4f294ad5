"""The servers that ``peers.py`` measures, each with its environment, its processes, and the ways to call it."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import bench  # noqa: E402
from tests.conftest import Server  # noqa: E402

FOLDER = ROOT / "build" / "peers"
PEER_MODELS = ROOT / "tests" / "peer_models"
NEEDS = {
    "mosec": "mosec==0.9.8 numpy",
    "litserve": "litserve==0.2.19 python-multipart==0.0.20",
    "bentoml": "bentoml==1.4.39",
    "triton": "nvidia-pytriton==0.7.0",
    "tritonclient": "tritonclient[grpc]==2.73.0",
    "mlserver": "mlserver==1.7.1 uvloop==0.21.0",
    "kserve": "kserve==0.21.0",
    "ray": "ray[serve]==2.60.0",
    "plot": "matplotlib==3.10.7",
}
MALLOC = {  # what docs/tuning.md advises for callers with large arrays
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
    "MALLOC_TOP_PAD_": "67108864",
}
LENGTH = """
import numpy
from model_interface import ModelInterface
class Model(ModelInterface):
    workers = 2
    def run(self, data, args):
        return data.nbytes if isinstance(data, numpy.ndarray) else len(data)
"""
MODELS = {
    "length": LENGTH,
    "tensor": LENGTH.replace("return data.nbytes if", "return numpy.array([data.nbytes]) if"),
    "light": bench.BATCHES.format(base=2, item=0.1).replace("[1] * len(items)", "[len(item) for item in items]"),
}
STOP_S = 20.0
OURS = "this server"
SAME_HOST, SHARED = f"{OURS}: ModelClient, same host", f"{OURS}: ModelClient, shared_array"
GRPC, GRPC_MALLOC = f"{OURS}: ModelClient, gRPC", f"{OURS}: ModelClient, gRPC, malloc set"
OIP, OIP_MALLOC = f"{OURS}: tritonclient", f"{OURS}: tritonclient, malloc set"
HTTP = f"{OURS}: HTTP"
BY_LOCAL, BY_GRPC = {"TMS_LOCAL_TRANSPORT": "1"}, {"TMS_LOCAL_TRANSPORT": "0"}
WAYS = [SAME_HOST, SHARED, GRPC, GRPC_MALLOC, OIP, OIP_MALLOC, HTTP]


class Figures(NamedTuple):
    """What callers found."""

    rate: float
    """calls a second"""
    p50_ms: float
    server_ms: float
    """CPU of all processes of the server, a call"""
    caller_ms: float
    """CPU of the callers' process, a call"""


def python(name: str) -> Path:
    """The interpreter of a peer's environment, which is made at first."""
    program = FOLDER / name / "bin" / "python"
    if not (FOLDER / name / "ready").exists():
        print(f"installing {NEEDS[name]}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", FOLDER / name], check=True)
        subprocess.run([program, "-m", "pip", "install", "-q", *NEEDS[name].split()], check=True)
        (FOLDER / name / "ready").touch()
    return program


def ports(count: int) -> list[int]:
    """Free ports."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


class Processes:
    """A server's process and its descendants. If it ``spins``, they are stopped unless it is measured."""

    def __init__(self, pid: int) -> None:
        self.root, self.spins = psutil.Process(pid), False

    def all(self) -> list[psutil.Process]:
        return [self.root, *self.root.children(recursive=True)]

    def cpu_s(self) -> float:
        """CPU seconds so far, with those of descendants that have ended."""
        total = 0.0
        for process in self.all():
            with contextlib.suppress(psutil.NoSuchProcess):  # its parent has its time
                total += sum(process.cpu_times()[:4])
        return total

    def pause(self) -> None:
        for process in self.all():
            process.suspend()

    def go_on(self) -> None:
        for process in self.all():
            process.resume()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        if self.spins:
            self.go_on()
        yield
        if self.spins:
            self.pause()

    def kill(self) -> None:
        """Ends them, if that was not done before: first the root by SIGTERM, then all that are left."""
        if not self.root.is_running():
            return
        self.go_on()
        processes = self.all()
        self.root.terminate()
        _, left = psutil.wait_procs(processes, STOP_S)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


class Way:
    """A way to call a server: a process of ``peer_calls.py``."""

    def __init__(self, processes: Processes, way: str, *arguments: object, needs: str = "", **env: str) -> None:
        """Starts the process, which waits for the server. It has the packages of ``needs``, if given."""
        self.processes, self.up = processes, False
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [
                str(python(needs) if needs else sys.executable),
                str(ROOT / "tests" / "peer_calls.py"),
                way,
                *map(str, arguments),
            ],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def read(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout
        if line := self.process.stdout.readline():
            return line
        self.errors.seek(0)
        raise RuntimeError(self.errors.read())

    def send(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def measure(self, payload: str, at_once: int, seconds: float) -> Figures:
        """Calls the server from so many threads for so long."""
        with self.processes.running():
            self.send(f"{payload}\t{at_once}\t{seconds}")
            self.read()
            before = self.processes.cpu_s()
            self.send("go")
            found = json.loads(self.read())
            used = self.processes.cpu_s() - before
        calls = found["calls"]
        return Figures(calls / found["seconds"], found["p50"], 1000 * used / calls, 1000 * found["cpu"] / calls)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.errors):
            file.close()  # type: ignore[union-attr]


class Servers:
    """Everything that was started. ``ways`` has the ways by their names, ``light`` those to the batching model."""

    def __init__(self) -> None:
        self.processes: dict[str, Processes] = {}
        self.ways: dict[str, Way] = {}
        self.light: dict[str, Way] = {}
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> "Servers":
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def way(self, name: str, server: str, *arguments: object, ways: dict[str, Way] | None = None, **env: Any) -> None:
        """Adds a way to call a server."""
        way = Way(self.processes[server], *arguments, **env)
        self.stack.callback(way.kill)
        (self.ways if ways is None else ways)[name] = way

    def start(self, name: str, command: list[object], cwd: Path, **env: str) -> None:
        """Starts a peer."""
        log = self.stack.enter_context((cwd / "log").open("w"))
        path = {"PYTHONPATH": str(PEER_MODELS), "PATH": f"{Path(str(command[0])).parent}:{os.environ['PATH']}"}
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env=os.environ | path | env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        self.processes[name] = Processes(process.pid)
        self.stack.callback(process.wait)
        self.stack.callback(self.processes[name].kill)

    def wait(self) -> None:
        """Returns when the server of every way has answered."""
        for name, way in [*self.ways.items(), *self.light.items()]:
            if not way.up:
                print(f"waiting for {name}", file=sys.stderr)
                way.up = way.read() == "up\n"


def folder(name: str) -> Path:
    """An empty folder for a peer's process."""
    made = FOLDER / f"{name}-server"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    return made


def mosec(servers: Servers) -> None:
    (port,) = ports(1)
    servers.start("mosec", [python("mosec"), PEER_MODELS / "mosec_length.py", "--port", port], folder("mosec"))
    servers.way("mosec", "mosec", "http", f"127.0.0.1:{port}", "/inference")
    servers.way("mosec", "mosec", "http", f"127.0.0.1:{port}", "/light", ways=servers.light)


def litserve(servers: Servers) -> None:
    (port,) = ports(1)
    command = [python("litserve"), PEER_MODELS / "litserve_length.py", "--port", port]
    servers.start("LitServe", command, folder("litserve"))
    servers.way("LitServe", "LitServe", "http", f"127.0.0.1:{port}", "/inference", "form")


def bentoml(servers: Servers) -> None:
    (port,) = ports(1)
    command = [python("bentoml"), "-m", "bentoml", "serve", "bentoml_length:Length", "--port", port]
    command += ["--timeout-keep-alive", 60]
    (cwd := folder("bentoml")).joinpath("config.yaml").write_text(
        "services: {Length: {logging: {access: {enabled: false}}}}"
    )
    shutil.copy(PEER_MODELS / "bentoml_length.py", cwd)
    servers.start("BentoML", command, cwd, BENTOML_CONFIG=str(cwd / "config.yaml"), BENTOML_DO_NOT_TRACK="1")
    servers.way("BentoML", "BentoML", "http", f"127.0.0.1:{port}", "/inference")


def triton(servers: Servers) -> None:
    grpc_port, http_port, metrics_port = ports(3)
    program = python("triton")
    # Its workers must find the library of the interpreter that made the environment, not the system's.
    ask = [program, "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"]
    libraries = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    command = [program, PEER_MODELS / "triton_length.py", grpc_port, http_port, metrics_port]
    servers.start("Triton", command, folder("triton"), LD_LIBRARY_PATH=libraries)
    open_inference(servers, "Triton", f"127.0.0.1:{grpc_port}")


def mlserver(servers: Servers) -> None:
    http_port, grpc_port, metrics_port = ports(3)
    program = python("mlserver")
    settings = {"http_port": http_port, "grpc_port": grpc_port, "metrics_port": metrics_port, "parallel_workers": 2}
    settings |= {"grpc_max_message_length": 1 << 28}
    quiet = {"version": 1, "disable_existing_loggers": False, "loggers": {"mlserver": {"level": "WARNING"}}}
    cwd, model = folder("mlserver"), {"name": "length", "implementation": "mlserver_length.Length"}
    (cwd / "settings.json").write_text(json.dumps(settings | {"logging_settings": quiet}))
    (cwd / "model-settings.json").write_text(json.dumps(model))
    servers.start("MLServer", [program, program.parent / "mlserver", "start", "."], cwd)
    open_inference(servers, "MLServer", f"127.0.0.1:{grpc_port}")


def kserve(servers: Servers) -> None:
    grpc_port, http_port = ports(2)
    command = [python("kserve"), PEER_MODELS / "kserve_length.py", grpc_port, http_port]
    servers.start("KServe", command, folder("kserve"))
    open_inference(servers, "KServe", f"127.0.0.1:{grpc_port}")


def open_inference(servers: Servers, name: str, address: str) -> None:
    servers.way(name, name, "open_inference", address, "length", "n", needs="tritonclient")


def ray(servers: Servers) -> None:
    grpc_port, http_port = ports(2)
    sockets = servers.stack.enter_context(tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True))
    command = [python("ray"), PEER_MODELS / "ray_length.py", grpc_port, http_port, sockets]
    servers.start("Ray Serve", command, folder("ray"), RAY_USAGE_STATS_ENABLED="0")
    servers.way("Ray Serve", "Ray Serve", "grpc", f"127.0.0.1:{grpc_port}")


def grpcio(servers: Servers) -> None:
    (port,) = ports(1)
    servers.start("grpcio alone", [sys.executable, PEER_MODELS / "grpc_length.py", port], folder("grpcio"))
    servers.way("grpcio alone", "grpcio alone", "grpc", f"127.0.0.1:{port}")


PEERS = {
    "mosec": mosec,
    "litserve": litserve,
    "bentoml": bentoml,
    "triton": triton,
    "mlserver": mlserver,
    "kserve": kserve,
    "ray": ray,
    "grpcio": grpcio,
}


def models() -> Path:
    """A folder with the models of this server."""
    made = FOLDER / "models"
    for name, body in MODELS.items():
        (made / name).mkdir(parents=True, exist_ok=True)
        (made / name / "__init__.py").write_text(body)
    return made


def this_server(servers: Servers, names: Sequence[str] = WAYS, **settings: str) -> Server:
    """Starts this server, and adds these ways to call it."""
    server = Server(models=models(), **settings)
    servers.stack.callback(server.kill)
    servers.processes[OURS] = Processes(server.process.pid)
    client, oip = ("model_client", server.address, "length"), ("open_inference", server.address, "tensor", "output")
    http = ("http", f"127.0.0.1:{server.http_port}", "/models/length/run")
    triton = {"needs": "tritonclient"}
    ways: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
        SAME_HOST: (client, BY_LOCAL),
        SHARED: ((*client, "shared_array"), BY_LOCAL),
        GRPC: (client, BY_GRPC),
        GRPC_MALLOC: (client, BY_GRPC | MALLOC),
        OIP: (oip, triton),
        OIP_MALLOC: (oip, triton | MALLOC),
        HTTP: (http, {}),
    }
    for name in names:
        arguments, env = ways[name]
        servers.way(name, OURS, *arguments, **env)
    return server


def to_light(servers: Servers, server: Server) -> None:
    """Adds the ways to the batching model of this server."""
    client, http = ("model_client", server.address, "light"), ("http", f"127.0.0.1:{server.http_port}")
    servers.way(SAME_HOST, OURS, *client, ways=servers.light, **BY_LOCAL)
    servers.way(GRPC, OURS, *client, ways=servers.light, **BY_GRPC)
    servers.way(HTTP, OURS, *http, "/models/light/run", ways=servers.light)
