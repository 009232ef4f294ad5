"""Real servers for the tests: each a process of its own, on free ports, killed in the end."""

import asyncio
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from model_client import ModelClient
from tiny_model_server.engine.engine import Engine
from tiny_model_server.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "tests" / "models"

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # compiling its code anew takes a fifth of a server's start

# The suite tries the same requests each time; `make fuzz` tries many others.
settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("fuzz", max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("suite")


LONGEST = """docker workers faults chaos soak local_transport page balancing odd_replicas docs limits http package cli
everywhere clients admin locust openai large_messages monitoring manifests""".split()
"""The files that take longest. They begin first, so that no process is left with one of them in the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of the longest files first."""
    rank = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


def free_port() -> int:
    """A port that no process listens at."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], Any], what: str, timeout: float = 20) -> Any:
    """Polls until ``condition()`` is true, and returns what it gave."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError(f"waited {timeout} s in vain for {what}")


def shared_memory() -> set[str]:
    """What lies in /dev/shm, but for what libraries in other processes, of tests beside this one too, put there."""
    libraries = (".org.chromium.", "joblib_", "loky-", "psm_", "pym-", "sem.", "torch_")
    return {name for name in os.listdir("/dev/shm") if not name.startswith(libraries)}


def only(*names: str) -> Path:
    """A folder with these of the test models: a server of few starts in a quarter of the time."""
    folder = ROOT / "build" / "test_models" / "-".join(names)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        with suppress(FileExistsError):
            (folder / name).symlink_to(MODELS / name)
    return folder


class Server:
    """A ``python server.py``, or another command, with this environment. Its log can be read."""

    def __init__(
        self,
        models: Path | None = None,
        ready: bool = True,
        command: Sequence[str | Path] = (sys.executable, "server.py"),
        cwd: Path = ROOT,
        **env: object,
    ) -> None:
        models = models or only("echo", "worker")
        settings = {"TMS_HOST": "127.0.0.1", "TMS_PORT": 0, "TMS_HTTP_PORT": 0, "TMS_MODELS_DIR": models} | env
        clean = {key: value for key, value in os.environ.items() if not key.startswith("TMS_")}
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env=clean | {key: str(value) for key, value in settings.items()},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        try:
            found = self.wait_for_log(r"listening: gRPC on \S+:(\d+)(?:, HTTP on \S+:(\d+))?")
            self.port, self.http_port = int(found[1]), int(found[2] or 0)
            self.address = f"127.0.0.1:{self.port}"
            if ready:
                self.wait_for_log(r"serving \d+ models", timeout=60)
        except BaseException:  # pytest-timeout's too
            self.kill()
            raise

    def _read(self) -> None:
        assert self.process.stderr
        with self.process.stderr as lines:
            for line in lines:
                self.log.append(line.rstrip())

    def wait_for_log(self, pattern: str, timeout: float = 20) -> re.Match[str]:
        def find() -> re.Match[str] | None:
            if self.process.poll() is not None:
                time.sleep(0.2)
            found = next((match for line in list(self.log) if (match := re.search(pattern, line))), None)
            assert found or self.process.poll() is None, "\n".join(self.log)
            return found

        try:
            return wait_for(find, pattern, timeout)
        except AssertionError as error:
            raise AssertionError("\n".join([str(error), *self.log])) from None

    def client(self, model: str = "", **options: Any) -> ModelClient:
        return ModelClient(model, addresses=[self.address], **options)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()  # ends with the last worker, which goes when the front is gone


@contextmanager
def running_engine(settings: Settings) -> Iterator[Engine]:
    """An engine whose loop runs in a thread. It ends with the block."""
    engine = Engine(settings)
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        thread = threading.Thread(target=loop.run_forever)
        runner.run(engine.use_loop())
        thread.start()
        try:
            yield engine
        finally:
            asyncio.run_coroutine_threadsafe(engine.stop(5), loop).result(20)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()


@pytest.fixture
def default_ports() -> Iterator[None]:
    """For a test whose server listens at 50000 and 8080: no other test on this machine does so meanwhile."""
    with (Path(tempfile.gettempdir()) / "tiny_model_server_ports").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture
def start_server() -> Iterator[Callable[..., Server]]:
    """Starts servers that end with the test."""
    started: list[Server] = []

    def start(*args: Any, **kwargs: Any) -> Server:
        started.append(Server(*args, **kwargs))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One server with the test models, for tests that leave it as it was."""
    server = Server(MODELS)
    yield server
    server.kill()
